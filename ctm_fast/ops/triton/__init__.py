"""The ops' Triton kernels; a module here is imported only where Triton can run (see ``ops/_library.py``)."""
