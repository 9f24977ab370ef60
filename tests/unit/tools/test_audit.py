"""The audit of pinned versions, with a database of its own on loopback; and that every dependency is pinned."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]


def pinned(name: str = "constraints.txt") -> dict[str, str]:
    """Names to versions."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): number for package, number in pins}


class Database(ThreadingHTTPServer):
    """Knows of these vulnerable versions, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self, vulnerable: set[tuple[str, str]]) -> None:
        self.vulnerable, self.asked = vulnerable, list[tuple[str, str]]()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/query"


class _Handler(BaseHTTPRequestHandler):
    server: Database

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = query["package"]["name"], query["version"]
        self.server.asked.append(asked)
        advisory = {"id": "TEST-1", "summary": "bad", "affected": [{"package": query["package"]}]}
        content = json.dumps({"vulns": [advisory]} if asked in self.server.vulnerable else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


EVERYBODY_KNOWS = ("jinja2", "2.11.2")


@pytest.fixture
def database() -> Iterator[Database]:
    with Database({EVERYBODY_KNOWS}) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def audit(url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/audit.py"), "--database", url]
    return subprocess.run(command, capture_output=True, text=True)


def test_all_pinned_versions_are_looked_up(database: Database) -> None:
    done = audit(database.url)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("No known vulnerabilities found") == 2
    asked = [*pinned().items(), *pinned("requirements-vllm.txt").items()]
    assert set(database.asked) == {EVERYBODY_KNOWS, *asked}


def test_a_vulnerable_one_fails(database: Database) -> None:
    """Also where it is in the first file, and the second is well."""
    database.vulnerable.add(("requests", pinned()["requests"]))
    done = audit(database.url)
    assert done.returncode != 0
    assert re.search(rf"requests +{re.escape(pinned()['requests'])} +TEST-1", done.stdout)


@pytest.mark.parametrize("what", ["nobody there", "knows of nothing"])
def test_without_a_database_it_is_skipped_aloud(database: Database, what: str) -> None:
    database.vulnerable.clear()
    url = database.url
    if what == "nobody there":
        database.server_close()
    done = audit(url)
    assert done.returncode == 0
    assert done.stdout.startswith(f"AUDIT SKIPPED: no version was looked up: {url}: ")
    assert len(database.asked) <= 1


def dependencies(package: str, extras: set[str], seen: dict[tuple[str, str], None]) -> None:
    """Adds all that a package needs here, by name and extra."""
    for line in requires(package) or ():
        needed = Requirement(line)
        marker = needed.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
            continue
        name = canonicalize_name(needed.name)
        new = {(name, extra) for extra in {"", *needed.extras}} - seen.keys()
        if new:
            seen.update(dict.fromkeys(new))
            dependencies(name, {"", *needed.extras}, seen)


def test_every_dependency_is_pinned() -> None:
    """What spinlm and its tests are installed with, and what that needs, all the way down.

    But for what installs them, and what a build of torch for GPUs brings, each of which names it exactly.
    """
    seen: dict[tuple[str, str], Any] = {}
    dependencies("spinlm", {"", "dev"}, seen)
    aside = ("spinlm", "setuptools", "pip", "nvidia-", "cuda-", "triton")
    names = {name for name, _ in seen if not (name in aside or name.startswith(aside[3:]))}
    assert len(names) > 100
    pins = pinned()
    assert sorted(names - pins.keys()) == []
    assert {name: version(name).partition("+")[0] for name in names} == {name: pins[name] for name in names}
