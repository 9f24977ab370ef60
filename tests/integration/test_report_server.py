"""A client that tries what it can, against the real `spinlm report RUN --serve`."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from integration.command import refused, spinlm
from made_run import MadeExample, MadeRun

CANARY = "canary-4f1c9b"
"""In a file beside the run, which files of the run are links to."""

MARK = "mark-77d0e2"
"""In what is sent: nothing of it may come back."""

REFUSALS = {400, 404, 405, 414, 421, 431, 505}


@dataclass(frozen=True)
class Served:
    """The command as a process.

    Attributes:
        process: It.
        port: Where it listens.
        path: The page's.
        place: The directory that it was started in.
    """

    process: subprocess.Popen[str]
    port: int
    path: str
    place: Path

    def answer(self, request: bytes) -> bytes:
        """All that comes back, until the server closes the connection."""
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as client:
            with suppress(OSError):  # closed before it had all been sent
                client.sendall(request)
                client.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                while part := client.recv(65536):
                    answer += part
        return answer

    def get(self, target: str | bytes, *headers: str) -> bytes:
        target = target.encode("latin-1") if isinstance(target, str) else target
        lines = ["HTTP/1.1", "Host: localhost", f"X-Mark: {MARK}", *headers]
        return self.answer(b"GET " + target + b" " + "\r\n".join(lines).encode() + b"\r\n\r\n")


@pytest.fixture(scope="module", params=["127.0.0.1", "0.0.0.0"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("served")
    MadeRun(place / "run").data([MadeExample("a", "the question")])
    (place / "secret.txt").write_text(CANARY)
    command = [sys.executable, "-u", "-m", "spinlm", "report", "run", "--serve", "--port", "0", "--host", request.param]
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"run: http://[^/:]+:(\d+)(/.*) \(Ctrl-C ends it\)\n", line)
    assert found is not None, line
    # Before it starts, a link out of the run would be refused.
    for name in ("link.txt", "report.html", "metrics.jsonl"):
        (place / "run" / name).symlink_to(place / "secret.txt")
    (place / "run/outside").symlink_to(place)
    served = Served(process, int(found[1]), found[2], place)
    try:
        yield served
        assert b"the question" in served.get(served.path)  # after all that, it answers as ever
    finally:
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=30)
    assert (process.returncode, complaints) == (0, "")


def assert_nothing_given(answer: bytes, served: Served) -> None:
    """No answer at all, or a refusal that tells nothing and can do nothing."""
    if not answer:
        return
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) in REFUSALS, head
    assert b"nosniff" in head
    assert b"default-src 'none'" in head
    assert b"Content-Type: text/plain; charset=utf-8" in head
    for said in (CANARY, MARK, "the question", "Traceback", "<", "run.json", str(served.place), sys.prefix):
        assert said.encode() not in body, said
    for said in (MARK, "Python", "X-Injected"):
        assert said.encode() not in head, said
    if served.path != "/":
        assert served.path.strip("/").encode() not in answer


BELOW = [
    "",
    ".",
    "..",
    "../..",
    "run.json",
    "report.html",
    "link.txt",
    "outside/",
    "outside/secret.txt",
    "commits/",
    "data/held_out.jsonl",
    "../secret.txt",
    "../../../../../../../../etc/passwd",
    "%2e%2e/secret.txt",
    "%2E%2E%2Fsecret.txt",
    "..%2fsecret.txt",
    "%252e%252e%252fsecret.txt",
    "%25252e%25252e/secret.txt",
    "..%5csecret.txt",
    "..\\secret.txt",
    "....//secret.txt",
    "..;/secret.txt",
    ".%00./secret.txt",
    "link.txt%00.html",
    "%00",
    "\x00",
    "\xff\xfe",
    "..%c0%afsecret.txt",
    "%c0%ae%c0%ae/secret.txt",
    "..%ef%bc%8fsecret.txt",
    "%",
    "%zz",
    "?file=../secret.txt",
    "#/secret.txt",
    ";secret.txt",
    "~/",
    "a" * 15_000,
    "../" * 5_000,
]


@pytest.mark.parametrize("below", BELOW, ids=lambda text: ascii(text)[:30])
def test_no_other_path(served: Served, below: str) -> None:
    """Beside the page's own, below it, and as an absolute path."""
    for target in ({f"/{below}", f"{served.path}{below}", f"/{MARK}/{below}"}) - {"/", served.path}:
        assert_nothing_given(served.get(target), served)
    if served.path != "/":
        assert_nothing_given(served.get("/"), served)
        assert_nothing_given(served.get(served.path[:-1]), served)


@pytest.mark.parametrize("name", ["secret.txt", "run/link.txt", "run/run.json"])
def test_no_absolute_path(served: Served, name: str) -> None:
    path = str(served.place / name)
    port = served.port
    targets = [path, f"/{path}", f"file://{path}", f"//127.0.0.1:{port}{path}", f"http://127.0.0.1:{port}{path}"]
    for target in [*targets, path.lstrip("/"), path.replace("/", "%2f"), path.replace("/", "\\")]:
        assert_nothing_given(served.get(target), served)


METHODS = "POST PUT DELETE PATCH OPTIONS TRACE CONNECT PROPFIND get Get __init__ do_GET <script> GET\0"


@pytest.mark.parametrize("method", METHODS.split(), ids=ascii)
def test_no_other_method(served: Served, method: str) -> None:
    for target in ("/", served.path, f"/{MARK}"):
        lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Content-Length: 4", "", MARK]
        answer = served.answer("\r\n".join(lines).encode())
        assert answer.startswith(b"HTTP/1.0 405 Method Not Allowed\r\n")
        assert b"\r\nAllow: GET, HEAD\r\n" in answer
        assert_nothing_given(answer, served)


HEADERS_WITHOUT_END = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"\r\n",
        b"\r\n\r\n",
        b"\x00\xff\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /\r\n\r\n",  # HTTP/0.9
        b"GET / \r\n\r\n",
        b"POST /\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1.1\r\n\r\n",
        b"GET / HTTP/-1.1\r\n\r\n",
        b"GET / HTTP/99999999999.1\r\n\r\n",
        b"GET / FTP/1.1\r\n\r\n",
        b"GET / x HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost",  # cut short
        b"GET / HTTP/1.1\r\nHost: localhost\r\n",
        b"GET " + b"a" * 70_000,
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        HEADERS_WITHOUT_END,
        b"GET /" + MARK.encode() + b"\r\nX-Injected: 1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + MARK.encode() + b"%0d%0aX-Injected:%201 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /\rX-Injected:\r1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=lambda request: ascii(request[:30]),
)
def test_what_is_hardly_http(served: Served, request_: bytes) -> None:
    assert_nothing_given(served.answer(request_), served)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost@evil.example", "[::1]", "127.1"],
)
def test_a_name_that_was_made_to_point_here(served: Served, host: str) -> None:
    """A page in somebody's browser comes by its own name and without the token."""
    answer = served.answer(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.0 421" if served.path == "/" else b"HTTP/1.0 404")
    assert_nothing_given(answer, served)


def test_one_request_a_connection(served: Served) -> None:
    """What is sent after it is never read as another."""
    one = f"GET {served.path} HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive\r\n"
    first = f"{one}Content-Length: 60\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = served.answer(f"{first}GET /{MARK} HTTP/1.1\r\nHost: localhost\r\n\r\n{one}\r\n".encode())
    assert answer.count(b"HTTP/1.0 ") == 1
    assert answer.startswith(b"HTTP/1.0 200 ")


def test_the_token_is_on_no_page_and_in_no_process(served: Served) -> None:
    """A page that is passed on lets nobody in, and nobody reads it from the list of processes."""
    page, token = served.get(served.path), served.path.strip("/")
    assert b"Referrer-Policy: no-referrer" in page
    arguments = Path(f"/proc/{served.process.pid}/cmdline")
    if token:
        assert token.encode() not in page
        assert not arguments.exists() or token.encode() not in arguments.read_bytes()


def test_what_goes_with_serve(tmp_path: Path) -> None:
    for option in (("--host", "0.0.0.0"), ("--port", "1")):
        refused(spinlm("report", "run", *option, cwd=tmp_path), "--host and --port go with --serve")
