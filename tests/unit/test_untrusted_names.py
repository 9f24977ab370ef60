"""Names from files: as parts of paths they stay where they are put, and are short enough."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinlm import contestants
from spinlm.config import load_recipe
from spinlm.errors import LONGEST_MESSAGE, UserError
from spinlm.evaluation import suites

NAMES = [
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "\0",
    "a\nb",
    "x" * 5000,
    "é" * 300,
    "-",
    "~",
    "CON",
    " ",
]


@pytest.mark.parametrize("slug", [contestants.slug, suites.slug])
@given(name=st.text() | st.sampled_from(NAMES))
def test_a_slug_is_one_part_of_a_path(slug: object, name: str) -> None:
    assert callable(slug)
    part = slug(name)
    assert Path("place", part).parts == ("place", part)
    assert part not in ("", ".", "..")
    assert not {"/", "\0", "\\", "\n"} & set(part)
    assert len(part.encode()) <= 100


@pytest.mark.parametrize("name", NAMES)
def test_the_place_of_a_run_named_after_its_model(name: str) -> None:
    changes = ["data.source=d.jsonl", f"model.name={name!r}"] if name.isprintable() else None
    if changes:
        assert Path(load_recipe(None, changes).run_dir).parent == Path("runs")


def test_what_a_message_quotes_is_harmless_and_short() -> None:
    message = str(UserError("a\x1b[2Jb\ud800\u202ec\nd\te é 漢 " + "x" * 100_000 + "END"))
    assert message.startswith("a\\x1b[2Jb\\ud800\\u202ec\nd\te é 漢 x")
    assert message.endswith("xEND")
    assert len(message) < LONGEST_MESSAGE + 100
    message.encode()
