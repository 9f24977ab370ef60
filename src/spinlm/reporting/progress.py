"""Live progress: a bar on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 5.0
_SHOWN_METRICS = ("loss", "margin", "reward_accuracy", "start_loss")


@dataclass
class Task:
    """Something that is under way.

    Attributes:
        description: What.
        total: How many items it has.
        unit: What an item is.
    """

    description: str
    total: int
    unit: str
    show: Progress
    done: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    def advance(self, tokens: int = 0, items: int = 0) -> None:
        self.tokens += tokens
        self.done += items
        self.show.update(self)

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-6)

    @property
    def speed(self) -> str:
        """In tokens, where they are counted."""
        count, unit = (self.tokens, "tokens") if self.tokens else (self.done, self.unit)
        speed = count / self.seconds
        return f"{speed:.{0 if speed >= 10 else 1}f} {unit}/s"

    def line(self) -> str:
        """`iteration 0: generate 32/64 prompts, 85 tokens/s, 0:41 left`."""
        parts = [f"{self.description} {self.done}/{self.total} {self.unit}", self.speed]
        if 0 < self.done < self.total:
            left = int(self.seconds / self.done * (self.total - self.done))
            parts.append(f"{left // 60}:{left % 60:02d} left")
        return ", ".join(parts)


class Progress:
    """Shows tasks, one at a time; says nothing in the other processes of a distributed run."""

    def __init__(self, console: Console, speaks: bool = True) -> None:
        self.console = console
        self._speaks = speaks
        self._last_line = 0.0
        self._bar: Bar | None = None

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Task]:
        """Show a task while it runs, and a line about it when it is done."""
        task = Task(description, total, unit, self)
        self._last_line = time.monotonic()
        if self._speaks and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
            )
            with Bar(*columns, TimeRemainingColumn(), console=self.console, transient=True) as self._bar:
                self._bar.add_task(description, total=total, speed="")
                yield task
            self._bar = None
        else:
            yield task
        self.say(f"{task.line()}, {task.seconds:.0f} s")

    def update(self, task: Task) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=task.done, speed=task.speed)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(task.line())

    def training(self, description: str, step: int, steps: int, logs: dict[str, float]) -> None:
        """One line for a logging step."""
        metrics = [f"{name.replace('_', ' ')} {logs[name]:.3f}" for name in _SHOWN_METRICS if name in logs]
        if "tokens_per_second" in logs:
            metrics.append(f"{logs['tokens_per_second']:.0f} tokens/s")
        if metrics:
            self.say(f"{description} step {step}/{steps}: {', '.join(metrics)}")

    def say(self, message: str) -> None:
        if self._speaks:
            try:
                self.console.print(message, highlight=False, markup=False, soft_wrap=True)
            except (OSError, SystemExit):  # SystemExit is what rich makes of a pipe that is closed
                self._speaks = False  # nobody listens any more, which is no reason to stop
