"""The server: one page, on the loopback address, to GET and HEAD, and to nothing else."""

from __future__ import annotations

import http.client
import re
import socket
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from made_run import Made, MadeExample, MadeRun
from spinlm.errors import UserError
from spinlm.reporting.server import LatestPage, address, make_server, tunnel
from spinlm.rundir import RunDir


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run").data([MadeExample("a", "the question")])


@pytest.fixture
def server(made: MadeRun) -> Iterator[ThreadingHTTPServer]:
    with make_server(made.run, 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: ThreadingHTTPServer, method: str, path: str, host: str | None = None
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers={"Host": host} if host else {})
    response = connection.getresponse()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read().decode()


def raw(server: ThreadingHTTPServer, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_the_page_and_its_headers(server: ThreadingHTTPServer) -> None:
    status, headers, body = ask(server, "GET", "/")
    assert status == 200
    assert "the question" in body
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    in_the_page = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', body)
    assert in_the_page is not None
    assert headers["content-security-policy"] == in_the_page[1].replace("&#39;", "'") + "; frame-ancestors 'none'"
    assert "python" not in headers["server"].lower()


def test_head(server: ThreadingHTTPServer) -> None:
    status, headers, body = ask(server, "HEAD", "/")
    assert (status, body) == (200, "")
    assert int(headers["content-length"]) > 500_000


@pytest.mark.parametrize(
    "path",
    [
        "/run.json",
        "/report.html",
        "/data/held_out.jsonl",
        "/../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "//etc/passwd",
        "/./",
        "/?x=1",
        "http://127.0.0.1/",
        "/%00",
    ],
)
def test_there_is_nothing_else(server: ThreadingHTTPServer, path: str) -> None:
    status, headers, body = ask(server, "GET", path)
    assert (status, body) == (404, "There is only one page: /\n")
    assert headers["content-type"] == "text/plain; charset=utf-8"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "<script>"])
def test_no_other_method(server: ThreadingHTTPServer, method: str) -> None:
    status, headers, body = ask(server, method, "/")
    assert status == 501
    assert body == "Not Implemented: only GET and HEAD of / are answered\n"
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("request_line", [b"\x00\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET " + b"a" * 70_000])
def test_what_is_not_http(server: ThreadingHTTPServer, request_line: bytes) -> None:
    answer = raw(server, request_line)
    assert b"the question" not in answer
    assert b"<" not in answer
    assert ask(server, "GET", "/")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_name_that_was_made_to_point_here(server: ThreadingHTTPServer, host: str) -> None:
    answer = raw(server, f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.0 421")
    assert b"the question" not in answer


@pytest.mark.parametrize("host", ["localhost:1234", "127.0.0.1:1234", "127.0.0.1", "localhost"])
def test_a_tunnel_may_end_at_another_port(server: ThreadingHTTPServer, host: str) -> None:
    assert ask(server, "GET", "/", host)[0] == 200


def test_only_on_the_loopback_address(server: ThreadingHTTPServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert address(server) == f"http://127.0.0.1:{server.server_port}/"
    port = server.server_port
    assert tunnel(server) == f"ssh -N -L {port}:127.0.0.1:{port} {socket.gethostname()}"


def test_the_page_follows_the_run(made: MadeRun, server: ThreadingHTTPServer) -> None:
    assert "iteration-0" not in ask(server, "GET", "/")[2].partition("<main")[2].partition("<table>")[0]
    made.player("base", [Made(right=False)]).player("iteration-0", [Made(right=True)])
    assert "iteration-0 is better than base" in ask(server, "GET", "/")[2].replace("iteration\u2011", "iteration-")


def test_it_is_made_anew_only_when_the_run_has_changed(made: MadeRun) -> None:
    latest = LatestPage(made.run)
    first = latest.get()
    assert latest.get() is first
    made.took("data", 3.0)
    assert latest.get() is not first


def test_nothing_is_written(made: MadeRun, server: ThreadingHTTPServer) -> None:
    ask(server, "GET", "/")
    assert not (made.path / "report.html").exists()


def test_a_run_that_breaks_while_it_is_served(made: MadeRun, server: ThreadingHTTPServer) -> None:
    made.took("data", 3.0)
    (made.path / "data/held_out.jsonl").write_text("{")
    status, headers, body = ask(server, "GET", "/")
    assert status == 500
    assert headers["content-type"] == "text/plain; charset=utf-8"
    assert "data/held_out.jsonl: not what was committed" in body


def test_whatever_goes_wrong_is_an_answer_and_a_line(
    made: MadeRun, server: ThreadingHTTPServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """Then the next request is answered as if nothing had been."""
    (made.path / "timings.jsonl").mkdir()
    status, headers, body = ask(server, "GET", "/")
    assert (status, headers["content-type"]) == (500, "text/plain; charset=utf-8")
    assert body.startswith("the page can't be made: IsADirectoryError: ")
    assert capfd.readouterr().err == body
    (made.path / "timings.jsonl").rmdir()
    assert ask(server, "GET", "/")[0] == 200


def test_a_port_that_is_taken(made: MadeRun, server: ThreadingHTTPServer) -> None:
    with pytest.raises(UserError, match=rf"--port {server.server_port}: can't be listened at"):
        make_server(made.run, server.server_port)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        make_server(RunDir(tmp_path), 0)
