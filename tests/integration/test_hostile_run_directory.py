"""A run directory that somebody else has made: nothing in it leads out of it, whichever command opens it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import made_run
from integration.command import contents, refused, spinlm, succeeded
from spinlm.files import digest, file_hashes, read_json, sealed, unsealed, write_json
from spinlm.rundir import RunDir

RUN = ("run", "recipe.yaml", "evaluation.control=true")
READING = (("status", "run"), ("report", "run"), ("export", "run", "out"), ("evaluate", "run", "--suite", "arena"))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """What isn't the run's: a directory with a file."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/thesis.tex").write_text("keep")
    return tmp_path / "elsewhere"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run.plausible(tmp_path_factory.mktemp("made") / "run", examples=4, iterations=1, steps=3).path


@pytest.fixture
def run(tmp_path: Path, made: Path) -> Path:
    """A run that looks finished."""
    shutil.copytree(made, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


LINKS = {
    "data/train.jsonl": "thesis.tex",
    "data": "",
    "iterations/0/adapter": "",
    "iterations": "",
    "commits/data.json": "thesis.tex",
    "commits": "",
    "evaluation/base/measures.json": "thesis.tex",
    "run.json": "thesis.tex",
    "timings.jsonl": "thesis.tex",
    "report.html": "thesis.tex",
    "report.md": "thesis.tex",
    "metrics.jsonl": "thesis.tex",
    "lock": "thesis.tex",
    ".run.json": "thesis.tex",
    ".staging": "",
    "checkpoints": "",
    "checkpoints/sft": "",
    "trackers": "",
    "benchmarks/verdicts": "",
    "best": "",
    "latest": "thesis.tex",
}
"""Places in a run directory, and what of another directory a link there leads to."""


def _link(place: Path, target: Path | str) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_it_is_refused_by_name(run: Path, elsewhere: Path, name: str) -> None:
    if name == "run.json":
        (elsewhere / "thesis.tex").write_bytes((run / "run.json").read_bytes())
    target = elsewhere / LINKS[name]
    for written in (target, os.path.relpath(target, (run / name).parent)):
        _link(run / name, written)
        before, other = contents(run, without=()), contents(elsewhere)
        for arguments in READING:
            extra = ("--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m") if "arena" in arguments else ()
            refused(spinlm(*arguments, *extra, cwd=run.parent), f"run/{name}: a link out of the run directory")
        assert contents(run, without=()) == before
        assert contents(elsewhere) == other
        assert not (run.parent / "out").exists()


@pytest.mark.parametrize("name", ["lock", ".staging", "checkpoints", "iterations/0/adapter", "timings.jsonl"])
@pytest.mark.parametrize("flags", [(), ("--repair",)])
def test_nothing_is_written_or_removed_through_a_link(
    copied: Path, elsewhere: Path, name: str, flags: tuple[str, ...]
) -> None:
    _link(copied / "runs/recipe" / name, elsewhere / LINKS[name])
    refused(spinlm(*RUN, *flags, cwd=copied), f"runs/recipe/{name}: a link out of the run directory")
    assert contents(elsewhere) == {"thesis.tex": b"keep"}


@pytest.mark.parametrize("name", ["lock", ".run.json"])
def test_an_empty_directory_with_a_link_in_it(place: Path, elsewhere: Path, name: str) -> None:
    _link(place / "runs/recipe" / name, elsewhere / "thesis.tex")
    refused(spinlm(*RUN, cwd=place), f"runs/recipe/{name}: a link out of the run directory")
    assert contents(elsewhere) == {"thesis.tex": b"keep"}


@pytest.mark.parametrize("name", ["trackers/iterations", "trackers/iterations/0", "trackers/iterations/0/wandb"])
def test_nothing_is_tracked_out_of_it(place: Path, elsewhere: Path, name: str) -> None:
    tiny_run = ("recipe.yaml", "sft=null", "data.limit=6")
    succeeded(spinlm("generate", *tiny_run, cwd=place))
    _link(place / "runs/recipe" / name, elsewhere)
    refused(spinlm("train", *tiny_run, cwd=place), "runs/recipe/trackers/iterations/0", "a link out of the run")
    assert contents(elsewhere) == {"thesis.tex": b"keep"}


def test_a_directory_that_cannot_be_searched_is_refused(run: Path, elsewhere: Path) -> None:
    """So deep that it has no path: a link is in it all the same."""
    descriptor = os.open(run, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=descriptor)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.symlink(elsewhere, "link", dir_fd=descriptor)
    os.close(descriptor)
    for arguments in READING[:3]:
        refused(spinlm(*arguments, cwd=run.parent), "can't be searched for links out of the run: File name too long")


def test_links_that_stay_in_it_are_followed(run: Path) -> None:
    (run / "data/train.jsonl").rename(run / "data/rows")
    _link(run / "data/train.jsonl", "rows")
    _link(run / "best", "nowhere/yet")
    succeeded(spinlm("status", "run", cwd=run.parent))
    (run.parent / "linked").symlink_to(run)
    succeeded(spinlm("status", "linked", cwd=run.parent))


@pytest.mark.parametrize("name", ["lock", "timings.jsonl", "evaluation/base/measures.json", "commits/data.json"])
def test_a_pipe_keeps_nobody_waiting(run: Path, name: str) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    for arguments in READING[:3]:
        refused(spinlm(*arguments, cwd=run.parent), f"run/{name}: neither a file nor a directory")


def _record(run: Path, key: str, name: str) -> None:
    """A record under a name of its own, whole in every other way."""
    record = {"key": key, "stage": "train", "inputs": {}, "files": {"thesis.tex": "0" * 64}}
    record["hash"] = digest(record["files"])
    (run / "commits" / name).write_text(json.dumps(sealed(record)))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("../elsewhere", "..--elsewhere.json"),
        ("iterations/../../elsewhere", "iterations--..--..--elsewhere.json"),
        ("{elsewhere}", None),
        ("", ".json"),
        ("../elsewhere", "innocent.json"),
    ],
)
def test_records_of_what_is_elsewhere(copied: Path, elsewhere: Path, key: str, name: str | None) -> None:
    run = copied / "runs/recipe"
    elsewhere = elsewhere.rename(copied / "runs/elsewhere")
    key = key.format(elsewhere=elsewhere)
    name = name or key.replace("/", "--") + ".json"
    before = contents(run, without=())
    _record(run, key, name)
    if name.startswith("."):  # one that was being written
        succeeded(spinlm("status", "runs/recipe", cwd=copied))
    else:
        for arguments in (("status", "runs/recipe"), ("report", "runs/recipe")):
            refused(spinlm(*arguments, cwd=copied), name)
        if name != "innocent.json":
            refused(spinlm(*RUN, "--repair", cwd=copied), name)
        else:
            succeeded(spinlm(*RUN, "--repair", cwd=copied))
            assert not (run / "commits" / name).exists()
    assert contents(elsewhere) == {"thesis.tex": b"keep"}
    (run / "commits" / name).unlink(missing_ok=True)
    assert contents(run, without=("report.html",)) | before == before | contents(run, without=("report.html",))


def test_a_run_that_was_forked_from_itself(run: Path) -> None:
    header = unsealed(read_json(run / "run.json"))
    write_json(run / "run.json", sealed(header | {"forked_from": str(run)}))
    succeeded(spinlm("status", "run", cwd=run.parent))


@pytest.mark.parametrize(
    ("name", "value"), [("forked_from", ["a"]), ("versions", "1"), ("recipe", []), ("recipe", None)]
)
def test_a_header_of_other_things(run: Path, name: str, value: object) -> None:
    header = unsealed(read_json(run / "run.json"))
    write_json(run / "run.json", sealed({**header, name: value}))
    for arguments in READING[:3]:
        refused(spinlm(*arguments, cwd=run.parent), f"run.json: its {name} isn't one")


def test_a_recipe_that_names_a_file_has_nothing_of_it_shown(run: Path, elsewhere: Path) -> None:
    header = unsealed(read_json(run / "run.json"))
    header["recipe"]["prompt"]["chat_template"] = str(elsewhere / "thesis.tex")
    write_json(run / "run.json", sealed(header))
    for arguments in READING[:3]:
        refused(spinlm(*arguments, cwd=run.parent), "run.json: prompt.chat_template: no Jinja template")


def test_a_header_without_a_recipe(run: Path) -> None:
    header = unsealed(read_json(run / "run.json"))
    write_json(run / "run.json", sealed({name: header[name] for name in header if name != "recipe"}))
    for arguments in READING[:3]:
        refused(spinlm(*arguments, cwd=run.parent), "run.json: has no recipe")


@pytest.mark.parametrize("content", [[1, 2], "x"])
def test_a_header_that_is_no_object(run: Path, content: object) -> None:
    (run / "run.json").write_text(json.dumps(content))
    for arguments in READING[:3]:
        refused(spinlm(*arguments, cwd=run.parent), "run.json: not what was written")


def test_depth_is_no_way_in(run: Path) -> None:
    (run / "run.json").write_text("[" * 100_000)
    refused(spinlm("status", "run", cwd=run.parent), "run.json", "nested too deeply")


FORGED = {
    "data/train.jsonl": '{"id": "x"}\n',
    "layout.json": '{"layout": "nosuch"}\n',
    "evaluation/sft/sampled/00000.jsonl": '{"id": "x", "responses": [{"token_ids": [1]}]}\n',
    "evaluation/base/examples.jsonl": "[]\n",
    "iterations/0/opponent_logprobs/00000.jsonl": '{"id": "x", "real": 0.5, "others": {}}\n',
    "iterations/1/diagnostics.json": "null",
}
"""What is in a file, under a record that fits it."""


@pytest.mark.parametrize("name", FORGED)
def test_a_run_reads_what_no_run_writes_and_says_so(copied: Path, name: str) -> None:
    run = RunDir(copied / "runs/recipe")
    (run.path / name).write_text(FORGED[name])
    key = "data" if name.startswith("data/") else name
    record = run.record(key)
    record["files"] = file_hashes(run.path / key)
    record["hash"] = digest(record["files"])
    write_json(run.record_path(key), sealed(record))
    before = contents(run.path)
    refused(spinlm(*RUN, cwd=copied), "runs/recipe", "holds something that no run writes")
    assert contents(run.path) == before


def test_what_no_run_writes_is_one_message_and_its_traceback_can_be_had(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDir(run)
    record = directory.record("evaluation/base/measures.json")
    write_json(run / "evaluation/base/measures.json", 5)
    record["files"] = file_hashes(run / "evaluation/base/measures.json")
    record["hash"] = digest(record["files"])
    write_json(directory.record_path(record["key"]), sealed(record))
    commands = (("report", "run"), ("report", "run", "--serve", "--port", "0"))
    for arguments in commands:
        refused(spinlm(*arguments, cwd=run.parent), "run: holds something that no run writes", "SPINLM_TRACEBACK=1")
    monkeypatch.setenv("SPINLM_TRACEBACK", "1")
    for arguments in commands:
        outcome = spinlm(*arguments, cwd=run.parent)
        assert outcome.code == 2
        assert outcome.err.startswith("Traceback")
        assert "reporting" in outcome.err
        assert outcome.err.splitlines()[-1].startswith("spinlm: run: holds something that no run writes")
