"""The client of a judge, against a real server on loopback that does what servers do."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path

import pytest

import judge_server
from judge_server import HANG, HANG_UP, Fault, JudgeServer, error
from spinlm.errors import UserError
from spinlm.evaluation import judge as judge_module
from spinlm.evaluation.judge import READINGS, TRIES, Judge, JudgeSettings
from spinlm.evaluation.verdicts import read_preference
from spinlm.rundir import CorruptArtifact

KEY = "sk-secret-0123456789"
PROMPTS = [f"question {number}" for number in range(6)]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPINLM_JUDGE_KEY", KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def judge_of(
    server: JudgeServer, cache: Path, concurrency: int = 2, timeout: float = 30.0, repair: bool = False
) -> Judge:
    return Judge(JudgeSettings(server.url, "some/judge", concurrency, timeout, back_off=0.001), cache, repair)


def is_readable(text: str) -> bool:
    return read_preference(text) is not None


def agree(prompt: str) -> str:
    """A verdict that depends on the prompt."""
    return f"{prompt}\nVerdict: {'A' if int(prompt.split()[-1]) % 2 else 'B'}"


EXPECTED = [agree(prompt) for prompt in PROMPTS]


def _saying(content: object) -> Fault:
    """An answer whose content is this, whatever it is."""
    answer = json.loads(judge_server.completion(""))
    answer["choices"][0]["message"]["content"] = content
    return Fault(body=json.dumps(answer))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*.json")}


class TestAsking:
    def test_what_is_sent(self, tmp_path: Path) -> None:
        with JudgeServer(agree) as server:
            assert judge_of(server, tmp_path).ask(["question 1"], is_readable) == ["question 1\nVerdict: A"]
        assert server.requests == [
            {
                "model": "some/judge",
                "messages": [{"role": "user", "content": "question 1"}],
                "temperature": 0.0,
                "max_tokens": 2048,
            }
        ]
        assert server.authorization == [f"Bearer {KEY}"]

    def test_each_prompt_is_asked_once_and_never_again(self, tmp_path: Path) -> None:
        with JudgeServer(agree) as server:
            answered = []
            judge = judge_of(server, tmp_path)
            assert judge.missing([*PROMPTS, *PROMPTS]) == 6
            assert judge.ask([*PROMPTS, *PROMPTS], is_readable, lambda: answered.append(1)) == [*EXPECTED, *EXPECTED]
            assert (len(server.requests), len(answered)) == (6, 6)
            again = judge_of(server, tmp_path)
            assert again.missing(PROMPTS) == 0
            assert again.ask(PROMPTS[::-1], is_readable) == EXPECTED[::-1]
            assert len(server.requests) == 6

    @pytest.mark.parametrize("concurrency", [1, 3])
    def test_no_more_at_once_than_allowed(self, tmp_path: Path, concurrency: int) -> None:
        """The server answers nobody before as many have come as may."""
        with JudgeServer(agree) as server:
            server.together = threading.Barrier(concurrency)
            assert judge_of(server, tmp_path, concurrency).ask(PROMPTS, is_readable) == EXPECTED
        assert server.most_at_once == concurrency

    def test_what_is_kept_doesnt_depend_on_how_many_are_asked_at_once(self, tmp_path: Path) -> None:
        with JudgeServer(agree) as server:
            for concurrency in (1, 5):
                judge_of(server, tmp_path / str(concurrency), concurrency).ask(PROMPTS, is_readable)
        assert contents(tmp_path / "1") == contents(tmp_path / "5")
        assert len(contents(tmp_path / "1")) == 6

    @pytest.mark.parametrize(
        "other", [{"model": "another"}, {"max_tokens": 10}], ids=["another judge", "another setting"]
    )
    def test_another_judge_is_asked_anew(self, tmp_path: Path, other: dict[str, str | int]) -> None:
        with JudgeServer(agree) as server:
            judge_of(server, tmp_path).ask(PROMPTS, is_readable)
            settings = {"url": server.url, "model": "some/judge", **other}
            Judge(JudgeSettings(**settings), tmp_path).ask(PROMPTS, is_readable)  # type: ignore[arg-type]
        assert len(server.requests) == 12

    @pytest.mark.parametrize(
        "damage", [lambda text: text[:20], lambda _: "[]", lambda text: text.replace(": B", ": A")]
    )
    def test_a_verdict_that_is_another_by_now_is_named(self, tmp_path: Path, damage: Callable[[str], str]) -> None:
        """And asked for anew where that is wanted."""
        with JudgeServer(agree) as server:
            judge_of(server, tmp_path).ask(PROMPTS, is_readable)
            damaged = max(tmp_path.rglob("*.json"), key=lambda path: ": B" in path.read_text())
            damaged.write_text(damage(damaged.read_text()))
            with pytest.raises(CorruptArtifact, match=f"{damaged.name}: not what the judge said.*--repair"):
                judge_of(server, tmp_path).ask(PROMPTS, is_readable)
            assert judge_of(server, tmp_path, repair=True).ask(PROMPTS, is_readable) == EXPECTED
            assert judge_of(server, tmp_path).ask(PROMPTS, is_readable) == EXPECTED
        assert len(server.requests) == 7


class TestTrouble:
    """Faults that pass: the same verdicts come of it, and each request is made once more."""

    @pytest.mark.parametrize(
        "faults",
        [
            [error(429, "slow down", Retry_After="0")] * 3,
            [error(429, "slow down", Retry_After=formatdate(0, usegmt=True))],
            [error(429, "slow down", Retry_After="soon")],
            [error(429, "slow down")] * 2,
            [error(500, "oops"), error(503, "loading"), error(408, "too slow"), Fault(502, "<html>")],
            [HANG_UP] * 2,
            [judge_server.GARBAGE, judge_server.A_WEB_PAGE, judge_server.OTHER_JSON, judge_server.NO_CHOICES],
            [Fault(body="")],
            [error(500, "oops")] * (TRIES - 1),
        ],
        ids=lambda faults: f"{len(faults)} of {faults[0] if isinstance(faults[0], str) else faults[0].status}",
    )
    def test_it_passes(self, tmp_path: Path, faults: list[Fault | str]) -> None:
        with JudgeServer(agree, faults) as server:
            assert judge_of(server, tmp_path).ask(PROMPTS, is_readable) == EXPECTED
        assert len(server.requests) == 6 + len(faults)

    def test_a_request_that_takes_too_long_is_made_again(self, tmp_path: Path) -> None:
        with JudgeServer(agree, [HANG]) as server:
            assert judge_of(server, tmp_path, timeout=1.0).ask(PROMPTS[:2], is_readable) == EXPECTED[:2]
        assert len(server.requests) == 3

    def test_the_server_says_how_long_to_wait(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        waited: list[float] = []

        async def wait(seconds: float) -> None:
            waited.append(seconds)

        monkeypatch.setattr(judge_module.asyncio, "sleep", wait)
        with JudgeServer(agree, [error(429, "slow down", Retry_After="17"), *[error(500, "oops")] * 3]) as server:
            settings = JudgeSettings(server.url, "some/judge", concurrency=1, back_off=8.0)
            Judge(settings, tmp_path).ask(PROMPTS[:1], is_readable)
        assert waited[0] == 17.0
        for seconds, longest in zip(waited[1:], (16.0, 32.0, 64.0), strict=True):  # doubled by each try
            assert longest / 2 <= seconds <= longest

    def test_a_wait_of_hours_is_not_waited_for(self, tmp_path: Path) -> None:
        with (
            JudgeServer(agree, [error(429, "come back tomorrow", Retry_After="7200")]) as server,
            pytest.raises(UserError, match="answers 429: come back tomorrow"),
        ):
            judge_of(server, tmp_path, concurrency=1).ask(PROMPTS, is_readable)

    @pytest.mark.parametrize(
        ("fault", "words"),
        [
            (HANG_UP, "can't be reached"),
            (error(500, "out of memory"), "answers 500: out of memory"),
            (error(429, "slow down", Retry_After="0"), "answers 429: slow down"),
            (judge_server.A_WEB_PAGE, "not as an OpenAI-compatible server does"),
        ],
    )
    def test_it_doesnt_pass(self, tmp_path: Path, fault: Fault | str, words: str) -> None:
        """What was judged until then is kept, and only the rest is asked for afterwards."""
        with JudgeServer(agree, [fault] * 100) as server:
            server.faults = []
            judge = judge_of(server, tmp_path, concurrency=1)
            judge.ask(PROMPTS[:2], is_readable)
            server.faults = [fault] * TRIES
            with pytest.raises(UserError, match=words) as raised:
                judge.ask(PROMPTS, is_readable)
            assert str(raised.value).startswith(f"the judge some/judge at {server.url} ")
            assert "The verdicts until now are kept: the same command goes on from there" in str(raised.value)
            assert len(server.requests) == 2 + TRIES
            assert judge.ask(PROMPTS, is_readable) == EXPECTED
            assert len(server.requests) == 2 + TRIES + 4

    def test_it_goes_away(self, tmp_path: Path) -> None:
        served = 0

        def leave(prompt: str) -> str:
            nonlocal served
            served += 1
            if served == 3:
                server.faults = [HANG_UP] * 100
            return agree(prompt)

        with JudgeServer(leave) as server, pytest.raises(UserError, match="can't be reached"):
            judge_of(server, tmp_path, concurrency=1).ask(PROMPTS, is_readable)
        assert len(contents(tmp_path)) == 3
        with JudgeServer(agree) as server:
            assert judge_of(server, tmp_path, concurrency=1).ask(PROMPTS, is_readable) == EXPECTED
        assert [body["messages"][0]["content"] for body in server.requests] == PROMPTS[3:]


class TestNoVerdict:
    def test_it_is_asked_again_a_few_times(self, tmp_path: Path) -> None:
        replies = iter(["Hm.", "Verdict: perhaps A", "Well.\nVerdict: B"])
        with JudgeServer(lambda _: next(replies)) as server:
            assert judge_of(server, tmp_path).ask(["question"], is_readable) == ["Well.\nVerdict: B"]
        assert READINGS == 3

    def test_its_last_words_are_returned_and_not_kept(self, tmp_path: Path) -> None:
        with JudgeServer(lambda _: "I can't say.") as server:
            judge = judge_of(server, tmp_path)
            assert judge.ask(["question"], is_readable) == ["I can't say."]
            assert (len(server.requests), contents(tmp_path)) == (READINGS, {})
            assert judge.missing(["question"]) == 1

    @pytest.mark.parametrize("status", [400, 413, 422])
    def test_a_prompt_that_the_server_refuses(self, tmp_path: Path, status: int) -> None:
        with JudgeServer(agree, [error(status, "too many tokens")]) as server:
            first, *others = judge_of(server, tmp_path, concurrency=1).ask(PROMPTS, is_readable)
        assert first == "(refused by the judge's server: too many tokens)"
        assert others == EXPECTED[1:]
        assert len(server.requests) == 6

    def test_an_answer_without_content(self, tmp_path: Path) -> None:
        with JudgeServer(agree, [_saying(None)] * READINGS) as server:
            assert judge_of(server, tmp_path).ask(["question 0"], is_readable) == [""]

    def test_an_answer_that_is_not_quite_text(self, tmp_path: Path) -> None:
        """It is kept, as it can be."""
        with JudgeServer(agree, [_saying(f"\ud800 {EXPECTED[0]}")]) as server:
            for _ in range(2):
                assert judge_of(server, tmp_path).ask(["question 0"], is_readable) == [f"? {EXPECTED[0]}"]
        assert len(server.requests) == 1


class TestIsItThere:
    def test_one_request(self, tmp_path: Path) -> None:
        with JudgeServer(agree) as server:
            judge_of(server, tmp_path).check()
        assert (len(server.hellos), server.requests, contents(tmp_path)) == (1, [], {})

    @pytest.fixture
    def no_patience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever waits for another try fails."""

        async def wait(_: float) -> None:
            raise AssertionError("it waits")

        monkeypatch.setattr(judge_module.asyncio, "sleep", wait)

    @pytest.mark.usefixtures("no_patience")
    def test_nobody_listens(self, tmp_path: Path) -> None:
        """It is found out at once: no time is given to a server that isn't there."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
            settings = JudgeSettings(url, "some/judge")
            with pytest.raises(UserError, match=f"the judge some/judge at {re.escape(url)} can't be reached"):
                Judge(settings, tmp_path).check()

    @pytest.mark.usefixtures("no_patience")
    def test_it_hangs(self, tmp_path: Path) -> None:
        with JudgeServer(agree, hello=HANG) as server:
            settings = JudgeSettings(server.url, "some/judge", timeout=0.2)
            with pytest.raises(UserError, match=re.escape("doesn't answer within 0.2 s (--judge-timeout)")):
                Judge(settings, tmp_path).check()

    @pytest.mark.parametrize(
        ("hello", "words"),
        [
            (error(401, "who are you?"), "doesn't take the key in SPINLM_JUDGE_KEY: who are you?"),
            (error(403, "not you"), "doesn't take the key in SPINLM_JUDGE_KEY: not you"),
            (error(404, "no such model"), "isn't there (is the model's name right, and the URL up to /v1?): no such"),
            (error(402, "pay first"), "answers 402: pay first"),
            (error(400, "no judging today"), "refuses a request: no judging today"),
            (error(400, "what is top_p?", "top_p"), "refuses a request: what is top_p?"),
            (error(400, "what is this?", ["temperature"]), "refuses a request: what is this?"),
            (_saying(5), "answers, but not as an OpenAI-compatible server does: is the URL right"),
            (_saying(["Verdict: A"]), "answers, but not as an OpenAI-compatible server does: is the URL right"),
            (Fault(body="[" * 100_000 + "]" * 100_000), "answers, but not as an OpenAI-compatible server does"),
            (Fault(body='{"choices": {"a": 1}}'), "answers, but not as an OpenAI-compatible server does"),
            (judge_server.A_WEB_PAGE, "answers, but not as an OpenAI-compatible server does: is the URL right"),
            (error(503, "loading"), "answers 503: loading"),
        ],
    )
    def test_it_says_what_is_wrong(self, tmp_path: Path, hello: Fault, words: str) -> None:
        with JudgeServer(agree, hello=hello) as server:
            with pytest.raises(UserError) as raised:
                judge_of(server, tmp_path).check()
            assert words in str(raised.value)
            assert len(server.hellos) == (TRIES if hello.status in (200, 503) else 1)

    def test_without_a_key(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SPINLM_JUDGE_KEY")
        with (
            JudgeServer(agree, hello=error(401, "who are you?")) as server,
            pytest.raises(UserError, match=re.escape("doesn't take requests without a key (set SPINLM_JUDGE_KEY)")),
        ):
            judge_of(server, tmp_path).check()

    def test_settings_that_a_model_doesnt_take(self, tmp_path: Path) -> None:
        """Some want no temperature, and call the limit of tokens otherwise."""

        class Picky(JudgeServer):
            def _outcome(self, path, body, authorization):  # type: ignore[no-untyped-def]
                for name in ("max_tokens", "temperature"):
                    if name in body:
                        super()._outcome(path, body, authorization)
                        return error(400, f"Unsupported parameter: {name}", name)
                return super()._outcome(path, body, authorization)

        with Picky(agree) as server:
            judge = judge_of(server, tmp_path)
            judge.check()
            assert judge.sampling == {"max_completion_tokens": 2048}
            assert judge.ask(PROMPTS, is_readable) == EXPECTED
        assert (len(server.hellos), len(server.requests)) == (3, 6)
        assert {key for body in server.requests for key in body} == {"model", "messages", "max_completion_tokens"}

    def test_the_library_isnt_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openai", None)
        with pytest.raises(UserError, match=re.escape("pip install 'spinlm[eval]'")):
            Judge(JudgeSettings("http://localhost/v1", "judge"), tmp_path)

    @pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "judge", "http://[/v1"])
    def test_a_url_that_is_none(self, tmp_path: Path, url: str) -> None:
        with pytest.raises(UserError, match=re.escape(f"--judge-url: {url}: give it as http://HOST:PORT/v1")):
            Judge(JudgeSettings(url, "judge"), tmp_path)


class TestTheKey:
    @pytest.mark.parametrize(
        ("environment", "sent"),
        [
            ({"SPINLM_JUDGE_KEY": "one", "OPENAI_API_KEY": "other"}, "Bearer one"),
            ({"OPENAI_API_KEY": " other\n"}, "Bearer other"),
            ({"SPINLM_JUDGE_KEY": ""}, "Bearer none"),
        ],
    )
    def test_where_it_is_from(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], sent: str
    ) -> None:
        monkeypatch.delenv("SPINLM_JUDGE_KEY")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with JudgeServer(agree) as server:
            judge_of(server, tmp_path).check()
        assert server.authorization == [sent]

    @pytest.mark.parametrize("key", ["two words of it", "kéy-0123456789", "a\tb-0123456789"])
    def test_one_that_cant_be_sent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
        monkeypatch.setenv("SPINLM_JUDGE_KEY", key)
        with pytest.raises(UserError, match="SPINLM_JUDGE_KEY: holds characters that no key has") as raised:
            Judge(JudgeSettings("http://localhost/v1", "judge"), tmp_path)
        assert key not in str(raised.value)

    def test_a_server_that_sends_it_back(self, tmp_path: Path) -> None:
        """In its verdicts, its refusals or its errors: it is in no file and in no message."""
        with JudgeServer(lambda _: f"Thank you for {KEY}.\nVerdict: A") as server:
            judge = judge_of(server, tmp_path, concurrency=1)
            assert judge.ask(["1"], is_readable) == ["Thank you for [key].\nVerdict: A"]
            server.faults = [error(400, f"not with {KEY}")]
            assert judge.ask(["2"], is_readable) == ["(refused by the judge's server: not with [key])"]
            server.faults = [error(500, f"Bearer {KEY} failed")] * TRIES
            with pytest.raises(UserError, match=re.escape("answers 500: Bearer [key] failed")):
                judge.ask(["3"], is_readable)
            server.hello = error(401, f"Incorrect API key provided: {KEY}")
            with pytest.raises(UserError, match=re.escape("Incorrect API key provided: [key]")):
                judge.check()
        assert len(contents(tmp_path)) == 1
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]

    @pytest.mark.parametrize(
        "url", ["http://me:hunter22@{}", "https://hunter22@{}", "http://{}?key=hunter22", "http://{}#hunter22"]
    )
    def test_not_in_the_url(self, tmp_path: Path, url: str) -> None:
        """Options are seen by all who list a machine's processes."""
        with JudgeServer(agree) as server, pytest.raises(UserError) as raised:
            Judge(JudgeSettings(url.format(server.url.removeprefix("http://")), "judge"), tmp_path)
        assert "the key in the environment (SPINLM_JUDGE_KEY)" in str(raised.value)
        assert "hunter22" not in str(raised.value)
        assert not server.authorization


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_it_is_not_sent_on(tmp_path: Path, status: int) -> None:
    """Neither the key nor the answers go where a server points to."""
    with JudgeServer(agree) as other, JudgeServer(agree) as server:
        server.hello = error(status, "moved", Location=f"{other.url}/chat/completions")
        with pytest.raises(UserError, match=f"answers {status}"):
            judge_of(server, tmp_path).check()
    assert not other.authorization


def test_who_pays_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client library would send what these variables hold to any server."""
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-secret")
    with JudgeServer(agree) as server:
        judge_of(server, tmp_path).ask(PROMPTS[:1], is_readable)
    assert "authorization" in server.headers
    assert not [name for name in server.headers if "organization" in name or "project" in name]


def test_in_a_notebook_whose_thread_runs_an_event_loop_already(tmp_path: Path) -> None:
    with JudgeServer(agree) as server:

        async def cell() -> list[str]:
            return judge_of(server, tmp_path).ask(PROMPTS[:1], is_readable)

        assert asyncio.run(cell()) == EXPECTED[:1]
