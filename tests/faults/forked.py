"""The command, started again and again with faults: each start is forked from this process, which computes nothing.

A request is a line of JSON on standard input: `arguments`, and `faults`, a list with the faults of each of the starts
that are let go at the same moment. The answer is a line with what each came to: `code`, `out`, `err`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from contextlib import ExitStack, suppress
from typing import Any


def _run() -> int:
    from spinlm.cli import main

    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _arm(faults: dict[str, Any]) -> None:
    calls = "".join(f"{kind}\t{place}\n" for kind, place in faults["full_from"])
    words = (faults["directory"], faults["log"], calls)
    ctypes.CDLL(None).arm(*(word.encode() for word in words), faults["links"], ctypes.c_long(faults["seconds_back"]))
    if not faults["links"]:
        with suppress(PermissionError):
            os.link(__file__, faults["log"] + ".link")
            raise AssertionError("hard links work")


def _start(faults: dict[str, Any], out: int, err: int, waits: int, goes: int) -> int:
    """Its number. It waits until nobody holds the other end of the pipe any more."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.close(goes)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.read(waits, 1)
        if faults["armed"]:
            _arm(faults)
        code = _run()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _together(all_faults: list[dict[str, Any]]) -> list[dict[str, Any]]:
    waits, goes = os.pipe()
    with ExitStack() as files:
        said = [[files.enter_context(tempfile.TemporaryFile()) for _ in range(2)] for _ in all_faults]
        children = [
            _start(faults, out.fileno(), err.fileno(), waits, goes)
            for faults, (out, err) in zip(all_faults, said, strict=True)
        ]
        os.close(waits)
        os.close(goes)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        texts = [[os.pread(file.fileno(), 10**7, 0).decode(errors="replace") for file in pair] for pair in said]
    return [{"code": code, "out": out, "err": err} for code, (out, err) in zip(codes, texts, strict=True)]


if __name__ == "__main__":
    import peft  # noqa: F401

    import spinlm.selfplay  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        sys.argv = ["spinlm", *request["arguments"]]
        print(json.dumps(_together(request["faults"])), flush=True)
