"""The main command from end to end, on a tiny model."""

from __future__ import annotations

from pathlib import Path

from integration.command import contents, spinlm_process, succeeded

SHARDS = ("00000.jsonl", "00001.jsonl", "00002.jsonl")
PLAYERS = ("base", "sft", "iteration-0", "iteration-1", "control")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def _artifacts() -> dict[str, list[str]]:
    """Every artifact of the run by its key, and its files within the run directory."""
    artifacts = {
        "layout.json": ["layout.json"],
        "data": ["data/train.jsonl", "data/held_out.jsonl", "data/dropped.jsonl"],
    }
    for folder in ("sft", "iterations/0", "iterations/1", "control"):
        artifacts[f"{folder}/training.jsonl"] = [f"{folder}/training.jsonl"]
        artifacts[f"{folder}/adapter"] = [f"{folder}/adapter/{name}" for name in ADAPTER]
    for t in (0, 1):
        artifacts[f"iterations/{t}/diagnostics.json"] = [f"iterations/{t}/diagnostics.json"]
        for kind in ("synthetic", "opponent_logprobs"):
            artifacts |= {key: [key] for shard in SHARDS for key in [f"iterations/{t}/{kind}/{shard}"]}
    for player in PLAYERS:
        names = ["sampled/00000.jsonl", "greedy/00000.jsonl", "logprobs/00000.jsonl", "examples.jsonl", "measures.json"]
        names += ["start_logprobs/00000.jsonl"] if player.startswith("iteration-") else []
        artifacts |= {key: [key] for name in names for key in [f"evaluation/{player}/{name}"]}
    return artifacts


def test_leaves_exactly_these_files(finished: Path) -> None:
    artifacts = _artifacts()
    expected = {"run.json", "lock", "timings.jsonl", "report.html", "report.md", "metrics.jsonl", "latest", "best"}
    expected |= {name for names in artifacts.values() for name in names}
    expected |= {f"commits/{key.replace('/', '--')}.json" for key in artifacts}
    found = contents(finished / "runs/recipe", without=())
    assert set(found) == expected
    assert found["latest"] == "iterations/1/adapter"
    assert found["best"] in ("iterations/0/adapter", "iterations/1/adapter")
    assert found["lock"] == b""
    assert {path.name for path in finished.iterdir()} == {"model", "data.jsonl", "recipe.yaml", "runs"}


def test_running_a_finished_run_again_changes_no_byte(copied: Path) -> None:
    before = contents(copied / "runs/recipe", without=())
    again = succeeded(spinlm_process("run", "recipe.yaml", "evaluation.control=true", cwd=copied))
    assert contents(copied / "runs/recipe", without=()) == before
    assert "next: Write the best iteration as a model of its own: spinlm export runs/recipe OUT --merge" in again.out
