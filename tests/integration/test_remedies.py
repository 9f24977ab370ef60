"""The options against what goes wrong in self-play, in whole runs: each by what it leaves in the run directory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import pytest

from integration.command import (
    CHECKPOINTED,
    RECORDED,
    TORCHRUN,
    after,
    before,
    contents,
    differing,
    flip_a_byte,
    killed_at,
    refused,
    rows,
    spinlm,
    spinlm_process,
    succeeded,
    write_recipe,
)
from spinlm.errors import UserError
from spinlm.training.spin_trainer import SPINConfig, SPINTrainer

ONE_BATCH = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 1}
"""The check of an iteration's start, which looks at the first batch, sees every pair."""


def _run(place: Path, name: str, **changes: Any) -> Path:
    write_recipe(place / "recipe.yaml", {"run_dir": f"runs/{name}", **changes})
    succeeded(spinlm("run", "recipe.yaml", cwd=place))
    return place / "runs" / name


def _scores(run: Path, folder: str) -> list[dict[str, Any]]:
    return [row for path in sorted((run / folder).glob("*.jsonl")) for row in rows(path)]


def _responses(run: Path, iteration: int) -> list[list[int]]:
    return [row["responses"][0]["token_ids"] for row in _scores(run, f"iterations/{iteration}/synthetic")]


def _start(run: Path, iteration: int) -> dict[str, float]:
    return rows(run / f"iterations/{iteration}/training.jsonl")[0]


def _logistic(margin: float) -> float:
    return math.log1p(math.exp(-margin))


def _real(run: Path) -> list[list[int]]:
    return [row["real_ids"] for row in rows(run / "data/train.jsonl")]


class TestMixture:
    @pytest.mark.parametrize(("mixture", "weights"), [([3.0, 1.0], (0.75, 0.25)), ("uniform", (0.5, 0.5))])
    def test_margins_are_measured_against_the_weighted_log_probs(
        self, place: Path, mixture: Any, weights: tuple[float, float]
    ) -> None:
        run = _run(place, "mixed", training={**ONE_BATCH, "mixture": mixture, "beta": 0.5, "replay": 0})
        now, past = (_scores(run, f"iterations/1/{name}") for name in ("opponent_logprobs", "mixture/0"))
        margins = []
        for mine, theirs, real, synthetic in zip(now, past, _real(run), _responses(run, 1), strict=True):
            if real != synthetic:  # the main player starts as the opponent of now, beside the mixture
                of_real = mine["real"] - (weights[0] * mine["real"] + weights[1] * theirs["real"])
                (one,), (other,) = mine["others"]["1"], theirs["others"]["1"]
                margins.append(0.5 * (of_real - (one - (weights[0] * one + weights[1] * other))))
        assert max(map(abs, margins)) > 1e-2, "the two opponents differ"
        assert _start(run, 1)["start_margin"] == pytest.approx(max(map(abs, margins)), rel=1e-3)
        assert _start(run, 1)["start_loss"] == pytest.approx(fmean(map(_logistic, margins)), rel=1e-4)
        assert _start(run, 0)["start_margin"] == pytest.approx(0, abs=1e-4), "only one opponent has played yet"


def test_the_triplet_loss_sets_the_opponents_response_against_the_starting_players(place: Path) -> None:
    training = {**ONE_BATCH, "loss": "triplet", "beta": 0.1, "history_weight": 0.5, "replay": 1}
    run = _run(place, "triplet", training=training)
    scores = _scores(run, "iterations/1/opponent_logprobs")
    losses = []
    for row, real, new, old in zip(scores, _real(run), _responses(run, 1), _responses(run, 0), strict=True):
        of_real, of_new, of_old = row["real"], row["others"]["1"][0], row["others"]["0"][0]
        if new != real:
            losses.append(_logistic(0.1 * (of_real - of_new)) + 0.5 * _logistic(0.1 * (of_new - of_old)))
        if old != real:  # the replayed pair: its synthetic response is the starting player's
            losses.append(_logistic(0.1 * (of_real - of_old)) + 0.5 * math.log(2))
    assert _start(run, 1)["start_loss"] == pytest.approx(fmean(losses), rel=1e-4)


def test_the_noise_contrastive_loss_starts_with_two_even_guesses(place: Path) -> None:
    run = _run(place, "space", iterations=1, training={"loss": "noise_contrastive"})
    assert _start(run, 0)["start_loss"] == pytest.approx(2 * math.log(2), abs=1e-4)


def test_per_token_log_probs_are_what_held_out_margins_are_made_of(place: Path) -> None:
    run = _run(place, "per-token", iterations=1, training={"length_normalised": True, "beta": 5.0})
    data = rows(run / "data/held_out.jsonl")
    players = [_scores(run, f"evaluation/{name}/logprobs") for name in ("iteration-0", "sft")]
    said = _scores(run, "evaluation/sft/sampled")
    found = rows(run / "evaluation/iteration-0/examples.jsonl")
    for example, mine, theirs, answers, row in zip(data, *players, said, found, strict=True):
        real = (mine["real"] - theirs["real"]) / len(example["real_ids"])
        ids = answers["responses"][0]["token_ids"]
        other = (mine["others"]["opponent"][0] - theirs["others"]["own"][0]) / len(ids)
        assert row["margins"] == pytest.approx([5.0 * (real - other)])


class TestRegeneration:
    CHANGES: ClassVar[dict[str, Any]] = {
        "iterations": 1,
        "training": {"regenerate_every": 2, "num_train_epochs": 2, "learning_rate": 3e-2, "warmup_steps": 0.0},
    }

    def test_each_round_starts_from_what_the_player_says_now(self, place: Path) -> None:
        run = _run(place, "rounds", **self.CHANGES)
        log = {row["step"]: row for row in rows(run / "iterations/0/training.jsonl") if "loss" in row}
        assert max(log) == 6
        begins = [abs(log[step]["margin"]) for step in (1, 3, 5)]
        goes_on = [abs(log[step]["margin"]) for step in (2, 4, 6)]
        assert max(begins) < 1e-4 < min(goes_on)
        made = [rows(path) for path in sorted((run / "iterations/0/rounds").iterdir())]
        assert 4 < len(made[0]) <= 8, "two steps of four pairs, in two epochs, where a pair may come twice"
        assert len(made[1]) == 8
        data = [(row["prompt_ids"], row["real_ids"]) for row in rows(run / "data/train.jsonl")]
        assert all((pair["prompt_ids"], pair["real_ids"]) in data for pairs in made for pair in pairs)
        first = {tuple(ids) for ids in _responses(run, 0)}
        assert any(tuple(pair["synthetic_ids"]) not in first for pair in made[0])
        learning_rates = [log[step]["learning_rate"] for step in range(2, 7)]
        assert learning_rates == sorted(learning_rates, reverse=True), "one schedule over all rounds"

    def test_only_what_is_trained_on_is_made(self, place: Path) -> None:
        training = {**self.CHANGES["training"], "regenerate_every": 5}
        run = _run(place, "rounds", iterations=1, training=training)
        assert len(rows(run / "iterations/0/rounds/00001.jsonl")) == 4, "six steps of four pairs: one is left"

    @pytest.mark.slow
    def test_killed_within_rounds_it_ends_with_the_same_bytes(self, place: Path) -> None:
        run = _run(place, "rounds", **self.CHANGES)
        write_recipe(place / "again.yaml", {"run_dir": "runs/again", **self.CHANGES})
        killed_at(
            before(RECORDED, "commits/iterations--0--rounds--00001"),  # made, and not recorded
            after(CHECKPOINTED, "checkpoints/iterations/0/.*/checkpoint-3.json"),  # in the middle of a round
            after(RECORDED, "commits/iterations--0--rounds--00002"),  # before its first step
            None,
            arguments=("run", "again.yaml"),
            cwd=place,
        )
        assert [name for name in differing(run, place / "runs/again") if name not in ("run.json", "report.md")] == []


class TestKeepBest:
    CHANGES: ClassVar[dict[str, Any]] = {"keep": "best", "training": {"learning_rate": 0.3}}
    """At which each further step makes it worse."""

    def test_the_best_checkpoint_is_the_main_player(self, place: Path) -> None:
        run = _run(place, "best", **self.CHANGES)
        for t in (0, 1):
            kept = json.loads((run / f"iterations/{t}/kept.json").read_text())
            values = {name: value["value"] for name, value in kept["values"].items()}
            assert kept["measure"] == "real_nll"
            assert list(values) == [*(f"{step:06d}" for step in range(1, len(values))), "last"]
            assert values[kept["checkpoint"]] == min(values.values()) < values["last"]
            measured = json.loads((run / f"evaluation/iteration-{t}/measures.json").read_text())
            assert measured["real_nll"]["value"] == pytest.approx(values[kept["checkpoint"]], rel=1e-5)
            assert not {"candidates", "choosing"} & {path.name for path in (run / f"iterations/{t}").iterdir()}
        assert not any("candidates" in name or "choosing" in name for name in contents(run))

    @pytest.mark.slow
    def test_where_the_last_is_best_it_is_the_same_as_keeping_the_last(self, place: Path) -> None:
        changes = {"iterations": 1, "training": {"learning_rate": 1e-3}}
        best, last = _run(place, "best", keep="best", **changes), _run(place, "last", **changes)
        assert json.loads((best / "iterations/0/kept.json").read_text())["checkpoint"] == "last"
        name = "iterations/0/adapter/adapter_model.safetensors"
        assert (best / name).read_bytes() == (last / name).read_bytes()

    @pytest.mark.slow
    def test_killed_while_training_and_choosing_it_ends_with_the_same_bytes(self, place: Path) -> None:
        changes = {**self.CHANGES, "iterations": 1, "evaluation": {"select_by": "repetition_rate"}}
        run = _run(place, "best", **changes)
        write_recipe(place / "again.yaml", {"run_dir": "runs/again", **changes})
        killed_at(
            after(RECORDED, "commits/iterations--0--candidates--000001"),  # its checkpoint doesn't count yet
            after(CHECKPOINTED, "checkpoints/iterations/0/.*/checkpoint-2.json"),
            before(RECORDED, "commits/iterations--0--candidates--last"),
            after(RECORDED, "commits/iterations--0--choosing--000002--sampled"),
            before(RECORDED, "commits/iterations--0--kept"),
            before(RECORDED, "commits/iterations--0--adapter"),
            after(RECORDED, "commits/iterations--0--adapter"),  # what has served is still there
            None,
            arguments=("run", "again.yaml"),
            cwd=place,
        )
        assert [name for name in differing(run, place / "runs/again") if name not in ("run.json", "report.md")] == []

    @pytest.mark.slow
    def test_a_fork_takes_over_what_was_kept_or_every_candidate(self, place: Path) -> None:
        changes = {**self.CHANGES, "iterations": 1}
        run = _run(place, "best", **changes)
        kept = json.loads((run / "iterations/0/kept.json").read_text())
        succeeded(spinlm("run", "recipe.yaml", "--fork", "runs/fork", cwd=place))
        assert [name for name in differing(run, place / "runs/fork") if name not in ("run.json", "report.md")] == []
        write_recipe(place / "recipe.yaml", {"run_dir": "runs/cut", **changes})
        choosing = before(RECORDED, "commits/iterations--0--kept")
        killed_at(choosing, arguments=("run", "recipe.yaml"), cwd=place)
        succeeded(spinlm("run", "recipe.yaml", "--fork", "runs/other", cwd=place))
        assert json.loads((place / "runs/other/iterations/0/kept.json").read_text()) == kept

    @pytest.mark.slow
    def test_a_damaged_candidate_is_found(self, place: Path) -> None:
        write_recipe(place / "recipe.yaml", {**self.CHANGES, "iterations": 1})
        killed_at(before(RECORDED, "commits/iterations--0--kept"), arguments=("run", "recipe.yaml"), cwd=place)
        run = place / "runs/recipe"
        flip_a_byte(run / "iterations/0/candidates/000001/adapter_model.safetensors")
        refused(spinlm("run", "recipe.yaml", cwd=place), "candidates/000001", "--repair")
        succeeded(spinlm("run", "recipe.yaml", "--repair", cwd=place))
        whole = _run(place, "whole", **self.CHANGES, iterations=1)
        assert [name for name in differing(run, whole) if name not in ("run.json", "report.md")] == []


class TestStop:
    def test_without_gain_beyond_noise(self, place: Path) -> None:
        changes = {"iterations": 4, "training": {"learning_rate": 0.3}, "stop": {"patience": 2}}
        run = _run(place, "patience", **changes)
        stopped = json.loads((run / "stopped.json").read_text())
        assert stopped["iterations"] == 2
        assert stopped["reason"] == "real_nll hasn't improved beyond noise for 2 iterations (stop.patience: 2)"
        assert sorted(path.name for path in (run / "iterations").iterdir()) == ["0", "1"], "nothing for the next one"
        kept = contents(run, without=())
        again = succeeded(spinlm("run", "recipe.yaml", cwd=place))
        assert "stopped after 2 iterations: real_nll hasn't improved" in again.out
        assert contents(run, without=()) == kept
        assert "all done" in succeeded(spinlm("status", "runs/patience", cwd=place)).out
        refused(spinlm("generate", "recipe.yaml", cwd=place), "has stopped, since real_nll", "--iteration")
        assert contents(run, without=()) == kept
        succeeded(spinlm("generate", "recipe.yaml", "--iteration", "2", cwd=place))

    @pytest.mark.slow
    def test_after_the_last_iteration_there_is_nothing_to_stop(self, place: Path) -> None:
        run = _run(place, "last", training={"learning_rate": 0.3}, stop={"patience": 2})
        assert not (run / "stopped.json").exists()

    def test_goes_on_while_it_gets_better(self, place: Path) -> None:
        training, data = {"learning_rate": 1e-2, "nll_weight": 5.0}, {"held_out": 7}
        run = _run(place, "better", sft=None, training=training, data=data, stop={"patience": 1})
        assert sorted(path.name for path in (run / "iterations").iterdir()) == ["0", "1"]
        assert not (run / "stopped.json").exists()

    def test_when_the_opponent_cannot_be_told_from_people(self, place: Path) -> None:
        run = _run(place, "fixed-point", iterations=3, stop={"min_discriminability": 0.999})
        found = json.loads((run / "evaluation/iteration-0/measures.json").read_text())["discriminability"]["value"]
        stopped = json.loads((run / "stopped.json").read_text())
        assert found < 0.999
        assert stopped["iterations"] == 1
        assert f"on only {found:.0%} of the held-out pairs" in stopped["reason"]


@pytest.mark.slow
def test_regeneration_in_several_processes_is_refused(place: Path) -> None:
    outcome = spinlm_process("run", "recipe.yaml", "training.regenerate_every=2", cwd=place, launcher=TORCHRUN)
    assert outcome.code != 0
    assert "spinlm: training.regenerate_every: works in one process, and this run has 2" in outcome.err


@pytest.mark.parametrize("held_out", [0, 0.01])
@pytest.mark.parametrize("choice", [{"keep": "best"}, {"stop": {"patience": 1}}])
def test_nothing_to_choose_by_is_refused(place: Path, held_out: float, choice: dict[str, Any]) -> None:
    write_recipe(place / "recipe.yaml", {"data": {"held_out": held_out}, **choice})
    refused(spinlm("run", "recipe.yaml", cwd=place), "needs held-out examples", f"data.held_out: {held_out}")
    assert not (place / "runs/recipe/sft").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"regenerate_every": 2, "mixture": "uniform"}}, ["mixture", "regenerate_every"]),
        ({"training": {"dataloader_drop_last": True}}, ["dataloader_drop_last is decided by the run"]),
        ({"training": {"noise_ratio": 2.0}}, ["noise_ratio", "loss: noise_contrastive"]),
        ({"training": {"history_weight": 2.0}}, ["history_weight", "loss: triplet"]),
        ({"training": {"loss": "triplet", "mixture": "uniform"}}, ["mixture", "triplet"]),
        ({"training": {"mixture": [0.0, 1.0]}}, ["mixture", "above 0"]),
        ({"training": {"mixture": []}}, ["mixture"]),
        ({"training": {"skip_nonfinite": 1, "deepspeed": "z.json"}}, ["skip_nonfinite: deepspeed changes the weights"]),
        ({"training": {"skip_nonfinite": 1, "optim": "adalomo"}}, ["skip_nonfinite: optim: adalomo changes"]),
        ({"training": {"regenerate_every": 2, "fsdp": "full_shard"}}, ["regenerate_every", "fsdp"]),
        ({"keep": "best", "training": {"deepspeed": "zero3.json"}}, ["keep: best", "deepspeed"]),
    ],
)
def test_what_does_not_go_together_is_refused(place: Path, changes: dict[str, Any], words: list[str]) -> None:
    write_recipe(place / "recipe.yaml", changes)
    refused(spinlm("run", "recipe.yaml", cwd=place), *words)
    assert not (place / "runs").exists()


class TestIdenticalPairs:
    """Where a model says what people say: no margin tells those responses apart, but other losses look at them."""

    def test_teach_a_loss_of_margins_nothing_and_others_something(self, place: Path) -> None:
        trainers = {}
        for name, training in {
            "margins": {},
            "anchored": {"nll_weight": 0.1},
            "space": {"loss": "noise_contrastive"},
        }.items():
            args = SPINConfig(str(place / name), report_to="none", use_cpu=True, **training)
            same = {"prompt_ids": [1, 2], "real_ids": [3, 4], "synthetic_ids": [3, 4]}
            other = {**same, "synthetic_ids": [5]}
            trainers[name] = SPINTrainer(str(place / "model"), args, [same, other], pad_id=0)
        found = {name: (len(t.train_dataset), t.dropped_identical) for name, t in trainers.items()}
        assert found == {"margins": (1, 1), "anchored": (2, 0), "space": (2, 0)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0.0}, "beta"),
        ({"noise_ratio": 0.0}, "noise_ratio"),
        ({"nll_weight": -1.0}, "nll_weight"),
        ({"history_weight": -0.1}, "history_weight"),
        ({"loss": "ipo"}, "none of"),
    ],
)
def test_settings_of_the_trainer_alone_are_checked(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SPINConfig(str(tmp_path), **settings)


def test_a_run_of_responses_that_are_all_cut_says_so(place: Path) -> None:
    """What is seen, kept, and said in the terminal: from the shards to the words."""
    generation = {"max_new_tokens": 3, "responses_per_prompt": 2}
    write_recipe(place / "recipe.yaml", {"iterations": 1, "generation": generation})
    outcome = succeeded(spinlm("run", "recipe.yaml", cwd=place))
    run = place / "runs/recipe"
    said = [one for row in _scores(run, "iterations/0/synthetic") for one in row["responses"]]
    found = json.loads((run / "iterations/0/diagnostics.json").read_text())
    values, real = found["values"], _real(run)
    assert values["truncation_rate"] == fmean(one["finish_reason"] == "length" for one in said) > 0.5
    assert values["length_synthetic"] == fmean(len(one["token_ids"]) for one in said)
    assert values["length_real"] == fmean(map(len, real))
    assert values["identical_share"] == 0
    longer = [len(real[number // 2]) > len(one["token_ids"]) for number, one in enumerate(said)]
    assert values["told_by_length"] == fmean(longer) == 1.0
    mine, theirs = (rows(run / f"evaluation/{name}/examples.jsonl") for name in ("iteration-0", "sft"))
    tokens = sum(row["real_tokens"] for row in mine)
    change = sum(b["real_logprob"] - a["real_logprob"] for a, b in zip(mine, theirs, strict=True)) / tokens
    assert values["real_nll_change"] == pytest.approx(change)
    assert {"truncation_rate", "length_ratio"} <= {warning["name"] for warning in found["warnings"]}
    for warning in found["warnings"]:
        assert f"warning, iteration 0: {warning['title']}. {warning['message']}" in outcome.out
