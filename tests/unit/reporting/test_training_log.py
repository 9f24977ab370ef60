"""What a training logged: committed, or so far."""

import json
from pathlib import Path

from made_run import MadeRun
from spinlm.reporting.training_log import committed_log, folder_of, log_so_far, trained_players
from spinlm.training.checkpoints import mark


def checkpoint(made: MadeRun, step: int, whole: bool = True, content: str | None = None) -> None:
    place = made.run.checkpoints("iterations/0") / f"abc/checkpoint-{step}"
    place.mkdir(parents=True)
    history = [{"step": number, "loss": 1 / (number + 1)} for number in range(step + 1)]
    (place / "trainer_state.json").write_text(content or json.dumps({"log_history": history}))
    if whole:
        mark(place)


def test_who_is_trained_and_where(tmp_path: Path) -> None:
    recipe = MadeRun(tmp_path, {"sft": {}, "evaluation": {"control": True}}).run.recipe()
    assert {player: folder_of(player) for player in trained_players(recipe)} == {
        "sft": "sft",
        "iteration-0": "iterations/0",
        "iteration-1": "iterations/1",
        "control": "control",
    }


def test_the_last_whole_checkpoint_of_a_training_under_way(tmp_path: Path) -> None:
    made = MadeRun(tmp_path)
    assert log_so_far(made.run, "iteration-0") == []
    for step in (2, 10):
        checkpoint(made, step)
    checkpoint(made, 12, whole=False)
    assert [row["step"] for row in log_so_far(made.run, "iteration-0")] == list(range(11))
    assert committed_log(made.run, "iteration-0") == []


def test_a_checkpoint_that_can_not_be_read_leaves_the_one_before(tmp_path: Path) -> None:
    made = MadeRun(tmp_path)
    checkpoint(made, 1)
    checkpoint(made, 2, content='{"log_hist')
    assert len(log_so_far(made.run, "iteration-0")) == 2


def test_one_that_is_something_else_by_now_is_not_read(tmp_path: Path) -> None:
    made = MadeRun(tmp_path)
    for step in (1, 2):
        checkpoint(made, step)
    (changed,) = made.path.glob("checkpoints/iterations/0/abc/checkpoint-2/trainer_state.json")
    changed.write_text(changed.read_text().replace("0.5", "0.6"))
    assert [row["loss"] for row in log_so_far(made.run, "iteration-0")] == [1, 0.5]


def test_what_is_committed_goes_first(tmp_path: Path) -> None:
    made = MadeRun(tmp_path)
    checkpoint(made, 2)
    made.training("iteration-0", [{"step": 5, "loss": 0.1}])
    assert log_so_far(made.run, "iteration-0") == [{"step": 5, "loss": 0.1}]
