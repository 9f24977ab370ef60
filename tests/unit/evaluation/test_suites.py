"""Suites: those that come with spinlm against the paper and the installed lm-eval, and what a file may say."""

import json
from pathlib import Path
from typing import Any

import pytest

from spinlm.errors import UserError
from spinlm.evaluation.harness import Catalogue
from spinlm.evaluation.suites import Suite, find_metric, find_suite, slug, suite_names

PAPER_TABLE_1 = {
    "ARC": (25, "acc_norm,none"),
    "TruthfulQA": (0, "acc,none"),  # lm-eval's truthfulqa_mc2 calls mc2 so
    "Winogrande": (5, "acc,none"),
    "GSM8K": (5, "exact_match,strict-match"),
    "HellaSwag": (10, "acc_norm,none"),
    "MMLU": (5, "acc,none"),
}
PAPER_AVERAGES = {
    "zephyr-7b-sft-full": 58.14,
    "SPIN iteration 0": 60.80,
    "SPIN iteration 1": 62.12,
    "SPIN iteration 2": 62.97,
    "SPIN iteration 3": 63.16,
    "DPO, 62k preference pairs": 61.31,
    "one more SFT epoch": 57.23,
}
QUESTIONS = {
    "bbh_cot_fewshot_causal_judgement": 187,
    "bbh_cot_fewshot_formal_fallacies": 250,
    "bbh_cot_fewshot_sports_understanding": 250,
    "openbookqa": 500,
}
"""In each of the tasks whose scores the paper gives without an average."""


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue()


class TestShipped:
    """`find_suite` refuses a task or a metric that the installed lm-eval doesn't have."""

    def test_the_leaderboard(self, catalogue: Catalogue) -> None:
        name, suite = find_suite("open-llm-leaderboard", catalogue)
        assert name == "open-llm-leaderboard"
        assert {task.title: (task.num_fewshot, task.metric) for task in suite.tasks} == PAPER_TABLE_1
        assert suite.percent and not suite.apply_chat_template

    def test_its_rows_are_the_papers(self, catalogue: Catalogue) -> None:
        """A number copied wrongly would move the average that the paper prints."""
        _, suite = find_suite("open-llm-leaderboard", catalogue)
        assert suite.paper is not None and "2401.01335" in suite.paper.source
        assert list(suite.paper.rows) == list(PAPER_AVERAGES)
        for label, row in suite.paper.rows.items():
            assert len(row) == 6
            assert sum(row.values()) / 6 == pytest.approx(PAPER_AVERAGES[label], abs=0.0051)

    def test_big_bench(self, catalogue: Catalogue) -> None:
        _, suite = find_suite("big-bench-paper", catalogue)
        assert [task.title for task in suite.tasks] == ["causal judgment", "formal fallacies", "sports understanding"]
        for task in suite.tasks:
            config = catalogue.config(task.task)
            assert config["num_fewshot"] == len(config["fewshot_config"]["samples"]) == 3
            assert "Let's think step by step" in config["doc_to_text"]
            assert task.metric == "exact_match,get-answer"

    def test_openbookqa(self, catalogue: Catalogue) -> None:
        """The suite, not lm-eval's task of that name."""
        _, suite = find_suite("openbookqa", catalogue)
        (task,) = suite.tasks
        assert (task.num_fewshot, task.metric) == (1, "acc_norm,none")

    @pytest.mark.parametrize("name", ["big-bench-paper", "openbookqa"])
    def test_their_rows_are_shares_of_so_many_questions(self, catalogue: Catalogue, name: str) -> None:
        _, suite = find_suite(name, catalogue)
        assert suite.paper is not None
        assert list(suite.paper.rows) == list(PAPER_AVERAGES)[:4]
        for row in suite.paper.rows.values():
            for task, percent in row.items():
                right = round(percent / 100 * QUESTIONS[task])
                assert 100 * right / QUESTIONS[task] == pytest.approx(percent, abs=0.0051)

    def test_all_of_them(self, catalogue: Catalogue) -> None:
        assert suite_names() == ["big-bench-paper", "open-llm-leaderboard", "openbookqa"]
        for name in suite_names():
            assert find_suite(name, catalogue)[1].description


class TestNamesOfLmEval:
    def test_a_task(self, catalogue: Catalogue) -> None:
        name, suite = find_suite("arc_easy", catalogue)
        assert name == "arc_easy"
        assert [(task.task, task.metric, task.num_fewshot) for task in suite.tasks] == [("arc_easy", None, None)]

    def test_a_group_with_a_score(self, catalogue: Catalogue) -> None:
        assert [task.task for task in find_suite("mmlu", catalogue)[1].tasks] == ["mmlu"]

    def test_a_tag(self, catalogue: Catalogue) -> None:
        assert [task.task for task in find_suite("ai2_arc", catalogue)[1].tasks] == ["arc_challenge", "arc_easy"]

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("humaneval", "humaneval: runs programs that the model writes"),
            ("mmmu_val_art", "mmmu_val_art: has images or sound"),
            ("openllm", "openllm: a group without a score .* arc_challenge, hellaswag"),
        ],
    )
    def test_what_isnt_for_us(self, catalogue: Catalogue, name: str, words: str) -> None:
        with pytest.raises(UserError, match=words):
            find_suite(name, catalogue)


def _suite(**changes: Any) -> dict[str, Any]:
    return {"tasks": [{"task": "arc_easy"}], **changes}


class TestFiles:
    def test_task_files_are_found_beside_the_suite(self, catalogue: Catalogue, tmp_path: Path) -> None:
        (tmp_path / "suites").mkdir()
        (tmp_path / "one.yaml").write_text("task: one\nmetric_list: [{metric: acc}]\n")
        (tmp_path / "suites/my suite.yaml").write_text("tasks: [{task: ../one.yaml, metric: acc}]\n")
        name, suite = find_suite(str(tmp_path / "suites/my suite.yaml"), catalogue)
        assert name == "my-suite"
        (task,) = suite.tasks
        assert Path(task.task).resolve() == tmp_path / "one.yaml"
        assert (task.name, task.title, task.metric) == ("one", "one", "acc,none")

    def test_a_task_file_is_a_suite_of_one(self, catalogue: Catalogue, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text("task: other\n")
        name, suite = find_suite(str(tmp_path / "mine.yaml"), catalogue)
        assert (name, [task.name for task in suite.tasks]) == ("mine", ["mine"])

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (json.dumps(_suite(tsks=1)), "tsks: unknown key; did you mean tasks"),
            (json.dumps(_suite(percent="yes")), "percent"),
            ("tasks: []", "tasks"),
            ("tasks: arc_easy", "tasks"),
            (json.dumps({"tasks": [{"task": "arc_easy"}] * 2}), "each task once, .* several arc_easy"),
            (json.dumps({"tasks": [{"task": "arc_easy", "num_fewshot": -1}]}), "num_fewshot"),
            (json.dumps({"tasks": [{"task": "truthfulqa_mc2", "num_fewshot": 5}]}), "asked without examples"),
            (json.dumps({"tasks": [{"task": "ai2_arc"}]}), "name its tasks: arc_challenge, arc_easy"),
            (
                json.dumps({"tasks": [{"task": "gsm8k", "metric": "exact_match"}]}),
                "give one of exact_match,strict-match",
            ),
            (json.dumps(_suite(paper={"source": "x", "rows": {"A": {"arc": 1.0}}})), "A: has scores for arc"),
            (json.dumps(_suite(paper={"rows": {}})), "paper.source: missing"),
        ],
    )
    def test_what_is_wrong(self, catalogue: Catalogue, tmp_path: Path, text: str, words: str) -> None:
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=words):
            find_suite(str(tmp_path / "bad.yaml"), catalogue)

    def test_a_group_file(self, catalogue: Catalogue, tmp_path: Path) -> None:
        (tmp_path / "group.yaml").write_text("group: both\ntask: [arc_easy]\n")
        with pytest.raises(UserError, match="a group of lm-eval's: give a suite file"):
            find_suite(str(tmp_path / "group.yaml"), catalogue)


class TestMetrics:
    def test_with_or_without_its_filter(self) -> None:
        known = ["acc,none", "acc_norm,none", "f1,a", "f1,b"]
        assert find_metric("acc", known, "t") == "acc,none"
        assert find_metric("acc_norm,none", known, "t") == "acc_norm,none"
        assert find_metric("f1,b", known, "t") == "f1,b"
        with pytest.raises(UserError, match="t: metric f1: give one of acc,none; acc_norm,none; f1,a; f1,b"):
            find_metric("f1", known, "t")

    def test_where_only_the_tasks_code_knows(self) -> None:
        assert find_metric("acc", [], "t") == "acc,none"
        assert find_metric("acc,a", [], "t") == "acc,a"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("a b/c", "a-b-c"), ("two--dashes", "two-dashes"), ("../x", "x"), ("é_1.5", "é_1.5"), ("::", "suite")],
)
def test_names_for_files(name: str, wanted: str) -> None:
    """Two dashes would be a slash in the name of a commit's record."""
    assert slug(name) == wanted


def test_a_suite_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Suite(**_suite()).percent = True  # type: ignore[misc]
