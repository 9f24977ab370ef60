"""lm-eval's scores of a player that is loaded already, against its own way from a name; and when a task is another."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration import tasks
from spinlm.errors import UserError
from spinlm.evaluation import harness
from spinlm.evaluation.harness import Catalogue, TaskResult, evaluate_task, language_model, listening

GROUP = """
group: both
task: [pick, few]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""

ROLLING = """
task: text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/say.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: byte_perplexity}}
"""


@dataclass
class Counted:
    total: int
    done: int = 0

    def advance(self, tokens: int = 0, items: int = 0) -> None:
        self.done += items


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tasks.write(tmp_path_factory.mktemp("local") / "tasks")
    (folder / "text.yaml").write_text(ROLLING.format(folder=folder))
    rows = (folder / "pick.jsonl").read_text().splitlines()[:10]
    (folder / "few.jsonl").write_text("\n".join(rows) + "\n")
    few = tasks.PICK.format(folder=folder).replace("task: pick", "task: few").replace("pick.jsonl", "few.jsonl")
    (folder / "few.yaml").write_text(few)
    (folder / "both.yaml").write_text(GROUP)
    return folder


@pytest.fixture
def local_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval as if these tasks were its own."""
    (folder / "mine.yaml").unlink(missing_ok=True)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(harness, "_index", lambda: manager)


def _ours(model: Path, task: str, num_fewshot: int | None, counts: list[Counted], **options: Any) -> TaskResult:
    @contextmanager
    def announce(total: int) -> Iterator[Counted]:
        counts.append(Counted(total))
        yield counts[-1]

    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    lm = language_model(loaded, AutoTokenizer.from_pretrained(model), 4, "", announce)
    settings = {"chat_template": False, "limit": None, **options}
    return evaluate_task(lm, Catalogue(), task, num_fewshot, **settings)


def _theirs(model: Path, folder: Path, task: str, num_fewshot: int | None, limit: int | None = None) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with mock.patch("lm_eval.evaluator.add_env_info"):
        return dict(
            lm_eval.simple_evaluate(
                "hf",
                model_args=f"pretrained={model}",
                tasks=[task],
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                batch_size=4,
                device="cpu",
            )
        )


class TestScores:
    @pytest.mark.parametrize(
        ("task", "num_fewshot", "metric", "requests"),
        [
            ("pick", 3, "acc_norm,none", 120),
            ("say", None, "exact_match,first-letter", 24),
            ("text", None, "byte_perplexity,none", 24),
        ],
    )
    def test_are_lm_evals(
        self, tiny_llama: Path, folder: Path, task: str, num_fewshot: int | None, metric: str, requests: int
    ) -> None:
        counts: list[Counted] = []
        ours = _ours(tiny_llama, str(folder / f"{task}.yaml"), num_fewshot, counts)
        theirs = _theirs(tiny_llama, folder, task, num_fewshot)
        name, _, by = metric.partition(",")
        assert ours.scores[metric]["value"] == theirs["results"][task][metric] > 0
        stderr = theirs["results"][task][f"{name}_stderr,{by}"]
        assert ours.scores[metric]["stderr"] == (None if stderr == "N/A" else stderr)
        assert ours.higher_is_better[name] is theirs["higher_is_better"][task][name] is (task != "text")
        assert ours.num_fewshot == theirs["n-shot"][task] == (num_fewshot or 0)
        assert ours.examples == theirs["n-samples"][task]["effective"]
        assert ours.parts == {} and not ours.truncated
        assert [(count.total, count.done) for count in counts] == [(requests, requests)]

    @pytest.mark.usefixtures("local_index")
    def test_of_a_group(self, tiny_llama: Path, folder: Path) -> None:
        """Weighted by size: 40 questions and 10."""
        ours, theirs = _ours(tiny_llama, "both", 1, []), _theirs(tiny_llama, folder, "both", 1)
        assert ours.scores["acc,none"]["value"] == theirs["results"]["both"]["acc,none"]
        assert ours.scores["acc,none"]["stderr"] == theirs["results"]["both"]["acc_stderr,none"]
        assert ours.parts.keys() == {"pick", "few"}
        parts = [(ours.parts[name]["acc,none"]["value"], size) for name, size in (("pick", 40), ("few", 10))]
        assert parts[0][0] != parts[1][0]
        assert ours.scores["acc,none"]["value"] == pytest.approx(sum(v * n for v, n in parts if v is not None) / 50)
        assert (ours.examples, ours.num_fewshot) == (50, 1)

    def test_of_the_first_examples(self, tiny_llama: Path, folder: Path) -> None:
        ours = _ours(tiny_llama, str(folder / "pick.yaml"), None, [], limit=7)
        theirs = _theirs(tiny_llama, folder, "pick", None, limit=7)["results"]["pick"]
        assert (ours.examples, ours.num_fewshot) == (7, 2)
        assert ours.scores["acc,none"]["value"] == theirs["acc,none"]

    def test_of_prompts_that_were_cut(self, tiny_llama: Path, folder: Path) -> None:
        assert _ours(tiny_llama, str(folder / "pick.yaml"), 20, [], limit=3).truncated
        assert not _ours(tiny_llama, str(folder / "pick.yaml"), 1, [], limit=3).truncated

    def test_the_tokenizer_stays_as_it_is(self, tiny_llama: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        tokenizer.pad_token = None
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        lm = language_model(model, tokenizer, 1, "", lambda total: _nobody(total))
        assert tokenizer.pad_token is None and lm.tokenizer.pad_token is not None

    def test_in_half_precision(self, tiny_llama: Path, folder: Path) -> None:
        """By autocast, as the run's own forward passes are; which lm-eval calls mixed precision."""
        model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
        lm = language_model(model, tokenizer, 1, "bf16", lambda total: _nobody(total))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            wanted = model(torch.tensor([[72, 101, 108]])).logits
        assert torch.equal(lm._model_call(torch.tensor([[72, 101, 108]])), wanted)
        assert not torch.equal(wanted, model(torch.tensor([[72, 101, 108]])).logits)


@contextmanager
def _nobody(total: int) -> Iterator[Counted]:
    yield Counted(total)


def test_numbers_that_json_has_no_word_for() -> None:
    row = {"alias": "x", "ppl,none": math.inf, "ppl_stderr,none": "N/A", "acc,a": 0.5, "acc_stderr,a": 0.25}
    assert harness._scores(row) == {
        "ppl,none": {"value": None, "stderr": None},
        "acc,a": {"value": 0.5, "stderr": 0.25},
    }


class TestDefinitions:
    """A JSON value that is another one as soon as anything is that scores depend on."""

    @pytest.fixture
    def task(self, tmp_path: Path) -> Path:
        folder = tasks.write(tmp_path / "tasks")
        (folder / "common.yaml").write_text("doc_to_text: !function helpers.text\n")
        (folder / "helpers.py").write_text("def text(doc):\n    return doc['question']\n")
        lines = (folder / "pick.yaml").read_text().splitlines()
        kept = [line for line in lines if not line.startswith("doc_to_text")]
        (folder / "pick.yaml").write_text("\n".join(["include: common.yaml", *kept]) + "\n")
        return folder / "pick.yaml"

    @pytest.mark.parametrize(
        "change",
        [
            lambda folder: _replace(folder / "pick.yaml", "num_fewshot: 2", "num_fewshot: 3"),
            lambda folder: _replace(folder / "common.yaml", "helpers.text", "helpers.other"),
            lambda folder: _replace(folder / "helpers.py", "doc['question']", "doc['question'] + '?'"),
            lambda folder: _replace(folder / "pick.jsonl", "say red", "say rad"),
        ],
        ids=["the file", "a file it includes", "a function's file", "the data"],
    )
    def test_change_with(self, task: Path, change: Callable[[Path], None]) -> None:
        was = Catalogue().definition(str(task))
        assert Catalogue().definition(str(task)) == was
        change(task.parent)
        assert Catalogue().definition(str(task)) != was

    def test_dont_change_with_what_is_beside_it(self, task: Path) -> None:
        was = Catalogue().definition(str(task))
        (task.parent / "notes.py").write_text("x = 1\n")
        _replace(task.parent / "say.yaml", "say", "sag")
        assert Catalogue().definition(str(task)) == was

    @pytest.mark.usefixtures("local_index")
    def test_of_a_group_hold_its_tasks(self) -> None:
        group = Catalogue().definition("both")
        assert group["members"] == [Catalogue().definition("pick"), Catalogue().definition("few")]


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_what_a_task_prints_is_kept_from_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with listening() as heard:
        logging.getLogger("lm_eval.models").warning("Left truncation applied to %s", 3)
        logging.getLogger("lm_eval.models").info("not worth a word")
    assert heard == ["Left truncation applied to 3"]
    assert capfd.readouterr().err == ""
    assert logging.getLogger("lm_eval").handlers == []


def test_a_dataset_that_cant_be_had(folder: Path, tmp_path: Path) -> None:
    text = (folder / "pick.yaml").read_text().replace(f"{folder}/pick.jsonl", "/nowhere/pick.jsonl")
    (tmp_path / "gone.yaml").write_text(text)
    with pytest.raises(UserError, match=r"gone\.yaml: can't be loaded: .*/nowhere/pick\.jsonl"):
        Catalogue().load(str(tmp_path / "gone.yaml"))
