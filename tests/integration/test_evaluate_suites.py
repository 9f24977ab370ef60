"""`spinlm evaluate RUN --suite`: scores are lm-eval's own, each task is measured once, and nothing else is touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import spinlm
from integration import tasks
from integration.command import (
    RECORDED,
    TORCHRUN,
    Outcome,
    after,
    before,
    contents,
    differing,
    flip_a_byte,
    forget,
    killed_at,
    refused,
    rows,
    spinlm_process,
    succeeded,
    write_recipe,
)
from integration.command import spinlm as command
from spinlm import benchmarking
from spinlm.api import opened
from spinlm.config import recipe_from
from spinlm.evaluation import harness
from spinlm.evaluation.suites import find_suite
from spinlm.files import read_json

PLAYERS = ["base", "sft", "iteration-0", "iteration-1", "control"]
EVALUATE = ("evaluate", "runs/recipe", "--suite", "tasks/mine.yaml")
MINE = "runs/recipe/benchmarks/mine"


@pytest.fixture(scope="module")
def measured(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, with the suite put to all its players by two processes; only to be read."""
    place = tmp_path_factory.mktemp("measured") / "place"
    shutil.copytree(finished, place, symlinks=True)
    tasks.write(place / "tasks")
    succeeded(spinlm_process(*EVALUATE, cwd=place, launcher=TORCHRUN))
    return place


@pytest.fixture
def changeable(measured: Path, tmp_path: Path) -> Path:
    """A copy of it, whose tasks still read the data of the first."""
    shutil.copytree(measured, tmp_path / "changeable", symlinks=True)
    return tmp_path / "changeable"


@pytest.fixture
def unmeasured(copied: Path) -> Path:
    """The finished run with the suite beside it."""
    tasks.write(copied / "tasks")
    return copied


def _scores(place: Path, player: str, task: str, suite: str = MINE) -> dict[str, dict[str, float]]:
    return dict(read_json(place / suite / player / f"{task}.json")["scores"])


def _values(scores: dict[str, Any]) -> dict[str, float]:
    """lm-eval's results of a task: values and standard errors."""
    return {key: value for key, value in scores.items() if "," in key}


def _as_lm_eval(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Our scores, in the shape of lm-eval's results."""
    flat = {}
    for key, score in scores.items():
        metric, _, by = key.partition(",")
        flat |= {key: score["value"], f"{metric}_stderr,{by}": score["stderr"]}
    return flat


class TestScoresAreThoseOfLmEval:
    """By its own command on what is exported, as another process that knows nothing of a run."""

    def test_on_the_merged_model_and_on_the_adapter(self, measured: Path, tmp_path: Path) -> None:
        succeeded(
            command("export", "runs/recipe", str(tmp_path / "model"), "--merge", "--iteration", "1", cwd=measured)
        )
        succeeded(command("export", "runs/recipe", str(tmp_path / "adapter"), "--iteration", "0", cwd=measured))
        _fill_vocabulary(tmp_path / "adapter")  # else lm-eval cuts the base's embeddings to the tokenizer's size
        adapter = f"pretrained={measured}/model,peft={tmp_path}/adapter,tokenizer={tmp_path}/adapter"
        started = {
            "iteration-1": _start_lm_eval(f"pretrained={tmp_path}/model", measured / "tasks", tmp_path / "merged"),
            "iteration-0": _start_lm_eval(adapter, measured / "tasks", tmp_path / "unmerged"),
        }
        for player, (process, out) in started.items():
            assert process.wait() == 0
            (results,) = out.rglob("results_*.json")
            theirs = json.loads(results.read_text())["results"]
            for task in ("pick", "say"):
                assert _as_lm_eval(_scores(measured, player, task)) == _values(theirs[task])

    def test_they_are_scores_that_could_differ(self, measured: Path) -> None:
        """Neither the same for all players, nor for all metrics, nor all right or all wrong."""
        seen = {player: {t: _scores(measured, player, t) for t in ("pick", "say")} for player in PLAYERS}
        for task, metric in (("pick", "acc,none"), ("pick", "acc_norm,none"), ("say", "exact_match,first-letter")):
            values = [seen[player][task][metric]["value"] for player in PLAYERS]
            assert len(set(values)) > 1 and min(values) > 0 and max(values) < 1
        assert seen["base"]["pick"]["acc,none"] != seen["base"]["pick"]["acc_norm,none"]

    def test_with_the_chat_template(self, unmeasured: Path, tmp_path: Path) -> None:
        suite = {"apply_chat_template": True, "tasks": [{"task": "pick.yaml"}, {"task": "say.yaml"}]}
        (unmeasured / "tasks/chat.yaml").write_text(json.dumps(suite))
        arguments = ("evaluate", "runs/recipe", "--suite", "tasks/chat.yaml", "--iterations", "1")
        succeeded(command(*arguments, cwd=unmeasured))
        succeeded(command("export", "runs/recipe", str(tmp_path / "model"), "--merge", cwd=unmeasured))
        model, folder = f"pretrained={tmp_path / 'model'}", unmeasured / "tasks"
        for task in ("pick", "say"):
            ours = _scores(unmeasured, "iteration-1", task, "runs/recipe/benchmarks/chat")
            assert _as_lm_eval(ours) == _simple_evaluate(model, folder, task, apply_chat_template=True)

    @pytest.mark.slow
    def test_of_whole_models(self, finished_full: Path, tmp_path: Path) -> None:
        place = tmp_path / "place"
        shutil.copytree(finished_full, place, symlinks=True)
        tasks.write(place / "tasks")
        succeeded(command(*EVALUATE, cwd=place))
        for player, weights in (("base", "model"), ("iteration-1", "runs/recipe/iterations/1/model")):
            model = f"pretrained={place / weights},tokenizer={place / 'model'}"
            theirs = _simple_evaluate(model, place / "tasks", "pick", num_fewshot=1)
            assert _as_lm_eval(_scores(place, player, "pick")) == theirs


def _start_lm_eval(model: str, folder: Path, out: Path) -> tuple[subprocess.Popen[str], Path]:
    arguments = ["--model", "hf", "--model_args", model, "--tasks", f"{folder}/pick.yaml,{folder}/say.yaml"]
    arguments += ["--num_fewshot", "1", "--batch_size", "4", "--device", "cpu", "--output_path", str(out)]
    log = out.with_suffix(".log").open("w")
    process = subprocess.Popen([sys.executable, "-m", "lm_eval", *arguments], stdout=log, stderr=log, text=True)
    return process, out


def _simple_evaluate(model: str, folder: Path, task: str, **options: Any) -> dict[str, float]:
    """What lm-eval's command calls, in this process; without its look at the machine, which takes seconds."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with mock.patch("lm_eval.evaluator.add_env_info"):
        results = lm_eval.simple_evaluate(
            "hf", model_args=model, tasks=[task], task_manager=manager, batch_size=4, device="cpu", **options
        )
    return _values(results["results"][task])


def _fill_vocabulary(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|unused|>"])
    tokenizer.save_pretrained(folder)


class TestEachTaskOnce:
    @pytest.mark.slow
    def test_goes_on_where_it_was_killed(self, measured: Path, finished: Path, tmp_path: Path) -> None:
        """And ends with the bytes of the two processes that were left alone."""
        place = tmp_path / "place"
        shutil.copytree(finished, place, symlinks=True)
        shutil.copytree(measured / "tasks", place / "tasks")
        killed_at(
            after(RECORDED, "commits/benchmarks--mine--base--pick"),
            before(RECORDED, "commits/benchmarks--mine--sft--say"),  # renamed to its place, but not recorded
            None,
            arguments=EVALUATE,
            cwd=place,
        )
        assert differing(measured / "runs/recipe", place / "runs/recipe") == []
        made = [row["what"] for row in rows(place / "runs/recipe/timings.jsonl") if "benchmarks" in row["what"]]
        once = [f"benchmarks/mine/{player}/{task}.json" for player in PLAYERS for task in ("pick", "say")]
        assert made == [*once[:4], *once[3:]]

    def test_a_second_start_loads_no_model(self, changeable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        was = contents(changeable / "runs/recipe", without=("lock",))
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", _no_model)
        out = succeeded(command(*EVALUATE, cwd=changeable)).out
        assert contents(changeable / "runs/recipe", without=("lock",)) == was
        assert "requests" not in out and "iteration-1" in out

    def test_a_player_more(self, changeable: Path) -> None:
        forget(changeable / "runs/recipe", "benchmarks/mine/iteration-0")
        out = succeeded(command(*EVALUATE, "--iterations", "1", cwd=changeable)).out
        assert "iteration-1" in out and "iteration-0" not in out
        out = succeeded(command(*EVALUATE, "--iterations", "0, 1", cwd=changeable)).out
        assert [line.split(" ")[0] for line in out.splitlines() if "requests," in line] == ["iteration-0:"] * 2

    def test_a_changed_task_isnt_read_as_the_old_one(self, changeable: Path) -> None:
        was = contents(changeable / "runs/recipe")
        file = changeable / "tasks/say.yaml"
        file.write_text(file.read_text().replace("max_gen_toks: 12", "max_gen_toks: 6"))
        message = refused(command(*EVALUATE, cwd=changeable), f"{MINE}/base/say.json", "definition", "--repair")
        assert "pick" not in message
        assert contents(changeable / "runs/recipe") == was
        succeeded(command(*EVALUATE, "--repair", cwd=changeable))
        now = contents(changeable / "runs/recipe")
        changed = {name for name in was if now[name] != was[name]}
        assert all("say" in name or name in ("benchmarks.md", "metrics.jsonl") for name in changed)
        assert f"benchmarks/mine/{PLAYERS[-1]}/say.json" in changed

    def test_a_damaged_result(self, changeable: Path) -> None:
        was = contents(changeable / "runs/recipe")
        flip_a_byte(changeable / MINE / "sft/pick.json")
        words = ("sft/pick.json: not what was committed", "'benchmark'", "spinlm evaluate with --repair")
        refused(command(*EVALUATE, cwd=changeable), *words)
        succeeded(command(*EVALUATE, "--repair", cwd=changeable))
        assert contents(changeable / "runs/recipe") == was

    def test_a_try_stands_beside_the_results(self, changeable: Path) -> None:
        was = contents(changeable / MINE)
        out = succeeded(command(*EVALUATE, "--limit", "3", cwd=changeable)).out
        assert "the first 3 examples of each task" in " ".join(out.split())
        assert contents(changeable / MINE) == was
        frame = spinlm.Run(changeable / "runs/recipe").benchmarks
        assert set(frame[frame.suite == "mine.limit-3"].examples) == {3}
        assert set(frame[frame.suite == "mine"].examples) == {24, 40}

    def test_from_another_directory_by_the_recipe(self, unmeasured: Path) -> None:
        """A run's recipe does as well as its directory."""
        write_recipe(unmeasured / "recipe.yaml", {"evaluation": {"control": True}})
        arguments = ("evaluate", "recipe.yaml", "--suite", "tasks/pick.yaml", "--iterations", "latest")
        succeeded(command(*arguments, cwd=unmeasured))
        frame = spinlm.Run(unmeasured / "runs/recipe").benchmarks
        assert list(dict.fromkeys(frame.player)) == ["base", "sft", "iteration-1", "control"]


def _no_model(*_arguments: Any, **_options: Any) -> None:
    raise AssertionError("a model is loaded")


def test_one_base_whose_weights_stay(
    unmeasured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every player is seated on one and the same model, and it is what it was when all are through."""
    monkeypatch.chdir(unmeasured)
    bases = _spied(monkeypatch, harness, "language_model", lambda model, *_: id(_base_of(model)))
    monkeypatch.setattr(benchmarking, "language_model", harness.language_model)
    loads = _spied(monkeypatch, AutoModelForCausalLM, "from_pretrained", lambda name, **_: name)
    recipe = recipe_from(read_json(unmeasured / "runs/recipe/run.json")["recipe"], where="test")
    catalogue = harness.Catalogue()
    suites = dict([find_suite("tasks/mine.yaml", catalogue)])
    with opened(recipe, only=set()) as stages:
        benchmarking.run_suites(stages, suites, catalogue, benchmarking.Settings(iterations=[0, 1]))
        in_memory = stages.players.opponent(stages.base).state_dict()
    assert len(bases) == len(PLAYERS) * 2 and len(set(bases)) == 1
    assert loads == ["./model"]
    on_disk = AutoModelForCausalLM.from_pretrained(unmeasured / "model").state_dict()
    assert in_memory.keys() == on_disk.keys()
    assert all(torch.equal(in_memory[name], on_disk[name]) for name in on_disk)


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _spied(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, note: Callable[..., Any]) -> list[Any]:
    seen: list[Any] = []
    original = getattr(owner, name)

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(note(*arguments, **options))
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, spy)
    return seen


class TestWhatIsShown:
    def test_the_table(self, measured: Path) -> None:
        page = (measured / "runs/recipe/benchmarks.md").read_text()
        of_base = [100 * _scores(measured, "base", *where)[metric]["value"] for where, metric in METRICS]
        lines = page.splitlines()
        assert lines[2] == "## mine: two local tasks, percent, with standard errors"
        assert lines[4] == "|  | picks | say | average |"
        assert [line.split(" | ")[0] for line in lines[6:11]] == [f"| {player}" for player in PLAYERS]
        assert [float(cell.split()[0]) for cell in lines[6].split(" | ")[1:4]] == pytest.approx(
            [*of_base, sum(of_base) / 2], abs=0.005
        )
        assert "For comparison, a paper:" in lines
        assert "| theirs | 40.00 | 50.50 | 45.25 |" in lines
        assert "picks: 1-shot acc_norm; say: 1-shot exact_match first-letter." in lines

    def test_the_frame(self, measured: Path) -> None:
        frame = spinlm.Run(measured / "runs/recipe").benchmarks
        columns = ["suite", "player", "task", "metric", "value", "stderr", "shots", "examples"]
        assert list(frame.columns) == columns
        assert len(frame) == len(PLAYERS) * 3
        row = frame[(frame.player == "iteration-1") & (frame.metric == "acc,none")].iloc[0]
        score = _scores(measured, "iteration-1", "pick")["acc,none"]
        expected = ["mine", "iteration-1", "pick", "acc,none", score["value"], score["stderr"], 1, 40]
        assert row.tolist() == expected

    def test_the_frame_of_nothing(self, finished: Path) -> None:
        assert spinlm.Run(finished / "runs/recipe").benchmarks.empty

    def test_prompts_that_dont_fit(self, unmeasured: Path) -> None:
        """The tiny model takes 128 bytes: with 15 examples, prompts lose their beginning, and that is said."""
        suite = {"tasks": [{"task": "pick.yaml", "num_fewshot": 15, "metric": "acc"}]}
        (unmeasured / "tasks/long.yaml").write_text(json.dumps(suite))
        out = succeeded(command("evaluate", "runs/recipe", "--suite", "tasks/long.yaml", cwd=unmeasured)).out
        assert "base: pick: some prompts are longer than the model takes" in out
        assert "*: some prompts are longer than the model takes, and lost their beginning." in " ".join(out.split())


METRICS = [(("pick",), "acc_norm,none"), (("say",), "exact_match,first-letter")]


def test_without_sft(without_sft: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(without_sft, place, symlinks=True)
    tasks.write(place / "tasks")
    succeeded(command("evaluate", "runs/recipe", "--suite", "tasks/say.yaml", cwd=place))
    assert list(spinlm.Run(place / "runs/recipe").benchmarks.player) == ["base", "iteration-0"]


def test_held_out_measures_by_the_run_directory(copied: Path) -> None:
    was = contents(copied / "runs/recipe")
    forget(copied / "runs/recipe", "evaluation/iteration-0/measures")
    succeeded(command("evaluate", "runs/recipe", cwd=copied))
    assert contents(copied / "runs/recipe") == was


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--suite", "opn-llm-leaderbord"), ("opn-llm-leaderbord", "did you mean open-llm-leaderboard")),
            (("--suite", "helaswag"), ("--suite helaswag", "did you mean hellaswag")),
            (("--suite", "qqqqqqqq"), ("no such suite", "big-bench-paper, open-llm-leaderboard, openbookqa")),
            (("--suite", "tasks/pock.yaml"), ("tasks/pock.yaml: no such file; did you mean pick.yaml?",)),
            (("--suite", "tasks/unknown.yaml"), ("helaswag: lm-eval", "no such task; did you mean hellaswag")),
            (("--suite", "tasks/typo.yaml"), ("tasks/typo.yaml", "num_fewshoot", "did you mean num_fewshot?")),
            (("--suite", "tasks/metric.yaml"), ("pick.yaml: metric f1: give one of acc,none; acc_norm,none",)),
            (("--suite", "tasks/nothing.yaml"), ("tasks/nothing.yaml: neither a suite", "task file")),
            (("--suite", "tasks/broken.yaml"), ("tasks/broken.yaml: not a task file",)),
            (("--suite", "tasks/far.yaml"), ("tasks/far.yaml: can't be loaded", "nobody/nothing")),
            (("--suite", "tasks/long.yaml"), ("tasks/long.yaml: lm-eval can't ask this model", "(128)")),
            (("--suite", "tasks/filter.yaml"), ("tasks/filter.yaml: lm-eval can't ask", "bad character range z-a")),
            (("--suite", "tasks/pick.yaml", "--iterations", "0,7"), ("no trained iteration '7'", "0, 1")),
            (("--suite", "tasks/pick.yaml", "--iterations", "bst"), ("no trained iteration 'bst'", "0, 1")),
            (("--limit", "3"), ("--limit", "go with --suite")),
            (("seed=1", "--suite", "tasks/pick.yaml"), ("a run keeps to its own recipe", "seed=1")),
        ],
    )
    def test_what_isnt_there(self, unmeasured: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
        _write_bad_files(unmeasured / "tasks")
        refused(command("evaluate", "runs/recipe", *arguments, cwd=unmeasured), *words)
        assert not list((unmeasured / "runs/recipe").glob("benchmarks/*/*/*"))

    def test_no_run(self, unmeasured: Path) -> None:
        refused(command("evaluate", "runs", "--suite", "tasks/pick.yaml", cwd=unmeasured), "runs: not a run directory")

    def test_a_recipe_that_never_ran(self, unmeasured: Path) -> None:
        shutil.rmtree(unmeasured / "runs")
        outcome = command("evaluate", "recipe.yaml", "--suite", "tasks/pick.yaml", cwd=unmeasured)
        refused(outcome, "runs/recipe: not a run directory")
        assert not (unmeasured / "runs").exists()

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda run: (run / "run.json").write_text('{"recipe"'), ("run.json: not what was written",)),
            (lambda run: forget(run, "iterations"), ("no iteration is trained yet: run spinlm run",)),
            (lambda run: forget(run, "sft/adapter"), ("sft isn't trained yet: run spinlm run",)),
            (
                lambda run: shutil.rmtree(run / "iterations/1/adapter"),
                ("iterations/1/adapter: missing", "'train' makes it anew: spinlm run with --repair"),
            ),
        ],
    )
    def test_a_half_written_run(self, unmeasured: Path, damage: Callable[[Path], Any], words: tuple[str, ...]) -> None:
        damage(unmeasured / "runs/recipe")
        refused(command(*EVALUATE, cwd=unmeasured), *words)

    def test_another_base_under_the_same_name(self, unmeasured: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(unmeasured / "model")
        model.lm_head.weight.data += 1
        model.save_pretrained(unmeasured / "model")
        refused(command(*EVALUATE, cwd=unmeasured), "model.name: ./model isn't the base", "was trained from")

    def test_without_lm_eval(self, unmeasured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        refused(command(*EVALUATE, cwd=unmeasured), "pip install 'spinlm[eval]'")

    def test_as_a_process_that_says_one_line(self, unmeasured: Path) -> None:
        """Without lm-eval, whose absence only a fresh process shows, and with nothing else on standard error."""
        outcome = _with_blocked_import(unmeasured, "lm_eval")
        assert refused(outcome, "pip install 'spinlm[eval]'").count("\n") == 1


def _with_blocked_import(place: Path, module: str) -> Outcome:
    code = f"import sys; sys.modules[{module!r}] = None; from spinlm.cli import main; sys.argv[0] = 'spinlm'; main()"
    return spinlm_process(*EVALUATE, cwd=place, launcher=("-c", code), **os.environ)


def _write_bad_files(folder: Path) -> None:
    say = (folder / "say.yaml").read_text()
    files = {
        "unknown.yaml": json.dumps({"tasks": [{"task": "helaswag"}]}),
        "typo.yaml": json.dumps({"tasks": [{"task": "pick.yaml", "num_fewshoot": 3}]}),
        "metric.yaml": json.dumps({"tasks": [{"task": "pick.yaml", "metric": "f1"}]}),
        "nothing.yaml": "title: a thesis\n",
        "broken.yaml": "task: [\n",
        "far.yaml": say.replace("dataset_path: json", "dataset_path: nobody/nothing"),
        "filter.yaml": say.replace('"[a-z]"', '"[z-a]"'),
        "long.yaml": say.replace("max_gen_toks: 12", "max_gen_toks: 200"),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
