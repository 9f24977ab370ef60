"""The command, started again and again and killed at another place each time.

    python kill_at.py PLAN ARGUMENTS...

PLAN is a JSON list with an item for each start: null to let it end by itself, or a place:
`call` (module:function), `matching` (a regular expression that finds its arguments; default: any),
`moment`: kill it `before` or `after` that call, or `wait` before it for a line on standard input.
Each start is a new process, forked from one that has imported the libraries and computed nothing.
The last line written is the JSON list of what each start came to: an exit code, or minus a signal.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any


def stop_at(call: str, moment: str, matching: str = "") -> None:
    """Wrap a function of the package, so that the process dies, or waits, at the call in question."""
    module_name, _, name = call.partition(":")
    *owners, name = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module_name))
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        here = re.search(matching, _words(arguments)) is not None
        if here and moment == "wait":
            print(f"waiting {os.getpid()}", flush=True)
            sys.stdin.readline()
        if here and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **named)
        if here and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


def _words(arguments: tuple[Any, ...]) -> str:
    from spinlm.rundir import Artifact

    return " ".join(
        str(a.key if isinstance(a, Artifact) else a) for a in arguments if isinstance(a, (str, int, Path, Artifact))
    )


def _run(place: dict[str, str] | None) -> int:
    from spinlm.cli import main

    if place is not None:
        stop_at(**place)
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _start(place: dict[str, str] | None) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        code = _run(place)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    plan = json.loads(sys.argv[1])
    sys.argv = ["spinlm", *sys.argv[2:]]
    import peft  # noqa: F401

    import spinlm.selfplay  # noqa: F401

    print(json.dumps([_start(place) for place in plan]), flush=True)
