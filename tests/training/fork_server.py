"""Command lines in processes forked from one that has imported everything, killed where a test asks for it.

Reads one JSON object per line: ``program``, by default train; ``argv``; ``outdir``, whose file operations are counted;
``log``, where the output goes; and, if the process is to die, ``kill`` (SIGKILL before this operation, counted from 0),
``tear`` (while the file that this operation opens is written, a few bytes in) or ``after`` (SIGKILL after so many
seconds). Answers with ``status`` (exit code, or minus the signal) and ``operations``, a list of [event, file name].
"""

import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ctm_fast import runtime, sample, train

PROGRAMS = {"train": train.main, "sample": sample.main}
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove"}  # os.replace reports itself as a rename
TORN = 24  # bytes that still get written


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _child(request, write)
        os.close(write)
        if request.get("after") is not None:
            time.sleep(request["after"])
            os.kill(child, signal.SIGKILL)
        with os.fdopen(read) as pipe:
            operations = [json.loads(text) for text in pipe.read().splitlines()]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"status": status, "operations": operations}), flush=True)


def _child(request: dict[str, Any], operations: int) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; here it ends the process in mid-write
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in EVENTS or not str(arguments[0]).startswith(request["outdir"] + "/"):
            return
        path = Path(str(arguments[0]))
        name = re.sub(r"^\.(.*)\.\d+\.tmp$", r"\1", path.name)
        mode = arguments[1] if event == "open" else None
        what = f"{event} {mode}" if mode else event
        os.write(operations, (json.dumps([what, name]) + "\n").encode())
        if count == request.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if count == request.get("tear"):
            there = path.stat().st_size if mode == "a" and path.exists() else 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (there + TORN, resource.RLIM_INFINITY))
        count += 1

    sys.addaudithook(hook)
    program = request.get("program", "train")
    sys.argv = [program, *request["argv"]]
    try:
        runtime.run(PROGRAMS[program])
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        print(f"traceback: {error!r}", file=sys.stderr)
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
