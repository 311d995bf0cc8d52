"""``python -m benchmarks.record``: run all benchmarks and keep their figures.

A gate that finds a default too slow fails the run, exit code 1, and the figures that show it are kept all the same.

Writes ``benchmarks/results/<machine>.json`` whole or not at all: what ran (machine, versions, build, commit, threads),
and for each benchmark its median and what stands beside it (rate, ceiling, share; medians and ratios of the ways).
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from ctm_fast.files import atomic_write

HERE = Path(__file__).parent


def condense(recorded: dict[str, Any], load: float) -> dict[str, Any]:
    """What is worth keeping of pytest-benchmark's JSON."""
    commit = recorded["commit_info"]
    return {
        **recorded["machine_info"]["report"],
        "commit": commit.get("id", "unknown") + (" with local changes" if commit.get("dirty") else ""),
        "date": recorded["datetime"],
        "load before": load,
        "results": {
            row["name"]: {
                "median seconds": row["stats"]["median"],
                "rounds": row["stats"]["rounds"],
                **row["extra_info"],
            }
            for row in recorded["benchmarks"]
        },
    }


def file_name(machine: dict[str, str]) -> str:
    """Of the GPU, or of the CPU and its usable cores: ``nvidia-h200.json``, ``amd-epyc-2-cores.json``."""
    gpu = machine.get("GPU 0", "").partition(",")[0]
    name = gpu or f"{machine['CPU']} {machine['cores'].split()[0]} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


def main() -> int:
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "benchmark.json")
        code = pytest.main([str(HERE), "--benchmark-only", f"--benchmark-json={path}"])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return int(code)
        figures = condense(json.loads(path.read_text()), load)
    target = HERE / "results" / file_name(figures["machine"])
    target.parent.mkdir(exist_ok=True)
    atomic_write(target, lambda file: file.write((json.dumps(figures, indent=1) + "\n").encode()))
    print(f"wrote {target}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
