"""`spinlm report RUN --serve`: the page of a run on this machine's own address, for a browser elsewhere by a tunnel."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from spinlm.errors import UserError, first_line
from spinlm.reporting.html import content_security_policy, page
from spinlm.rundir import RunDir

HOST = "127.0.0.1"


class LatestPage:
    """A run's page, made anew when the run has changed since it was asked for last."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._lock = Lock()
        self._state: Any = None
        self._page = b""

    def get(self) -> bytes:
        """The page.

        Raises:
            UserError: There is no run any longer, or something in it isn't what was committed.
        """
        with self._lock:
            state = self._state_of_the_run()
            if state != self._state:
                _, running = state
                self._page = page(self._run, running, served=True).encode()
                self._state = state
            return self._page

    def _state_of_the_run(self) -> tuple[list[tuple[str, int, int]], bool]:
        """What is committed, how much time is accounted for, which checkpoints there are, and whether it is running."""
        files = [*(self._run.path / "commits").glob("*.json"), self._run.path / "timings.jsonl"]
        files += (self._run.path / "checkpoints").glob("**/checkpoint-*.json")
        stats = [(str(file), stat.st_size, stat.st_mtime_ns) for file in files if (stat := _stat(file)) is not None]
        return sorted(stats), self._run.is_running()


def make_server(run: RunDir, port: int) -> ThreadingHTTPServer:
    """A server of one page, on the loopback address.

    Args:
        run: The run.
        port: 0 takes a free one.

    Raises:
        UserError: The port can't be had, or the page can't be made.
    """
    latest = LatestPage(run)
    latest.get()
    try:
        return _Server((HOST, port), _handler(latest.get))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: can't be listened at: {error}; give another, or 0 for any") from None


def address(server: ThreadingHTTPServer) -> str:
    """Where it is to be found."""
    return f"http://{HOST}:{server.server_port}/"


def tunnel(server: ThreadingHTTPServer) -> str:
    """The command that brings the page to another machine."""
    return f"ssh -N -L {server.server_port}:{HOST}:{server.server_port} {socket.gethostname()}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True


def _handler(get: Callable[[], bytes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """GET and HEAD of `/`, and nothing else; only for who asks for this address by its own name."""

        server_version = "spinlm"
        sys_version = ""
        timeout = 30  # seconds that a connection may be silent

        def do_GET(self) -> None:
            self._send(*self._response())

        def do_HEAD(self) -> None:
            self._send(*self._response(), with_body=False)

        def _response(self) -> tuple[HTTPStatus, bytes, str]:
            if not self._is_asked_by_its_name():
                return HTTPStatus.MISDIRECTED_REQUEST, b"This server answers at its own address only.\n", "text/plain"
            if self.path != "/":
                return HTTPStatus.NOT_FOUND, b"There is only one page: /\n", "text/plain"
            try:
                return HTTPStatus.OK, get(), "text/html"
            except UserError as error:
                return HTTPStatus.INTERNAL_SERVER_ERROR, f"{error}\n".encode(errors="replace"), "text/plain"
            except Exception as error:  # the run is being written, or its disk is gone: the next request may do better
                said = f"the page can't be made: {type(error).__name__}: {first_line(error)}\n"
                sys.stderr.write(said)
                return HTTPStatus.INTERNAL_SERVER_ERROR, said.encode(errors="replace"), "text/plain"

        def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
            """What isn't HTTP, or another method."""
            status = HTTPStatus(code)
            self._send(status, f"{status.phrase}: only GET and HEAD of / are answered\n".encode(), "text/plain")
            self.close_connection = True

        def _send(self, status: HTTPStatus, content: bytes, kind: str, with_body: bool = True) -> None:
            self.send_response(status)
            headers = {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": str(len(content)),
                "Content-Security-Policy": f"{content_security_policy()}; frame-ancestors 'none'",
                "Cache-Control": "no-store",
                "Cross-Origin-Opener-Policy": "same-origin",
                "Cross-Origin-Resource-Policy": "same-origin",
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
            }
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def _is_asked_by_its_name(self) -> bool:
            """A page elsewhere that has its own name point here (DNS rebinding) isn't. A tunnel may change the port."""
            host, _, _ = self.headers.get("Host", "").rpartition(":")
            return (host or self.headers.get("Host", "")) in (HOST, "localhost")

        def log_message(self, format: str, *args: Any) -> None:
            """Requests aren't worth a line each."""

    return Handler


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except FileNotFoundError:  # a checkpoint that has just been replaced
        return None
