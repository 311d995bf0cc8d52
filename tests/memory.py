"""How much memory a piece of code takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_STATUS = Path("/proc/self/status")
# Not ru_maxrss: a process takes that over from the one that started it, so beside pytest it tells nothing.
_CODE = """
import sys
from pathlib import Path

def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])

{before}
before = peak()
{code}
print(peak() - before)
"""


def peak(code: str, *arguments: str | Path, cwd: Path, before: str = "import torch") -> int:
    """KiB that a fresh interpreter takes at most to run ``code``, besides what it took to run ``before``."""
    if not _STATUS.exists():
        pytest.skip("peak memory is read from Linux's /proc/self/status")
    command = [sys.executable, "-c", _CODE.format(before=before, code=code), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.splitlines()[-1])
