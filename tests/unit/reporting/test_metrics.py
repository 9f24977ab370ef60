"""metrics.jsonl: every number of a run, whatever it has come to, in one schema."""

import json
import math
from pathlib import Path

import pytest

from made_run import Made, MadeExample, MadeRun
from spinlm.errors import UserError
from spinlm.reporting.metrics import evaluations_frame, metrics_frame, write_metrics
from spinlm.rundir import RunDir
from spinlm.training.checkpoints import mark

EXAMPLES = [MadeExample("a", tokens=10), MadeExample("b", tokens=10)]


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    made = MadeRun(tmp_path / "run").data(EXAMPLES)
    made.player("base", [Made(real_logprob=-20.0), Made(real_logprob=-10.0)])
    return made


def rows(made: MadeRun) -> list[tuple[object, ...]]:
    write_metrics(made.run)
    lines = (made.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [tuple(json.loads(line).values()) for line in lines]


def test_the_schema(made: MadeRun) -> None:
    write_metrics(made.run)
    first = json.loads((made.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert list(first) == ["source", "player", "step", "metric", "value", "low", "high", "count"]


def test_held_out_measures(made: MadeRun) -> None:
    assert ("held_out", "base", None, "real_nll", 1.5, 1.0, 2.0, 2) in rows(made)


def test_training_and_diagnostics(made: MadeRun) -> None:
    log = [{"step": 0, "start_loss": 0.69}, {"step": 1, "loss": 0.5, "grad_norm": math.inf}]
    made.training("iteration-0", log).diagnostics(0, {"reward_accuracy": 0.9, "drift": math.nan})
    found = rows(made)
    assert found[:3] == [
        ("training", "iteration-0", 0, "start_loss", 0.69, None, None, None),
        ("training", "iteration-0", 1, "grad_norm", None, None, None, None),
        ("training", "iteration-0", 1, "loss", 0.5, None, None, None),
    ]
    assert found[-2:] == [
        ("diagnostics", "iteration-0", None, "drift", None, None, None, None),
        ("diagnostics", "iteration-0", None, "reward_accuracy", 0.9, None, None, None),
    ]


def test_only_what_is_committed(made: MadeRun) -> None:
    """A training that is under way has checkpoints, which another start may well not find again."""
    checkpoint = made.run.checkpoints("iterations/0") / "abc/checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 0.5}]}')
    mark(checkpoint)
    assert {row[0] for row in rows(made)} == {"held_out"}


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    assert rows(MadeRun(tmp_path)) == []
    assert list(metrics_frame(RunDir(tmp_path)).columns) == [
        "source", "player", "step", "metric", "value", "low", "high", "count",
    ]  # fmt: skip
    assert evaluations_frame(RunDir(tmp_path)).empty


def test_the_frames(made: MadeRun) -> None:
    made.training("iteration-0", [{"step": 1, "loss": 0.5}])
    made.player("iteration-0", [Made(real_logprob=-5.0, margin=1.0), Made(real_logprob=-5.0, margin=-1.0)])
    metrics = metrics_frame(made.run)
    assert metrics.query("source == 'training'")[["step", "metric", "value"]].to_numpy().tolist() == [[1, "loss", 0.5]]
    assert metrics["step"].dtype == "Int64"
    evaluations = evaluations_frame(made.run)
    by_name = evaluations.set_index(["player", "measure"])
    assert by_name.loc[("iteration-0", "real_nll"), "value"] == 0.5
    assert by_name.loc[("iteration-0", "discriminability"), ["value", "prompts"]].tolist() == [0.5, 2]
    assert by_name.loc[("iteration-0", "real_nll"), "iteration"] == 0
    assert evaluations.query("player == 'base'")["iteration"].isna().all()
    assert ("base", "discriminability") not in by_name.index


def test_a_changed_file_is_named(made: MadeRun) -> None:
    (made.path / "evaluation/base/measures.json").write_text("{}")
    with pytest.raises(UserError, match=r"evaluation/base/measures.json: not what was committed .*--repair"):
        write_metrics(made.run)
