"""A small server that speaks the OpenAI chat protocol on loopback: what a judge says, and what can go wrong."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from spinlm.evaluation.judge import HELLO

Say = Callable[[str], str]
"""What the judge says to a prompt."""

HANG, HANG_UP = "hang", "hang up"


@dataclass(frozen=True)
class Fault:
    """An answer that is none."""

    status: int = 200
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"


def error(status: int, message: str, param: object = None, **headers: str) -> Fault:
    """As OpenAI's endpoint says what is wrong."""
    body = json.dumps({"error": {"message": message, "param": param, "type": "error", "code": None}})
    return Fault(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


GARBAGE = Fault(body="{not JSON")
A_WEB_PAGE = Fault(body="<html>welcome</html>", content_type="text/html")
OTHER_JSON = Fault(body='{"hello": "world"}')
NO_CHOICES = Fault(body='{"id": "1", "object": "chat.completion", "choices": []}')


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has hung up in the midst of a request isn't worth a word; any other error is."""
        if not isinstance(sys.exc_info()[1], OSError | json.JSONDecodeError):
            super().handle_error(request, client_address)


class JudgeServer:
    """Use it as a context manager.

    Attributes:
        requests: The body of each request for a verdict, in the order in which they came.
        hellos: Those that only asked whether the judge is there.
        authorization: The header of each request.
        headers: The names of all headers that came.
        most_at_once: How many were under way at the same time.
    """

    def __init__(self, say: Say, faults: Iterable[Fault | str] = (), hello: Fault | str | None = None) -> None:
        """Answers on a free port once it is entered.

        Args:
            say: What the judge says.
            faults: What comes of the first requests for a verdict, instead.
            hello: What comes of asking whether it is there, instead.
        """
        self.say = say
        self.faults = list(faults)
        self.hello = hello
        self.requests: list[dict[str, Any]] = []
        self.hellos: list[dict[str, Any]] = []
        self.authorization: list[str | None] = []
        self.headers: set[str] = set()
        self.most_at_once = 0
        self.together: threading.Barrier | None = None
        self._at_once = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outcome = judge._outcome(self.path, body, self.headers)
                try:
                    self._send(outcome)
                finally:
                    judge._finished()

            def _send(self, outcome: Fault | str) -> None:
                if outcome == HANG:
                    judge._closing.wait(30)
                if outcome in (HANG, HANG_UP):
                    self.close_connection = True
                    return
                fault = outcome if isinstance(outcome, Fault) else Fault(body=completion(outcome))
                self.send_response(fault.status)
                for name, value in {**fault.headers, "Content-Type": fault.content_type}.items():
                    self.send_header(name, value)
                content = fault.body.encode()
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _outcome(self, path: str, body: dict[str, Any], headers: Message) -> Fault | str:
        prompt = body["messages"][0]["content"]
        with self._lock:
            self.authorization.append(headers.get("Authorization"))
            self.headers |= {name.lower() for name in headers}
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            (self.hellos if prompt == HELLO else self.requests).append(body)
            if path != "/v1/chat/completions":
                return error(404, "no such page")
            if prompt == HELLO:
                return self.hello or "ready"
            if self.faults:
                return self.faults.pop(0)
        if self.together is not None:
            self.together.wait(10)
        return self.say(prompt)

    def _finished(self) -> None:
        with self._lock:
            self._at_once -= 1


def completion(text: str) -> str:
    """A whole answer."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice], "usage": None}
    )


def pieces(prompt: str) -> dict[str, str]:
    """The material in a prompt: `request`, `A's answer`, …, to its text."""
    found = re.findall(r"\[begin ([^\]]*) ([0-9a-f]{8})\]\n(.*?)\n\[end \1 \2\]", prompt, re.DOTALL)
    return {name: text for name, _, text in found}


def by_merit(merit: Callable[[str], float]) -> Say:
    """A judge of pairs that prefers the answer of more merit, whatever the order."""

    def say(prompt: str) -> str:
        of = pieces(prompt)
        a, b = (merit("".join(text for name, text in of.items() if name.startswith(f"{who}'s"))) for who in "AB")
        return f"Both were read.\nVerdict: {'tie' if a == b else 'A' if a > b else 'B'}"

    return say
