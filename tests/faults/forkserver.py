"""Starts the command again and again without importing the libraries again: each is a fork, in a group of its own.

    python forkserver.py

For each line on standard input, a JSON object with `arguments`, `cwd` and `output` (a file that both its streams are
added to), it starts `spinlm ARGUMENTS` there, writes its process id, and when it has ended its exit code, or minus the
signal that it died of. Nothing is computed before the fork.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def _become(arguments: list[str], cwd: str, output: str) -> None:
    from spinlm.cli import main

    os.chdir(cwd)
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.argv = ["spinlm", *arguments]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start(wanted: dict[str, Any]) -> int:
    child = os.fork()
    os.setpgid(child, child)  # in both: whichever comes first
    if not child:
        try:
            _become(**wanted)
        finally:
            os._exit(70)  # an exception that no command should end with: its traceback is in the output
    print(child, flush=True)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    import peft  # noqa: F401

    import spinlm.selfplay  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        print(_start(json.loads(line)), flush=True)
