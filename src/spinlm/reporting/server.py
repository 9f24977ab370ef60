"""`spinlm report RUN --serve`: the page of a run at an address, on this machine alone or for others who have the token.

No file is opened by a name that a client sends: there is one page, made from what is committed, and one path to it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import socket
import sys
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from ipaddress import ip_address
from socketserver import ThreadingTCPServer
from threading import Lock
from typing import Any

from spinlm.errors import UserError, first_line
from spinlm.reporting.escape import plain
from spinlm.reporting.html import content_security_policy, page
from spinlm.rundir import RunDir, reading

LOOPBACK = "127.0.0.1"
PORT = 8765

MOST_AT_ONCE = 32
"""Connections; one more is closed at once."""

SECONDS_TO_ASK, SECONDS_TO_ANSWER = 10.0, 60.0
"""That a connection may take until its request is there, and then until the answer is taken."""

LONGEST_REQUEST = 16_384
"""Bytes of the request line and all headers."""

METHODS = "GET, HEAD"


class LatestPage:
    """A run's page, made anew when the run has changed since it was asked for last."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._lock = Lock()
        self._state = ""
        self._page = b""

    def get(self) -> bytes:
        """The page.

        Raises:
            UserError: There is no run any longer, or something in it isn't what was committed.
        """
        with self._lock:
            running = self._run.is_running()
            state = self._state_of_the_run(running)
            if state != self._state:
                with reading(self._run.path):
                    self._page = page(self._run, running, served=True).encode()
                self._state = state
            return self._page

    def _state_of_the_run(self, running: bool) -> str:
        """A hash of the records, of the time accounted for, of which checkpoints are whole, and whether it goes on.

        Of what they say, not of when they were written: a clock may be set back, and a copied run has no times.
        """
        of, root = hashlib.sha256(str(running).encode()), self._run.path
        files = [root / "run.json", root / "timings.jsonl", *(root / "commits").glob("*.json")]
        for file in sorted([*files, *(root / "checkpoints").glob("**/checkpoint-*.json")]):
            with suppress(FileNotFoundError):  # a checkpoint that has just been replaced
                content = file.read_bytes()
                of.update(f"{file.relative_to(root)}\0{len(content)}\0".encode(errors="surrogateescape") + content)
        return of.hexdigest()


class ReportServer(ThreadingTCPServer):
    """A server of one page, with room for few clients and little patience, so that none can keep others out for long.

    Attributes:
        latest: The page.
        is_private: Whether it listens on the loopback address, where only this machine can reach it.
        path: The page's; where others can reach it, nobody guesses it.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, run: RunDir, host: str = LOOPBACK, port: int = PORT) -> None:
        """Makes the page, and listens.

        Args:
            run: The run.
            host: The name or address to listen at.
            port: 0 takes a free one.

        Raises:
            UserError: The page can't be made, or the address or the port can't be had.
        """
        self.latest = LatestPage(run)
        self.latest.get()
        self._until: dict[Any, float] = {}
        try:
            family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.address_family = family
            super().__init__(place, _Handler)  # type: ignore[arg-type]  # four parts, in IPv6
        except (OSError, OverflowError, UnicodeError) as error:
            raise UserError(
                f"--host {host} --port {port}: can't be listened at: {error}; give others; port 0 is any free one"
            ) from None
        self.host, self.port = str(self.server_address[0]), int(self.server_address[1])
        self.is_private = ip_address(self.host).is_loopback
        self.path = "/" if self.is_private else f"/{secrets.token_urlsafe()}/"

    @property
    def address(self) -> str:
        """Where the page is to be found."""
        host = socket.gethostname() if ip_address(self.host).is_unspecified else self.host
        return f"http://{_in_url(host)}:{self.port}{self.path}"

    @property
    def tunnel(self) -> str:
        """The command that brings the page to another machine."""
        return f"ssh -N -L {self.port}:{_in_url(self.host)}:{self.port} {socket.gethostname()}"

    def is_named(self, host: str) -> bool:
        """Whether a request is for this server, by its Host header.

        A page elsewhere that has its own name point here (DNS rebinding) is for another; a tunnel may change the port.
        Where others can reach it, it has names that it doesn't know of, and such a page doesn't know the token.
        """
        name = f"localhost|{re.escape(_in_url(self.host))}"
        return not self.is_private or re.fullmatch(rf"({name})(:[0-9]+)?", host) is not None

    def give(self, connection: Any, seconds: float) -> None:
        """Let a connection live for so long from now on."""
        self._until[connection] = time.monotonic() + seconds

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._until) >= MOST_AT_ONCE:
            self.shutdown_request(request)
            return
        self.give(request, SECONDS_TO_ASK)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Now and then: end what takes too long."""
        for connection, until in list(self._until.items()):
            if time.monotonic() > until:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self._until.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone isn't worth a word, and what else goes wrong not more than one."""
        kind = sys.exc_info()[0]
        if kind is not None and not issubclass(kind, OSError):
            sys.stderr.write(f"a request isn't answered: {kind.__name__}\n")


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of the page, and nothing else. Nothing that was sent is repeated, here or on the terminal."""

    server: ReportServer
    raw_requestline: bytes
    requestline = ""
    server_version = "spinlm"
    sys_version = ""
    timeout = SECONDS_TO_ANSWER

    def parse_request(self) -> bool:
        """The request, where it comes whole, is short enough, and is one of HTTP/1.0 or later."""
        lines, room = [self.raw_requestline], LONGEST_REQUEST - len(self.raw_requestline)
        while lines[-1] not in (b"\r\n", b"\n"):
            if room <= 0:
                self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
                return False
            lines.append(self.rfile.readline(room))
            room -= len(lines[-1])
            if not lines[-1]:
                return False
        self.rfile = BytesIO(b"".join(lines[1:]))
        if not super().parse_request():
            return False
        if self.request_version == self.default_request_version:  # HTTP/0.9, whose answers have no headers
            self.send_error(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
            return False
        self.server.give(self.connection, SECONDS_TO_ANSWER)
        return True

    def do_GET(self) -> None:
        self._send(*self._response())

    def do_HEAD(self) -> None:
        self._send(*self._response(), with_body=False)

    def _response(self) -> tuple[HTTPStatus, bytes, str]:
        if not self.server.is_named(self.headers.get("Host", "")):
            return HTTPStatus.MISDIRECTED_REQUEST, b"This server answers at its own address only.\n", "text/plain"
        if not hmac.compare_digest(self.path.encode(), self.server.path.encode()):
            return HTTPStatus.NOT_FOUND, b"There is nothing here.\n", "text/plain"
        try:
            return HTTPStatus.OK, self.server.latest.get(), "text/html"
        except Exception as error:  # the run is being written, or its disk is gone: the next request may do better
            return HTTPStatus.INTERNAL_SERVER_ERROR, self._excuse(error), "text/plain"

    def _excuse(self, error: Exception) -> bytes:
        """Why there is no page: on the terminal, and to who asks from this machine."""
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        said = f"the page can't be made: {kind}{plain(first_line(error))}\n"
        sys.stderr.write(said)
        if self.server.is_private:
            return said.encode(errors="replace")
        return b"The page can't be made now; the terminal that it is served from says why.\n"

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What isn't HTTP, is too long, or is another method, which HTTPServer calls not implemented."""
        status = HTTPStatus(code)
        if status == HTTPStatus.NOT_IMPLEMENTED:
            status = HTTPStatus.METHOD_NOT_ALLOWED
        self.request_version = self.protocol_version  # else what can't be read is answered without headers
        self._send(status, f"{status.phrase}: only {METHODS} are answered\n".encode(), "text/plain")
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
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = METHODS
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests aren't worth a line each."""


def _in_url(host: str) -> str:
    """A name or an address as it stands in a URL."""
    return f"[{host.replace('%', '%25')}]" if ":" in host else host
