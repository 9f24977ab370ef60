"""A model that judges, behind any OpenAI-compatible endpoint.

Whatever it has said is kept by the content of the request, so that an interrupted judging goes on without
asking again. The key comes from the environment and goes into the Authorization header, nowhere else.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from spinlm.errors import SHORTEST_SECRET, UserError, first_line
from spinlm.files import digest, read_json, sealed, unsealed, write_json
from spinlm.interruption import Interrupted
from spinlm.rundir import CorruptArtifact

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI
    from openai.types.chat import ChatCompletionUserMessageParam

SUITES = ("arena", "mt-bench")
"""The benchmarks that a judge decides."""

KEYS = ("SPINLM_JUDGE_KEY", "OPENAI_API_KEY")
"""The environment variables that may hold the judge's key, the first before the second."""

NO_KEY = "none"
"""Sent where there is no key: local servers want none, the client library wants one."""

TRIES = 6
"""Of a request, where the server doesn't answer, limits the rate or fails."""

READINGS = 3
"""Of a question, where no verdict can be read in what the judge says."""

LONGEST_WAIT = 300.0
"""Seconds that a server may ask to wait for; after more than that, somebody starts the command again."""

HELLO = "Reply with one word: ready"

LONGEST_QUOTE = 300
"""Characters of what a server says that are repeated in a message."""


@dataclass(frozen=True)
class JudgeSettings:
    """Who judges, and how it is asked.

    Attributes:
        url: The endpoint's, up to `/v1`.
        model: Its name there.
        concurrency: Requests under way at the same time.
        timeout: Seconds that one may take.
        max_tokens: Of what the judge says.
        back_off: Seconds before the second try of a request; it doubles with each.
    """

    url: str
    model: str
    concurrency: int = 8
    timeout: float = 120.0
    max_tokens: int = 2048
    back_off: float = 1.0


class _MayPassError(Exception):
    """The server doesn't answer, or not now; it may if it is asked again.

    Attributes:
        answered: Whether it answered anything at all.
        wait: Seconds that it asks to wait for; None where it doesn't say.
    """

    def __init__(self, trouble: str, answered: bool, wait: float | None = None) -> None:
        super().__init__(trouble)
        self.answered = answered
        self.wait = wait


class _RefusedError(Exception):
    """The server doesn't take this one request: it is too long for the model, or is filtered.

    Attributes:
        setting: The sampling setting that it doesn't take, where it names one.
    """

    def __init__(self, trouble: str, setting: str | None) -> None:
        super().__init__(trouble)
        self.setting = setting


class Judge:
    """Asks one model, and remembers what it said.

    Attributes:
        model: Its name.
        sampling: How it is asked, in the endpoint's own words; `check` settles it.
    """

    def __init__(self, settings: JudgeSettings, cache: Path, repair: bool = False) -> None:
        """Nothing is sent yet.

        Args:
            settings: Who, and how.
            cache: A directory to keep in what it says.
            repair: Ask again where what is kept isn't what was said.

        Raises:
            UserError: The client library isn't installed, or the URL or the key is none.
        """
        _check_url(settings.url)
        try:
            import openai  # noqa: F401
        except ImportError:
            raise UserError("a judge is asked by the openai library: pip install 'spinlm[eval]'") from None
        self._settings = settings
        self._cache = cache
        self._repair = repair
        self._key = _key_from_environment()
        self.model = settings.model
        self.sampling: dict[str, float] = {"temperature": 0.0, "max_tokens": settings.max_tokens}

    def check(self) -> None:
        """One request, before anything else is done: is it there, does it take the key, the model, the settings?

        Settings that a model doesn't take (some want no temperature, or have another name for the limit of
        tokens) are left out or renamed.

        Raises:
            UserError: It can't be reached, or doesn't take them.
        """

        async def ask(client: AsyncOpenAI) -> None:
            while True:
                try:
                    await self._said(client, HELLO, must_be_there=True)
                    return
                except _RefusedError as refusal:
                    self._do_without(refusal)

        self._run(ask)

    def ask(
        self, prompts: Sequence[str], is_readable: Callable[[str], bool], on_answer: Callable[[], None] = lambda: None
    ) -> list[str]:
        """What the judge says to each prompt; where it has given a verdict already, it isn't asked again.

        Where no verdict can be read, it is asked again a few times, and its last words are returned. Where its
        server refuses one prompt (too long, filtered), the refusal is returned in their place. Neither is kept:
        the next command asks again.

        Args:
            prompts: Each the one message of a conversation.
            is_readable: Whether there is a verdict in what it said.
            on_answer: Called after each prompt that was asked.

        Raises:
            UserError: It can't be reached any more. The verdicts until then are kept.
        """
        said = {prompt: kept for prompt in prompts if (kept := self._kept(prompt)) is not None}
        left = iter([prompt for prompt in dict.fromkeys(prompts) if prompt not in said])

        async def ask(client: AsyncOpenAI) -> None:
            async def work() -> None:
                for prompt in left:
                    said[prompt] = await self._answer(client, prompt, is_readable)
                    if is_readable(said[prompt]):
                        self._keep(prompt, said[prompt])
                    on_answer()

            await _together([work() for _ in range(self._settings.concurrency)])

        try:
            self._run(ask)
        except UserError as error:
            raise UserError(f"{error}. The verdicts until now are kept: the same command goes on from there") from None
        return [said[prompt] for prompt in prompts]

    def missing(self, prompts: Sequence[str]) -> int:
        """How many different prompts there is no verdict on yet."""
        return sum(self._kept(prompt) is None for prompt in dict.fromkeys(prompts))

    # --- its verdicts ---

    def _place(self, prompt: str) -> Path:
        name = digest([self.model, _messages(prompt), self.sampling])
        return self._cache / name[:2] / f"{name}.json"

    def _kept(self, prompt: str) -> str | None:
        """What was said; None where it was never asked.

        Raises:
            CorruptArtifact: What is kept isn't what was said.
        """
        place = self._place(prompt)
        try:
            return str(unsealed(read_json(place))["answer"])
        except FileNotFoundError:
            return None
        except ValueError:
            if self._repair:
                place.unlink()
                return None
            raise CorruptArtifact(
                f"{place}: not what the judge said. It is asked again by --repair, or where you delete the file"
            ) from None

    def _keep(self, prompt: str, answer: str) -> None:
        said = {"model": self.model, "sampling": self.sampling, "messages": _messages(prompt), "answer": answer}
        write_json(self._place(prompt), sealed(said))

    # --- asking ---

    def _run(self, work: Callable[[AsyncOpenAI], Coroutine[Any, Any, None]]) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        async def connected() -> None:
            task = asyncio.current_task()
            assert task is not None
            asking.append((asyncio.get_running_loop(), task))
            settings, stays = self._settings, DefaultAsyncHttpxClient(follow_redirects=False)
            async with AsyncOpenAI(
                api_key=self._key or NO_KEY,
                base_url=settings.url,
                timeout=settings.timeout,
                max_retries=0,
                http_client=stays,  # what is sent goes to this URL and nowhere else
            ) as client:
                client.organization = client.project = None  # which it would read from the environment, and send
                await work(client)

        asking: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = []
        with ThreadPoolExecutor(1) as thread:  # a notebook's own has an event loop already
            try:
                thread.submit(asyncio.run, connected()).result()
            except Interrupted:
                for loop, task in asking:
                    loop.call_soon_threadsafe(task.cancel)
                raise

    async def _answer(self, client: AsyncOpenAI, prompt: str, is_readable: Callable[[str], bool]) -> str:
        answer = ""
        for _ in range(READINGS):
            try:
                answer = await self._said(client, prompt)
            except _RefusedError as refusal:
                return f"(refused by the judge's server: {refusal})"
            if is_readable(answer):
                break
        return answer

    async def _said(self, client: AsyncOpenAI, prompt: str, must_be_there: bool = False) -> str:
        """One answer, tried for with more and more time in between."""
        tries, wait = 1, self._settings.back_off
        while True:
            try:
                return await self._request(client, prompt)
            except _MayPassError as trouble:
                is_gone = must_be_there and not trouble.answered
                if is_gone or tries == TRIES or (trouble.wait or 0) > LONGEST_WAIT:
                    raise self._failure(str(trouble)) from None
                await asyncio.sleep(wait * random.uniform(0.5, 1) if trouble.wait is None else trouble.wait)
            tries, wait = tries + 1, wait * 2

    async def _request(self, client: AsyncOpenAI, prompt: str) -> str:
        """One request, whatever comes of it."""
        import openai

        limit, sampling = self._settings.timeout, dict[str, Any](self.sampling)
        try:
            async with asyncio.timeout(limit):
                completion = await client.chat.completions.create(
                    model=self.model, messages=_messages(prompt), **sampling
                )
            return self._safe(_text(completion.choices[0].message.content))
        except (TimeoutError, openai.APITimeoutError):
            raise _MayPassError(f"doesn't answer within {limit:g} s (--judge-timeout)", answered=False) from None
        except openai.APIConnectionError as error:
            raise _MayPassError(f"can't be reached: {self._words(error.__cause__ or error)}", answered=False) from None
        except openai.APIStatusError as error:
            raise self._trouble(error) from None
        except (openai.OpenAIError, ValueError, AttributeError, LookupError, TypeError, RecursionError):
            trouble = "answers, but not as an OpenAI-compatible server does: is the URL right, up to /v1?"
            raise _MayPassError(trouble, answered=True) from None

    def _trouble(self, error: APIStatusError) -> Exception:
        """What an answer other than 200 means."""
        status, body = error.status_code, error.body
        said = self._words(body["message"] if isinstance(body, dict) and "message" in body else error.message)
        if status in (400, 413, 422):
            return _RefusedError(said, error.param if isinstance(error.param, str) else None)
        if status in (408, 409, 425, 429) or status >= 500:
            return _MayPassError(
                f"answers {status}: {said}", answered=True, wait=_asked_to_wait(error.response.headers)
            )
        if status in (401, 403):
            holder = next((name for name in KEYS if os.environ.get(name)), None)
            which = f"the key in {holder}" if holder else f"requests without a key (set {KEYS[0]})"
            return self._failure(f"doesn't take {which}: {said}")
        if status == 404:
            return self._failure(f"isn't there (is the model's name right, and the URL up to /v1?): {said}")
        return self._failure(f"answers {status}: {said}")

    def _do_without(self, refusal: _RefusedError) -> None:
        """Leave out the setting that the server refuses, or call it by its other name."""
        if refusal.setting is None or refusal.setting not in self.sampling:
            raise self._failure(f"refuses a request: {refusal}") from None
        value = self.sampling.pop(refusal.setting)
        if refusal.setting == "max_tokens":
            self.sampling["max_completion_tokens"] = value

    def _failure(self, trouble: str) -> UserError:
        return UserError(f"the judge {self.model} at {self._settings.url} {trouble}")

    def _words(self, said: object) -> str:
        """A line of what a server or a library says."""
        return self._safe(first_line(Exception(said)))[:LONGEST_QUOTE]

    def _safe(self, text: str) -> str:
        """What a server sends carries no key into a file or a message, and no lone surrogate, which is no text."""
        text = text.encode(errors="replace").decode()
        return text.replace(self._key, "[key]") if len(self._key) >= SHORTEST_SECRET else text


def _check_url(url: str) -> None:
    """An endpoint's, and nothing secret: who lists the processes of a machine sees a command's options.

    Raises:
        UserError: It isn't, or there is a name, a password or a key in it, which isn't repeated.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            "--judge-url: holds a name, a password or a query, which others on this machine can see: give the URL up "
            f"to /v1, and the key in the environment ({KEYS[0]})"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--judge-url: {url}: give it as http://HOST:PORT/v1 or https://…")


def _text(content: object) -> str:
    """What a message says; raises TypeError where that is no text."""
    if content is None:
        return ""
    if not isinstance(content, str):
        raise TypeError
    return content


def _messages(prompt: str) -> list[ChatCompletionUserMessageParam]:
    return [{"role": "user", "content": prompt}]


def _key_from_environment() -> str:
    """The key, or nothing."""
    for name in KEYS:
        if key := os.environ.get(name, "").strip():
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise UserError(f"{name}: holds characters that no key has")
            return key
    return ""


def _asked_to_wait(headers: Mapping[str, str]) -> float | None:
    """The seconds in Retry-After, which may also name a time."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


async def _together(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """All of them at once; where one fails, the others end too."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
