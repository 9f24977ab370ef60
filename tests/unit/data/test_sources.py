"""Rows from real files, from reasoning-gym, and what is said where there are none."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spinlm.config import DataSection, ReasoningGymSection
from spinlm.data.sources import UNUSABLE_TASKS, Row, fingerprint, read_rows, reasoning_gym_task
from spinlm.errors import UserError


def rows_of(source: object) -> list[Row]:
    return read_rows(DataSection(source=str(source)))


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(source: object) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(source)
    return str(caught.value)


class TestJSON:
    def test_a_list_of_objects(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.json", '[{"prompt": "p"}, {"prompt": "q"}]')
        assert rows_of(path) == [Row("a.json[0]", {"prompt": "p"}), Row("a.json[1]", {"prompt": "q"})]

    def test_an_object_with_one_list_inside(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.json", '{"version": 2, "data": [{"prompt": "p"}]}')
        assert rows_of(path) == [Row("a.json[0]", {"prompt": "p"})]

    def test_json_lines_under_the_other_name(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.json", '{"prompt": "p"}\n{"prompt": "q"}\n')
        assert [row.place for row in rows_of(path)] == ["a.json:1", "a.json:2"]

    def test_a_byte_order_mark_and_a_capital_suffix(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.JSON", '\ufeff[{"prompt": "p"}]')
        assert rows_of(path) == [Row("a.JSON[0]", {"prompt": "p"})]

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ('[\n{"a": 1},\n{"a": }\n]', "line 3: not valid JSON: Expecting value"),
            ("[" * 100_000, "not valid JSON"),
            ('[{"a": ' + "9" * 5000 + "}]", "not valid JSON"),
            ('[{"a": 1}, [2]]', "[1] is a list: every row has to be an object of columns"),
            ('{"train": [], "test": []}', "an object with 2 lists in it (train, test): give a list of objects"),
            ('{"a": 1}', "an object with no list in it"),
            ("3.5", "holds a number: give a list of objects"),
            ("null", "holds null"),
            ("", "line 1: not valid JSON"),
        ],
    )
    def test_what_is_not_rows(self, tmp_path: Path, content: str, said: str) -> None:
        path = written(tmp_path / "a.json", content)
        assert f"{path}: " in refusal(path)
        assert said in refusal(path)


class TestJSONLines:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
    def test_places_are_line_numbers_and_blank_lines_count(self, tmp_path: Path, name: str) -> None:
        path = written(tmp_path / name, '{"a": 1}\n\n  \r\n{"a": 2}')
        assert rows_of(path) == [Row(f"{name}:1", {"a": 1}), Row(f"{name}:4", {"a": 2})]

    def test_windows_line_ends_and_a_byte_order_mark(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.jsonl", '\ufeff{"a": 1}\r\n{"a": 2}\r\n')
        assert [row.columns["a"] for row in rows_of(path)] == [1, 2]

    def test_unicode_line_separators_are_text(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.jsonl", '{"a": "x\u2028y\u0085z"}\n')
        assert rows_of(path)[0].columns == {"a": "x\u2028y\u0085z"}

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ('{"a": 1', "line 3: not valid JSON: Expecting ',' delimiter at column 8"),
            ("[1, 2]", "line 3 is a list: every line has to be an object of columns"),
            ('"text"', "line 3 is a string"),
            ("true", "line 3 is a boolean"),
            ("[" * 100_000, "line 3: not valid JSON"),
            ('{"a": ' + "9" * 5000 + "}", "line 3: not valid JSON"),
        ],
    )
    def test_an_unreadable_line_is_named(self, tmp_path: Path, line: str, said: str) -> None:
        path = written(tmp_path / "a.jsonl", '{"a": 0}\n{"a": 0}\n' + line + "\n")
        assert f"{path}: {said}" in refusal(path)

    def test_text_that_is_not_utf8(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.jsonl", b'{"a": "caf\xe9"}')
        assert f"{path}: not UTF-8 text (byte 10: " in refusal(path)
        assert "save it as UTF-8" in refusal(path)


class TestCSV:
    def test_places_are_the_lines_where_records_begin(self, tmp_path: Path) -> None:
        path = written(
            tmp_path / "a.csv", '\ufeffprompt,response\r\n"two\nlines",b\r\n\r\n"with ""quotes""","c, d"\r\n'
        )
        assert rows_of(path) == [
            Row("a.csv:2", {"prompt": "two\nlines", "response": "b"}),
            Row("a.csv:5", {"prompt": 'with "quotes"', "response": "c, d"}),
        ]

    def test_a_long_response(self, tmp_path: Path) -> None:
        before = csv.field_size_limit()
        path = written(tmp_path / "a.csv", "prompt,response\np," + "x" * 200_000)
        assert len(rows_of(path)[0].columns["response"]) == 200_000
        assert csv.field_size_limit() == before

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("a,b\n1,2\n1,2,3\n", "line 3: 3 fields, but the header names 2 columns"),
            ("a,b\n1\n", "line 2: 1 fields, but the header names 2 columns"),
            ('a,b\n1,2\n3,"open\n', "line 3: not valid CSV"),
            ("a,a\n1,2\n", "line 1: two columns have the same name: a, a"),
        ],
    )
    def test_what_is_not_rows(self, tmp_path: Path, content: str, said: str) -> None:
        path = written(tmp_path / "a.csv", content)
        assert f"{path}: {said}" in refusal(path)


class TestParquet:
    def test_nested_columns(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = {"messages": [[{"role": "user", "content": "hi"}], None], "n": [1, 2]}
        (tmp_path / "split=train").mkdir()  # not a column of a partition
        path = tmp_path / "split=train" / "a.parquet"
        parquet.write_table(pyarrow.table(columns), path)
        assert rows_of(path) == [
            Row("a.parquet[0]", {"messages": [{"role": "user", "content": "hi"}], "n": 1}),
            Row("a.parquet[1]", {"messages": None, "n": 2}),
        ]

    def test_another_file_under_that_name(self, tmp_path: Path) -> None:
        pytest.importorskip("pyarrow")
        path = written(tmp_path / "a.parquet", "PAR1 but no")
        assert f"{path}: not a readable Parquet file: " in refusal(path)


class TestPlaces:
    def test_a_directory_is_read_by_name(self, tmp_path: Path) -> None:
        written(tmp_path / "b.jsonl", '{"a": 3}')
        written(tmp_path / "a.json", '[{"a": 1}, {"a": 2}]')
        written(tmp_path / "c.csv", "a\n4")
        written(tmp_path / "README.md", "not data")
        written(tmp_path / ".hidden.json", "not data either")
        assert [row.place for row in rows_of(tmp_path)] == ["a.json[0]", "a.json[1]", "b.jsonl:1", "c.csv:2"]

    def test_a_directory_without_data(self, tmp_path: Path) -> None:
        written(tmp_path / "README.md", "nothing")
        assert f"{tmp_path}: no file in it ends in .json, .jsonl, .ndjson, .csv, .parquet" in refusal(tmp_path)

    def test_the_home_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        written(tmp_path / "a.jsonl", '{"a": 1}')
        assert rows_of("~/a.jsonl") == [Row("a.jsonl:1", {"a": 1})]

    def test_a_missing_file_names_the_nearest(self, tmp_path: Path) -> None:
        written(tmp_path / "train.jsonl", "{}")
        said = refusal(tmp_path / "trian.jsonl")
        assert said == f"data.source: {tmp_path / 'trian.jsonl'}: no such file or directory; did you mean train.jsonl?"

    @pytest.mark.parametrize("source", ["nowhere.json", "./nowhere", "../nowhere/at/all", "/no/where", "~nobody/where"])
    def test_what_looks_like_a_path_is_not_asked_of_the_hub(self, source: str) -> None:
        assert refusal(source).startswith(f"data.source: {source}: no such file or directory")

    def test_a_name_too_long_for_a_file(self) -> None:
        assert "no such file or directory" in refusal("./" + "x" * 5000)

    def test_another_kind_of_file(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.txt", "text")
        assert "a.txt: can't tell what it holds; name it with one of .json, .jsonl" in refusal(path)

    @pytest.mark.parametrize(
        ("name", "content"), [("a.json", "[]"), ("a.jsonl", "\n\n"), ("a.csv", "a,b\n"), ("b.csv", "")]
    )
    def test_an_empty_dataset(self, tmp_path: Path, name: str, content: str) -> None:
        path = written(tmp_path / name, content)
        assert refusal(path) == f"data.source: {path}: there are no rows in it"

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions don't stop this user")
    def test_a_file_that_may_not_be_read(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.jsonl", "{}")
        path.chmod(0)
        assert f"{path}: can't be read: Permission denied" in refusal(path)


class TestHub:
    def test_offline_says_what_was_tried(self) -> None:
        pytest.importorskip("datasets")
        # In a process of its own, since the hub's library reads the environment once, when it is imported.
        code = (
            "from spinlm.config import DataSection\n"
            "from spinlm.data.sources import read_rows\n"
            "from spinlm.errors import UserError\n"
            "try:\n"
            "    read_rows(DataSection(source='nobody/nothing', config='small', split='validation'))\n"
            "except UserError as error:\n"
            "    print(error)\n"
        )
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("data.source: nobody/nothing: not a file or directory here, and the hub said: ")
        assert "asked for split validation of configuration small" in done.stdout

    def test_importing_this_module_imports_nothing_heavy(self) -> None:
        code = (
            "import sys, spinlm.data.formats, spinlm.evaluation.verifiers\n"
            "print(sorted({'datasets', 'pyarrow', 'reasoning_gym', 'torch'} & set(sys.modules)))"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestReasoningGym:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("reasoning_gym")

    @staticmethod
    def rows(task: str, **arguments: object) -> list[Row]:
        section = ReasoningGymSection.model_validate(arguments)
        return read_rows(DataSection(source=f"reasoning_gym:{task}", reasoning_gym=section))

    def test_rows_hold_what_makes_their_entry_again(self) -> None:
        args = {"max_terms": 3, "min_terms": 2}
        rows = self.rows("chain_sum", size=4, seed=7, args=args)
        assert [row.place for row in rows] == [f"chain_sum[{i}]" for i in range(4)]
        for index, row in enumerate(rows):
            verifier = json.loads(json.dumps(row.verifier))
            entry = reasoning_gym_task(verifier["task"], verifier["size"], verifier["seed"], verifier["args"])[index]
            assert row.columns == {"question": entry["question"], "answer": entry["answer"]}
            assert verifier == {
                "task": "chain_sum",
                "size": 4,
                "seed": 7,
                "args": args,
                "index": index,
                "sha256": fingerprint(entry),
            }

    def test_the_same_rows_twice_and_others_with_another_seed(self) -> None:
        assert self.rows("chain_sum", size=5, seed=1) == self.rows("chain_sum", size=5, seed=1)
        assert self.rows("chain_sum", size=5, seed=1) != self.rows("chain_sum", size=5, seed=2)

    @pytest.mark.parametrize(
        ("task", "arguments", "said"),
        [
            ("chain_sums", {}, "data.source: reasoning_gym:chain_sums: no such task; did you mean chain_sum"),
            ("", {}, "data.source: reasoning_gym:: no such task"),
            ("chain_sum", {"args": {"nope": 1}}, "data.reasoning_gym.args: chain_sum doesn't take them: "),
            ("chain_sum", {"args": {"min_terms": 9, "max_terms": 2}}, "max_terms must be >= min_terms"),
            ("chain_sum", {"args": {"min_terms": "two"}}, "data.reasoning_gym.args: chain_sum doesn't take them: "),
            ("chain_sum", {"args": {"size": 3}}, "data.reasoning_gym.args: chain_sum doesn't take them: "),
            ("chain_sum", {"args": {"min_terms": {1}}}, "data.reasoning_gym.args: only what JSON can hold: "),
        ],
    )
    def test_what_reasoning_gym_does_not_take(self, task: str, arguments: dict[str, object], said: str) -> None:
        with pytest.raises(UserError) as caught:
            self.rows(task, **arguments)
        assert said in str(caught.value)

    @pytest.mark.parametrize("task", sorted(UNUSABLE_TASKS))
    def test_a_task_that_would_prove_nothing_is_refused(self, task: str) -> None:
        with pytest.raises(UserError, match=f"{task}: not usable: .*; take another task"):
            self.rows(task)

    @pytest.mark.parametrize("seed", [None, "random"])
    def test_a_task_that_depends_on_the_hash_seed_asks_for_one(
        self, seed: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
        if seed is not None:
            monkeypatch.setenv("PYTHONHASHSEED", seed)
        with pytest.raises(UserError, match=r"ransom_note: .* set PYTHONHASHSEED=0 in the environment"):
            self.rows("ransom_note", size=2)
        monkeypatch.setenv("PYTHONHASHSEED", "0")
        assert len(self.rows("ransom_note", size=2)) == 2
