"""Dataset files of any bytes, and rows of anything under the usual names, up to tokenised examples."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from fuzz.cases import accepted_or_refused, cases
from spinlm.config import DataSection, PromptSection
from spinlm.contestants import slug
from spinlm.data.formats import PROMPT_AND_RESPONSE_COLUMNS, SYSTEM_COLUMNS, load_examples
from spinlm.data.prepare import prepare
from spinlm.data.questions import load_questions
from spinlm.data.render import Renderer

RENDERER = Renderer(tiny.build_tokenizer(), PromptSection())

SPECIAL = [
    "",
    " ",
    "\0",
    "\ud800",
    "a\udfffb",
    "<|im_end|>",
    "<|endoftext|>",
    "\u2028",
    "\ufeff",
    "\r\n",
    "{{ 1 }}",
    "‮",
]
texts = st.one_of(st.text(max_size=30), st.sampled_from(SPECIAL), st.just("x" * 3000), st.just("é" * 50_000))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**30, 10**40), st.floats(), texts, st.dates().map(str)
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt", "USER", "tool", ""]) | anything
contents = texts | st.lists(st.dictionaries(st.sampled_from(["type", "text"]), texts | anything), max_size=3) | anything
turns = st.fixed_dictionaries(
    {}, optional={"role": roles, "from": roles, "content": contents, "value": contents, "other": anything}
)
conversations = st.lists(turns | anything, max_size=6) | st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts}), max_size=8
)
names = [*dict.fromkeys(name for pair in PROMPT_AND_RESPONSE_COLUMNS for name in pair), *SYSTEM_COLUMNS]
values = texts | conversations | anything
rows = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys([*names, "messages", "conversations", "real", "rejected", "input", "turns"], values),
)
good_turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
shapes: list[dict[str, Any]] = [
    {"prompt": "a", "response": "b", "system": "c"},
    {"messages": good_turns * 2},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": "a", "chosen": [*good_turns], "rejected": "c"},
    {"instruction": "a", "input": "b", "output": "c"},
]


@st.composite
def nearly_good(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of one shape, values of some of which are something else."""
    shape = draw(st.sampled_from(shapes))
    table = [dict(shape) for _ in range(draw(st.integers(2, 8)))]
    for _ in range(draw(st.integers(0, 4))):
        row = draw(st.sampled_from(table))
        row[draw(st.sampled_from(list(shape)))] = draw(values)
    return table


bad_tables = st.lists(rows | st.dictionaries(texts, anything, max_size=3), max_size=5) | st.lists(
    st.fixed_dictionaries({"prompt": values, "response": values}), min_size=1, max_size=5
)
tables = nearly_good() | nearly_good() | bad_tables
columns = (
    st.just({})
    | st.just({})
    | st.dictionaries(
        st.sampled_from(["messages", "system", "prompt", "input", "response"]),
        st.sampled_from(names) | texts,
        max_size=2,
    )
)
sections = st.fixed_dictionaries(
    {},
    optional={
        "columns": columns,
        "turns": st.sampled_from(["last", "first", "all"]),
        "limit": st.integers(1, 5),
        "held_out": st.integers(0, 4) | st.floats(0, 0.9),
        "overlong": st.sampled_from(["drop", "truncate_prompt_left"]),
    },
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("datasets")


def _as_file(place: Path, table: list[Any], suffix: str) -> Path:
    path = place / f"data{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
            return path
        except (pyarrow.ArrowException, UnicodeError, ValueError, TypeError, OverflowError, AttributeError):
            suffix, path = ".json", place / "data.json"
    if suffix == ".csv":
        file, header = io.StringIO(newline=""), list(dict.fromkeys(name for row in table for name in row))
        writer = csv.writer(file)
        writer.writerows([header, *([row.get(name) for name in header] for row in table)])
        content = file.getvalue()
    elif suffix == ".json":
        content = json.dumps(table)
    else:
        content = "".join(json.dumps(row) + "\n" for row in table)
    path.write_bytes(content.encode("utf-8", errors="surrogatepass"))
    return path


def _prepared(path: Path, settings: dict[str, Any]) -> None:
    section = DataSection(**{"source": str(path), "max_prompt_tokens": 60, "max_length": 100, **settings})
    examples, dropped = load_examples(section)
    split = prepare(examples, dropped, RENDERER, section, seed=0)
    for row in (*split.train, *split.held_out):
        json.dumps(asdict(row), ensure_ascii=False).encode()
        assert 0 < len(row.prompt_ids) <= 60
        assert len(row.prompt_ids) + len(row.real_ids) <= 100
    for lost in split.dropped:
        json.dumps(asdict(lost))


@cases(0.3)
@given(table=tables, suffix=st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]), settings=sections)
def test_rows(place: Path, table: list[Any], suffix: str, settings: dict[str, Any]) -> None:
    path = _as_file(place, table, suffix)
    accepted_or_refused("dataset rows", lambda: _prepared(path, settings))


good = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}] * 3


@cases(0.25)
@given(data=st.data(), suffix=st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]))
def test_bytes(place: Path, data: st.DataObject, suffix: str) -> None:
    path = _as_file(place, good, suffix)
    if data.draw(st.booleans()):
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
            content = content or bytearray(b"x")
    else:
        content = bytearray(data.draw(st.binary(max_size=200) | texts.map(lambda t: t.encode(errors="replace"))))
    path.write_bytes(bytes(content))
    accepted_or_refused("dataset bytes", lambda: _prepared(path, {}))


@cases(0.05)
@given(table=tables, suffix=st.sampled_from([".json", ".jsonl", ".csv"]))
def test_questions(place: Path, table: list[Any], suffix: str) -> None:
    path = _as_file(place, table, suffix)
    for question in accepted_or_refused("questions", lambda: load_questions(str(path))) or []:
        name = slug(question.id)
        assert name not in ("", ".", "..")
        assert "/" not in name
        assert "\0" not in name
        assert len(name.encode()) < 100


LARGE = {
    "a prompt of 10 MB": [{"prompt": "word " * 2_000_000, "response": "b"}],
    "a response of 10 MB": [{"prompt": "a", "response": "x" * 10_000_000}],
    "a line of 10 MB without end": [{"prompt": "\ud800" * 3_000_000, "response": "b" * 10_000_000}],
    "100,000 turns": [
        {"messages": [{"role": r, "content": "a"} for _ in range(50_000) for r in ("user", "assistant")]}
    ],
    "100,000 turns of one": [{"messages": [{"role": "user", "content": "a"}] * 100_000}],
    "100,000 columns": [{f"c{i}": i for i in range(100_000)} | {"prompt": "a", "response": "b"}],
    "a conversation nested 900 deep": [{"prompt": json.loads("[" * 900 + "]" * 900), "response": "b"}],
}


@pytest.mark.parametrize("turns", ["last", "first", "all"])
@pytest.mark.parametrize("name", LARGE)
def test_large_rows(place: Path, name: str, turns: str) -> None:
    path = _as_file(place, [*LARGE[name], *good], ".jsonl")
    accepted_or_refused(f"dataset, large: {name}", lambda: _prepared(path, {"turns": turns}))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize(
    "content", ["[" * 1_000_000, '{"a":' * 1_000_000, '"' * 1_000_001, "9" * 1_000_000, "\n" * 10**6]
)
def test_large_nonsense(place: Path, suffix: str, content: str) -> None:
    path = place / f"data{suffix}"
    path.write_text(content)
    accepted_or_refused("dataset, large nonsense", lambda: _prepared(path, {}))
