"""What a line of progress says."""

import io
import time

from rich.console import Console

from spinlm.reporting.progress import Progress, Task


def test_speed_is_in_tokens_where_they_are_counted() -> None:
    progress = Progress(Console(file=io.StringIO()))
    task = Task("base: generate", 8, "prompts", progress, started=time.monotonic() - 100)
    task.advance(items=4)
    assert task.line() == "base: generate 4/8 prompts, 0.0 prompts/s, 1:40 left"
    task.advance(tokens=100_000)
    assert task.line() == "base: generate 4/8 prompts, 1000 tokens/s, 1:40 left"
