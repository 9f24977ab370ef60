"""The server: one page, on the loopback address, to GET and HEAD, and to nothing else."""

from __future__ import annotations

import http.client
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from made_run import Made, MadeExample, MadeRun
from spinlm.errors import UserError
from spinlm.reporting import server as server_module
from spinlm.reporting.server import LatestPage, ReportServer
from spinlm.rundir import RunDir


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run").data([MadeExample("a", "the question")])


@contextmanager
def serving(made: MadeRun, host: str) -> Iterator[ReportServer]:
    with ReportServer(made.run, host, 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def server(made: MadeRun) -> Iterator[ReportServer]:
    with serving(made, "127.0.0.1") as server:
        yield server


@pytest.fixture
def elsewhere(made: MadeRun) -> Iterator[ReportServer]:
    """One that others can reach."""
    with serving(made, "0.0.0.0") as server:
        yield server


def ask(server: ReportServer, method: str, path: str, host: str | None = None) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, path, headers={"Host": host} if host else {})
    response = connection.getresponse()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read().decode()


def test_the_page_and_its_headers(server: ReportServer) -> None:
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


def test_head(server: ReportServer) -> None:
    status, headers, body = ask(server, "HEAD", "/")
    assert (status, body) == (200, "")
    assert int(headers["content-length"]) > 500_000


@pytest.mark.parametrize("host", ["localhost:1234", "127.0.0.1:1234", "127.0.0.1", "localhost"])
def test_a_tunnel_may_end_at_another_port(server: ReportServer, host: str) -> None:
    assert ask(server, "GET", "/", host)[0] == 200


def test_only_on_the_loopback_address(server: ReportServer) -> None:
    port = server.port
    assert server.server_address == ("127.0.0.1", port)
    assert server.address == f"http://127.0.0.1:{port}/"
    assert server.tunnel == f"ssh -N -L {port}:127.0.0.1:{port} {socket.gethostname()}"


def test_the_page_follows_the_run(made: MadeRun, server: ReportServer) -> None:
    assert "iteration-0" not in ask(server, "GET", "/")[2].partition("<main")[2].partition("<table>")[0]
    made.player("base", [Made(right=False)]).player("iteration-0", [Made(right=True)])
    assert "iteration-0 is better than base" in ask(server, "GET", "/")[2].replace("iteration\u2011", "iteration-")


def test_it_is_made_anew_only_when_the_run_has_changed(made: MadeRun) -> None:
    latest = LatestPage(made.run)
    first = latest.get()
    assert latest.get() is first
    made.took("data", 3.0)
    assert latest.get() is not first


def test_what_has_changed_doesnt_depend_on_times(made: MadeRun) -> None:
    """Another content of the same size at the same time is another state; another time is none."""
    made.took("data", 3.0)
    latest, timings = LatestPage(made.run), made.path / "timings.jsonl"
    first, before = latest.get(), timings.stat()
    for path in made.path.rglob("*"):
        os.utime(path, (0, 0))
    assert latest.get() is first
    timings.write_text(timings.read_text().replace("3.0", "4.0"))
    os.utime(timings, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert timings.stat().st_size == before.st_size
    assert latest.get() is not first


def test_nothing_is_written(made: MadeRun, server: ReportServer) -> None:
    ask(server, "GET", "/")
    assert not (made.path / "report.html").exists()


def test_a_run_that_breaks_while_it_is_served(
    made: MadeRun, server: ReportServer, capfd: pytest.CaptureFixture[str]
) -> None:
    made.took("data", 3.0)
    (made.path / "data/held_out.jsonl").write_text("{")
    status, headers, body = ask(server, "GET", "/")
    assert status == 500
    assert headers["content-type"] == "text/plain; charset=utf-8"
    assert "data/held_out.jsonl: not what was committed" in body
    assert capfd.readouterr().err == body


def test_others_arent_told_why(made: MadeRun, elsewhere: ReportServer, capfd: pytest.CaptureFixture[str]) -> None:
    made.took("data", 3.0)
    (made.path / "data/held_out.jsonl").write_text("{")
    status, _, body = ask(elsewhere, "GET", elsewhere.path)
    assert (status, body) == (500, "The page can't be made now; the terminal that it is served from says why.\n")
    assert f"{made.path}/data/held_out.jsonl: not what was committed" in capfd.readouterr().err


def test_whatever_goes_wrong_is_an_answer_and_a_line(
    made: MadeRun, server: ReportServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """Then the next request is answered as if nothing had been."""
    (made.path / "timings.jsonl").mkdir()
    status, headers, body = ask(server, "GET", "/")
    assert (status, headers["content-type"]) == (500, "text/plain; charset=utf-8")
    assert body.startswith("the page can't be made: IsADirectoryError: ")
    assert capfd.readouterr().err == body
    (made.path / "timings.jsonl").rmdir()
    assert ask(server, "GET", "/")[0] == 200


class TestElsewhere:
    def test_only_who_has_the_token(self, elsewhere: ReportServer) -> None:
        assert re.fullmatch(r"/[\w-]{43}/", elsewhere.path)
        assert ask(elsewhere, "GET", elsewhere.path)[0] == 200
        unknown = ask(elsewhere, "GET", "/unknown")
        for path in ("/", elsewhere.path[:-1], elsewhere.path[:-2] + "/", elsewhere.path.swapcase(), "/é"):
            status, headers, body = ask(elsewhere, "GET", quote(path))
            assert (status, body) == (404, "There is nothing here.\n") == (unknown[0], unknown[2])
            assert headers.keys() == unknown[1].keys()

    def test_each_start_has_its_own(self, made: MadeRun) -> None:
        with ReportServer(made.run, "0.0.0.0", 0) as one, ReportServer(made.run, "0.0.0.0", 0) as other:
            assert one.path != other.path

    def test_whatever_name_it_is_asked_by(self, elsewhere: ReportServer) -> None:
        """It can't know them all; a name that was made to point here comes without the token."""
        assert ask(elsewhere, "GET", elsewhere.path, "machine.example:8765")[0] == 200
        assert ask(elsewhere, "GET", "/", "evil.example")[0] == 404

    def test_no_address_of_all_is_printed(self, elsewhere: ReportServer) -> None:
        assert elsewhere.address == f"http://{socket.gethostname()}:{elsewhere.port}{elsewhere.path}"

    @pytest.mark.parametrize(("host", "path"), [("::1", r"/"), ("::", r"/[\w-]{43}/"), ("127.0.0.2", r"/")])
    def test_other_addresses(self, made: MadeRun, host: str, path: str) -> None:
        try:
            with ReportServer(made.run, host, 0) as server:
                assert re.fullmatch(path, server.path)
                if host == "::1":
                    assert server.address == f"http://[::1]:{server.port}/"
                    assert server.is_named(f"[::1]:{server.port}")
                    assert not server.is_named("evil.example")
        except UserError as error:
            pytest.skip(str(error))

    def test_none_of_ours(self, made: MadeRun) -> None:
        with pytest.raises(UserError, match=r"--host 192\.0\.2\.1 --port 0: can't be listened at"):
            ReportServer(made.run, "192.0.2.1", 0)


class TestPatience:
    """A client that dawdles, and clients in crowds."""

    @pytest.fixture
    def ended(self, server: ReportServer, monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
        """Can be had once for each connection that the server is done with."""
        ended, end = threading.Semaphore(0), server.shutdown_request

        def shutdown_request(request: socket.socket) -> None:
            end(request)
            ended.release()

        monkeypatch.setattr(server, "shutdown_request", shutdown_request)
        return ended

    def connect(self, server: ReportServer) -> socket.socket:
        client = socket.socket()
        client.settimeout(20)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        return client

    def test_a_request_that_never_ends(self, server: ReportServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server_module, "SECONDS_TO_ASK", 0.05)
        with self.connect(server) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
            assert client.recv(1) == b""

    def test_an_answer_that_nobody_takes(
        self,
        server: ReportServer,
        monkeypatch: pytest.MonkeyPatch,
        ended: threading.Semaphore,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """It is dropped, though the client is still there."""
        monkeypatch.setattr(server_module, "SECONDS_TO_ANSWER", 0.05)
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with self.connect(server) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(1) == b"H"
            assert ended.acquire(timeout=20)
            rest = b"".join(iter(lambda: client.recv(65536), b""))
            assert b"the question" not in rest
        assert capfd.readouterr().err == ""

    def test_more_than_there_is_room_for(
        self, server: ReportServer, monkeypatch: pytest.MonkeyPatch, ended: threading.Semaphore
    ) -> None:
        monkeypatch.setattr(server_module, "MOST_AT_ONCE", 3)
        waiting = [self.connect(server) for _ in range(3)]
        with self.connect(server) as one_more:
            assert one_more.recv(1) == b""
        for client in waiting:
            client.close()
        assert all(ended.acquire(timeout=20) for _ in range(4))
        assert ask(server, "GET", "/")[0] == 200


def test_a_port_that_is_taken(made: MadeRun, server: ReportServer) -> None:
    with pytest.raises(UserError, match=rf"--port {server.port}: can't be listened at"):
        ReportServer(made.run, port=server.port)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        ReportServer(RunDir(tmp_path), port=0)
