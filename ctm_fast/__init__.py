"""Consistency Trajectory Models (arXiv 2310.02279): train, distil and sample, performance first.

Importing opens the compiled libraries that are there; it makes no CUDA call, compiles nothing and uses no network.
"""

from ctm_fast import _libraries

__version__ = "0.1.0"

_libraries.load()
