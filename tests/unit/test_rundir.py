"""The run directory: what is committed, what is made anew, what is an error, and that nothing half-made counts."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from spinlm.config import recipe_from
from spinlm.errors import UserError
from spinlm.files import (
    add_to_log,
    canonical,
    copy,
    digest,
    file_hashes,
    read_json,
    read_log,
    sealed,
    unsealed,
    write_json,
)
from spinlm.rundir import Artifact, CorruptArtifact, RunDir

RECIPE = recipe_from({"run_dir": "r", "model": {"name": "m"}, "data": {"source": "d"}}, where="here")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.begin(RECIPE, {"spinlm": "1"})
    return run


def make_file(run: RunDir, key: str = "iterations/0/a.jsonl", text: str = "A", inputs: Any = 1) -> Artifact:
    artifact = run.artifact(key, "generate", {"x": inputs})
    with artifact.staging() as place:
        place.write_text(text)
    return artifact


def make_directory(run: RunDir, key: str = "iterations/0/adapter") -> Artifact:
    artifact = run.artifact(key, "train", {"x": 1})
    with artifact.staging() as place:
        (place / "sub").mkdir(parents=True)
        (place / "a").write_text("A")
        (place / "sub" / "b").write_text("B")
    return artifact


def everything(run: RunDir) -> set[str]:
    return {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if not path.is_dir()}


class TestCommits:
    def test_a_file_and_its_record(self, run: RunDir) -> None:
        artifact = make_file(run, text="words\n")
        assert artifact.path.read_text() == "words\n"
        assert everything(run) == {"run.json", "iterations/0/a.jsonl", "commits/iterations--0--a.jsonl.json"}
        assert run.record("iterations/0/a.jsonl") == {
            "key": "iterations/0/a.jsonl",
            "stage": "generate",
            "hash": sha256(json.dumps({"": sha256("words\n")})),
            "inputs": {"x": 1},
            "files": {"": sha256("words\n")},
        }
        assert artifact.hash == sha256(json.dumps({"": sha256("words\n")}))
        assert artifact.is_committed()

    def test_a_directory_and_its_record(self, run: RunDir) -> None:
        artifact = make_directory(run)
        files = {"a": sha256("A"), "sub/b": sha256("B")}
        assert run.record(artifact.key)["files"] == files
        assert artifact.hash == digest(files) == sha256(json.dumps(files))
        assert artifact.is_committed()

    def test_its_hash_is_of_its_content_alone(self, run: RunDir) -> None:
        first, second = make_file(run, "a", "same"), make_file(run, "b", "same", inputs=2)
        assert first.hash == second.hash != make_file(run, "c", "other").hash

    def test_records_by_key(self, run: RunDir) -> None:
        for key in ("data", "iterations/1/a", "iterations/0/adapter"):
            make_file(run, key)
        assert [record["key"] for record in run.records()] == ["data", "iterations/0/adapter", "iterations/1/a"]

    def test_other_inputs_make_it_anew(self, run: RunDir) -> None:
        make_file(run, text="old")
        changed = run.artifact("iterations/0/a.jsonl", "generate", {"x": 2})
        assert not changed.is_committed()
        make_file(run, text="new", inputs=2)
        assert changed.is_committed()
        assert changed.path.read_text() == "new"
        assert not run.artifact("iterations/0/a.jsonl", "generate", {"x": 1}).is_committed()

    def test_which_inputs_are_others(self, run: RunDir) -> None:
        key = "iterations/0/a.jsonl"
        assert run.artifact(key, "generate", {"x": 1}).changed_inputs() == []
        make_file(run, inputs=(1, 2))
        assert run.artifact(key, "generate", {"x": [1, 2]}).changed_inputs() == []
        assert run.artifact(key, "generate", {"x": 2, "y": 3}).changed_inputs() == ["x", "y"]
        assert run.artifact(key, "generate", {}).changed_inputs() == ["x"]

    def test_inputs_are_compared_as_json(self, run: RunDir) -> None:
        make_file(run, inputs={1: (2, 3.0), 2: None})
        assert run.artifact("iterations/0/a.jsonl", "generate", {"x": {"2": None, "1": [2, 3]}}).is_committed()
        assert canonical({"b": (1, 2), "a": {3: None}}) == {"a": {"3": None}, "b": [1, 2]}

    def test_a_new_directory_replaces_the_old_one_wholly(self, run: RunDir) -> None:
        make_directory(run)
        artifact = run.artifact("iterations/0/adapter", "train", {"x": 2})
        with artifact.staging() as place:
            place.mkdir()
            (place / "c").write_text("C")
        assert file_hashes(artifact.path) == {"c": sha256("C")}


class TestInterruptions:
    def test_nothing_is_left_of_what_was_not_finished(self, run: RunDir) -> None:
        artifact = run.artifact("iterations/0/adapter", "train", {})
        with pytest.raises(KeyboardInterrupt), artifact.staging() as place:
            place.mkdir()
            (place / "half").write_text("half")
            raise KeyboardInterrupt
        assert not artifact.is_committed()
        assert everything(run) == {"run.json"}
        assert list((run.path / ".staging").iterdir()) == []

    def test_what_was_committed_stays_while_it_is_made_anew(self, run: RunDir) -> None:
        old = make_file(run, text="old")
        with pytest.raises(OSError, match="full"), run.artifact(old.key, "generate", {"x": 2}).staging() as place:
            place.write_text("half")
            raise OSError("full")
        assert old.is_committed()
        assert old.path.read_text() == "old"

    def test_what_is_in_its_place_without_a_record_does_not_count(self, run: RunDir) -> None:
        artifact = make_directory(run)
        run.record_path(artifact.key).unlink()
        assert not artifact.is_committed()
        make_directory(run)
        assert artifact.is_committed()

    def test_a_record_that_was_being_written_does_not_count(self, run: RunDir) -> None:
        make_file(run, "data")
        for text in ('{"key": "da', json.dumps(read_json(run.record_path("data")))):
            (run.path / "commits" / ".data.json").write_text(text)
            assert [record["key"] for record in run.records()] == ["data"]
            assert run.repair() == []

    def test_the_lock_clears_what_a_killed_process_was_writing(self, run: RunDir) -> None:
        left = run.path / ".staging" / "tmp1" / "adapter"
        left.mkdir(parents=True)
        with run.locked():
            assert not left.exists()


class TestVerification:
    def test_what_is_whole(self, run: RunDir) -> None:
        for artifact in (make_directory(run), make_file(run)):
            run.verify(artifact.key)

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda path: (path / "a").write_text("a"), r"adapter/a: not what was committed \(its SHA-256 differs\)"),
            (lambda path: (path / "sub" / "b").unlink(), "adapter/sub/b: missing"),
            (lambda path: (path / "c").write_text("C"), "adapter/c: not what was committed"),
            (shutil.rmtree, "adapter: missing, though it was committed"),
            (lambda path: (shutil.rmtree(path), path.write_text("A")), "adapter"),
        ],
    )
    def test_what_was_damaged_is_named_with_what_to_do(self, run: RunDir, damage: Any, words: str) -> None:
        artifact = make_directory(run)
        damage(artifact.path)
        for check in (artifact.is_committed, lambda: run.verify(artifact.key)):
            with pytest.raises(CorruptArtifact, match=rf"{words}.* The stage 'train' makes it anew: .*--repair\."):
                check()

    def test_a_damaged_file(self, run: RunDir) -> None:
        artifact = make_file(run)
        artifact.path.write_text("B")
        with pytest.raises(CorruptArtifact, match=r"a\.jsonl: not what was committed.* The stage 'generate'"):
            artifact.is_committed()

    @pytest.mark.parametrize("text", ["", "[1]", "{}", '{"key": "da'])
    def test_a_damaged_record(self, run: RunDir, text: str) -> None:
        artifact = make_file(run, "data")
        run.record_path("data").write_text(text)
        with pytest.raises(CorruptArtifact, match=r"commits/data\.json: .*--repair"):
            artifact.is_committed()
        assert run.repair() == ["data"]
        assert not artifact.is_committed()

    def test_an_edited_record(self, run: RunDir) -> None:
        artifact = make_file(run, "data")
        record = read_json(run.record_path("data"))
        write_json(run.record_path("data"), record | {"inputs": {"x": 2}})  # and not its own hash
        with pytest.raises(CorruptArtifact, match=r"commits/data\.json: not what was committed"):
            artifact.is_committed()

    def test_repair_forgets_what_is_broken_and_nothing_else(self, run: RunDir) -> None:
        broken, gone, whole = make_directory(run), make_file(run, "iterations/1/b"), make_file(run, "data")
        (broken.path / "a").write_text("a")
        gone.path.unlink()
        assert run.repair() == ["iterations/0/adapter", "iterations/1/b"]
        assert whole.is_committed()
        assert not broken.is_committed()
        assert not broken.path.exists()
        assert everything(run) == {"run.json", "data", "commits/data.json"}
        assert run.repair() == []

    def test_forget(self, run: RunDir) -> None:
        kept, directory, file = make_file(run, "data"), make_directory(run), make_file(run)
        for artifact in (directory, file, file):
            run.forget(artifact.key)
            assert not artifact.is_committed()
        assert kept.is_committed()
        assert everything(run) == {"run.json", "data", "commits/data.json"}


class TestForks:
    @pytest.fixture
    def fork(self, run: RunDir, tmp_path: Path) -> RunDir:
        make_directory(run)
        make_file(run)
        fork = RunDir(tmp_path / "fork")
        fork.begin(RECIPE, {}, forked_from=run.path)
        return fork

    def test_what_holds_is_taken_over(self, run: RunDir, fork: RunDir) -> None:
        for key, stage in (("iterations/0/adapter", "train"), ("iterations/0/a.jsonl", "generate")):
            mine, theirs = fork.artifact(key, stage, {"x": 1}), run.artifact(key, stage, {"x": 1})
            assert mine.is_committed()
            assert file_hashes(mine.path) == file_hashes(theirs.path)
            assert mine.hash == theirs.hash
        shutil.rmtree(run.path)
        assert fork.artifact("iterations/0/adapter", "train", {"x": 1}).is_committed()

    def test_so_it_is_where_the_fork_is_opened_again(self, fork: RunDir) -> None:
        assert RunDir(fork.path).artifact("iterations/0/adapter", "train", {"x": 1}).is_committed()

    def test_what_was_made_from_something_else_is_not(self, fork: RunDir) -> None:
        assert not fork.artifact("iterations/0/adapter", "train", {"x": 2}).is_committed()
        assert not fork.artifact("iterations/1/adapter", "train", {"x": 1}).is_committed()
        assert everything(fork) == {"run.json"}

    def test_nothing_is_taken_over_from_what_is_no_run(self, run: RunDir, fork: RunDir, tmp_path: Path) -> None:
        """Nothing has looked for links there."""
        shutil.move(run.path / "iterations/0", tmp_path / "elsewhere")
        (run.path / "iterations/0").symlink_to(tmp_path / "elsewhere")
        (run.path / "run.json").unlink()
        assert not fork.artifact("iterations/0/adapter", "train", {"x": 1}).is_committed()
        assert everything(fork) == {"run.json"}

    def test_what_is_damaged_there_is_not(self, run: RunDir, fork: RunDir) -> None:
        (run.path / "iterations/0/adapter/a").write_text("a")
        run.record_path("iterations/0/a.jsonl").write_text("{")
        assert not fork.artifact("iterations/0/adapter", "train", {"x": 1}).is_committed()
        assert not fork.artifact("iterations/0/a.jsonl", "generate", {"x": 1}).is_committed()
        assert everything(fork) == {"run.json"}

    def test_the_run_it_came_from_is_left_alone(self, run: RunDir, fork: RunDir) -> None:
        before = file_hashes(run.path)
        assert fork.artifact("iterations/0/adapter", "train", {"x": 1}).is_committed()
        (fork.path / "iterations/0/adapter/a").write_text("mine")
        fork.forget("iterations/0/a.jsonl")
        assert file_hashes(run.path) == before


class TestHeaders:
    def test_the_recipe_comes_back(self, run: RunDir) -> None:
        assert RunDir(run.path).recipe() == RECIPE
        assert RunDir(run.path).header()["versions"] == {"spinlm": "1"}

    def test_the_same_recipe_goes_on(self, run: RunDir) -> None:
        make_file(run)
        run.begin(RECIPE.model_copy(update={"run_dir": "elsewhere"}), {"spinlm": "2"})
        assert run.header()["versions"] == {"spinlm": "1"}

    def test_another_recipe_is_refused_once_something_is_committed(self, run: RunDir) -> None:
        other = RECIPE.model_copy(update={"seed": 7})
        run.begin(other, {})
        assert run.recipe().seed == 7
        make_file(run)
        with pytest.raises(UserError, match=r"(?s)another recipe.*\n  seed: 7 -> 0\n.*--fork NEW_RUN"):
            run.begin(RECIPE, {})

    def test_a_directory_with_something_else_in_it_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / ".staging").mkdir()
        for name in ("thesis.tex", "lock", ".staging/draft"):
            (tmp_path / name).write_text("mine")
        before = file_hashes(tmp_path)
        with pytest.raises(UserError, match="holds files but no run"), RunDir(tmp_path).locked():
            pass
        assert file_hashes(tmp_path) == before

    def test_a_file_system_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def lockf(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "lockf", lockf)
        words = r"its file system has no locks \(No locks available\), .* put run_dir on another one"
        with pytest.raises(UserError, match=words), RunDir(tmp_path / "new").locked():
            pass

    def test_there_is_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"not a run directory \(it has no run.json\)"):
            RunDir(tmp_path).header()
        (tmp_path / "run.json").write_text('{"recipe": ')
        with pytest.raises(UserError, match=r"run.json: not what was written: .*Restore it, .*--repair"):
            RunDir(tmp_path).header()


class TestPointers:
    def test_they_move(self, run: RunDir) -> None:
        first, second = make_directory(run), make_directory(run, "iterations/1/adapter")
        run.point("best", first.key)
        assert (run.path / "best").resolve() == first.path.resolve()
        run.point("best", second.key)
        assert (run.path / "best").resolve() == second.path.resolve()
        assert first.is_committed()

    def test_they_move_with_the_run(self, run: RunDir) -> None:
        run.point("best", make_directory(run).key)
        moved = run.path.rename(run.path.with_name("moved"))
        assert (moved / "best" / "a").read_text() == "A"


class TestReading:
    def test_what_was_committed(self, run: RunDir) -> None:
        artifact = make_directory(run)
        make_file(run, "rows.jsonl", '{"a": "one\\u2028line"}\n{"a": 2}\n')
        make_file(run, "one.json", '{"a": 1}')
        assert run.committed(artifact.key, "sub/b") == b"B"
        assert run.committed_rows("rows.jsonl") == [{"a": "one\u2028line"}, {"a": 2}]
        assert run.committed_json("one.json") == {"a": 1}

    @pytest.mark.parametrize(
        ("content", "commits"),
        [
            ({"model": "1a" * 20, "dataset": None}, {"model": "1a" * 20}),
            ({"model": "../" * 13 + "x", "dataset": 5}, {}),
            ([1], {}),
        ],
    )
    def test_only_commits_are_an_origin(self, run: RunDir, content: Any, commits: dict[str, str]) -> None:
        """What they are asked for by goes to the hub's libraries."""
        with run.artifact("data", "data", {}).staging() as place:
            write_json(place / "origin.json", content)
        assert run.origin() == commits

    @pytest.mark.parametrize("content", [b"", b'{"a": 1', b'{"a": 2}', b"\xff"])
    def test_what_is_something_else_by_now_is_not_read(self, run: RunDir, content: bytes) -> None:
        make_file(run, "one.json", '{"a": 1}').path.write_bytes(content)
        with pytest.raises(CorruptArtifact, match=r"one.json: not what was committed .*'generate' makes it anew"):
            run.committed_json("one.json")

    def test_what_is_gone(self, run: RunDir) -> None:
        make_file(run, "one.json", "{}").path.unlink()
        with pytest.raises(CorruptArtifact, match=r"one\.json: missing"):
            run.committed_json("one.json")
        with pytest.raises(CorruptArtifact, match="adapter/a: missing"):
            make_directory(run).path.joinpath("a").unlink()
            run.committed("iterations/0/adapter", "a")

    def test_a_file_that_was_never_part_of_it(self, run: RunDir) -> None:
        artifact = make_directory(run)
        (artifact.path / "more").write_text("")
        with pytest.raises(CorruptArtifact, match="adapter/more: not what was committed"):
            run.committed(artifact.key, "more")


class TestFilesWithoutARecord:
    def test_put(self, run: RunDir) -> None:
        for text in ("one", "two"):
            assert run.put("report.html", text).read_text() == text
        assert everything(run) == {"run.json", "report.html"}

    def test_one_that_can_not_be_written_leaves_the_one_before(self, run: RunDir) -> None:
        run.put("report.html", "one")
        with pytest.raises(UnicodeEncodeError):
            run.put("report.html", "\ud800")
        assert (run.path / "report.html").read_text() == "one"
        assert everything(run) == {"run.json", "report.html"}


class TestLock:
    def test_another_process_is_kept_out_and_let_in_later(self, run: RunDir) -> None:
        code = (
            "import sys; from pathlib import Path; from spinlm.rundir import RunDir\n"
            f"with RunDir(Path({str(run.path)!r})).locked(): pass"
        )
        with run.locked():
            other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            assert "another process is running this (pid " in other.stderr
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0

    def test_another_process_can_ask_whether_it_is_held_and_take_nothing(self, run: RunDir) -> None:
        code = (
            "import sys; from pathlib import Path; from spinlm.rundir import RunDir\n"
            f"print(RunDir(Path({str(run.path)!r})).is_running())"
        )

        def asked() -> str:
            return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()

        assert asked() == "False"
        with run.locked():
            assert asked() == "True"
            assert asked() == "True"
        assert asked() == "False"
        (run.path / "lock").write_text("pid 1 on a machine that went down")
        assert asked() == "False"

    def test_somebody_removes_its_file(self, run: RunDir) -> None:
        """It is taken again; unless another process was quicker, which is let alone."""
        code = (
            "import sys; from pathlib import Path; from spinlm.rundir import RunDir\n"
            f"with RunDir(Path({str(run.path)!r})).locked(): print('in', flush=True), sys.stdin.read()"
        )
        with ExitStack() as other:
            with run.locked():
                (run.path / "lock").unlink()
                assert make_file(run).is_committed()
                assert (run.path / "lock").read_text().startswith("pid ")
                (run.path / "lock").unlink()
                command, pipe = [sys.executable, "-c", code], subprocess.PIPE
                process = other.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe))
                assert process.stdout is not None and process.stdout.readline() == b"in\n"
                (run.path / ".staging").mkdir()
                with pytest.raises(UserError, match="lock: was removed, and another process has started this run"):
                    make_file(run, "data")
            assert (run.path / ".staging").exists()
        assert run.keys() == ["iterations/0/a.jsonl"]

    def test_what_a_killed_process_has_half_written_is_swept_away(self, run: RunDir) -> None:
        (run.path / ".staging").mkdir()
        for name in (".report.html.1234.part", ".staging/half"):
            (run.path / name).write_text("half")
        (run.path / "report.html").write_text("whole")
        with run.locked():
            assert everything(run) == {"run.json", "lock", "report.html"}

    def test_a_directory_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="file: can't write there"), RunDir(tmp_path / "file").locked():
            pass


class TestSeals:
    def test_what_was_sealed_comes_back(self) -> None:
        content = {"b": [1, None], "a": {"ü": 2.5}}
        assert unsealed(canonical(sealed(content))) == content
        assert sealed(content)["own_hash"] == digest(content)

    @pytest.mark.parametrize(
        "content", [{}, [], None, {"a": 1}, {"own_hash": 1}, {"a": 2, "own_hash": digest({"a": 1})}]
    )
    def test_what_was_not_does_not(self, content: Any) -> None:
        with pytest.raises(ValueError, match="its own hash differs"):
            unsealed(content)

    def test_a_log_gives_back_those_rows_that_are_whole(self, tmp_path: Path) -> None:
        log = tmp_path / "log.jsonl"
        assert list(read_log(log)) == []
        for number in range(4):
            add_to_log(log, {"n": number})
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(lines[0] + lines[1].replace(b"1", b"9", 1) + b"\xff\n" + lines[2] + lines[3][:-9])
        add_to_log(log, {"n": 4})
        assert [row["n"] for row in read_log(log)] == [0, 2, 4]


def test_a_header_that_is_not_what_was_written(run: RunDir) -> None:
    """It is named, and made anew where that is wanted."""
    kept = make_file(run, "data")
    whole = (run.path / "run.json").read_bytes()
    for damaged in (whole.replace(b'"seed": 0', b'"seed": 1'), whole[: len(whole) // 2], b"", b"[]"):
        (run.path / "run.json").write_bytes(damaged)
        for read in (run.header, run.recipe, lambda: run.begin(RECIPE, {"spinlm": "1"})):
            with pytest.raises(CorruptArtifact, match=r"run.json: not what was written: .*--repair"):
                read()
        assert run.begin(RECIPE, {"spinlm": "1"}, repair=True) == ["run.json"]
        assert (run.path / "run.json").read_bytes() == whole
        assert kept.is_committed()
    assert run.begin(RECIPE, {"spinlm": "1"}, repair=True) == []


def test_a_copy_can_be_written_where_the_original_can_not(tmp_path: Path) -> None:
    (tmp_path / "one/sub").mkdir(parents=True)
    (tmp_path / "one/sub/a").write_text("A")
    for path in (tmp_path / "one/sub/a", tmp_path / "one/sub", tmp_path / "one"):
        path.chmod(path.stat().st_mode & ~0o222)
    copy(tmp_path / "one", tmp_path / "other")
    assert file_hashes(tmp_path / "other") == {"sub/a": sha256("A")}
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "other").rglob("*"))
    for path in (tmp_path / "one", tmp_path / "one/sub"):
        path.chmod(0o755)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"b": "ü", "a": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "a": 1,\n  "b": "\\u00fc"\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"c": object()})
    assert read_json(path) == {"b": "ü", "a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
