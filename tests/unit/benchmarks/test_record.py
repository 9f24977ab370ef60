"""Turns and ratios worked by hand; results that outlive an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import Record, Results, Spread, Turn, alternating, ratios
from benchmarks.table import markdown
from spinlm.errors import UserError

HEADER: dict[str, Any] = {
    "machine": {"cpu": "abacus", "cores": 2, "vector_units": [], "memory_gib": 1, "matrix_peak_gflops": 3},
    "versions": {"torch": "1"},
}


class Given:
    """A side whose times are given."""

    def __init__(self, name: str, *seconds: float, amount: float = 12) -> None:
        self.name = name
        self._turns = iter([Turn(name, s, amount, {}) for s in seconds])

    def turn(self) -> Turn:
        return next(self._turns)


def _results(path: Path, keep: bool = False, header: dict[str, Any] = HEADER) -> Results:
    return Results(path, header, keep, say=lambda text: None)


def _measured(results: Results, name: str = "train", settings: dict[str, Any] | None = None) -> Record:
    """A at 2, 3 and 6 pairs a second around B at 1 and 2."""
    ours, other = Given("ours", 6, 4, 2), Given("TRL", 12, 6)
    record = results.begin(name, settings or {"pairs": 12})
    record.take_turns(ours, [other], rounds=2)
    record.ratio("pairs/s", ours, other, at_least=2.5)
    return record


def test_every_other_side_stands_between_two_of_ours() -> None:
    a, b, c = Given("a"), Given("b"), Given("c")
    assert "".join(side.name for side in alternating(a, [b], 2)) == "ababa"
    assert "".join(side.name for side in alternating(a, [b, c], 2)) == "abacabaca"


def test_ratios_are_of_turns_that_follow_one_another(tmp_path: Path) -> None:
    record = _measured(_results(tmp_path / "results.json"))
    assert [turn.side for turn in record.turns] == ["ours", "TRL", "ours", "TRL", "ours"]
    assert ratios(record.turns, "ours", "TRL") == pytest.approx([2 / 1, 3 / 1, 3 / 2, 6 / 2])
    assert ratios(record.turns, "ours", "vLLM") == []


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(1.0, 2.5, 10.0, 4)
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_what_is_measured_is_on_the_disk_at_once(tmp_path: Path) -> None:
    results = _results(tmp_path / "deep" / "results.json")
    record = _measured(results)
    record.check("loss", 0.5, 0.1)
    text = markdown(_read(results))
    assert "| train | pairs/s | TRL | 2.5 | 1.5 to 3 (4) | ≥ 2.5 | yes | NO |" in text
    assert not results.is_finished("train", {"pairs": 12}), "it was interrupted"


def test_resuming_keeps_what_is_whole_and_by_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = _results(path)
    for name in ("whole", "failed", "interrupted"):
        _measured(first, name)
    first.finish("whole", 1.0)
    first.finish("failed", 1.0, failed="failed: no memory")
    resumed = _results(path, keep=True)
    assert resumed.is_finished("whole", {"pairs": 12})
    assert not resumed.is_finished("whole", {"pairs": 13})
    assert not resumed.is_finished("failed", {"pairs": 12})
    assert not resumed.is_finished("interrupted", {"pairs": 12})
    _measured(resumed, "failed")
    assert _read(resumed)["measures"]["whole"] == _read(first)["measures"]["whole"]
    assert len(_read(resumed)["measures"]["failed"]["turns"]) == 5, "a measure begins anew"
    assert not _results(path).is_finished("whole", {"pairs": 12}), "all is measured anew"


def test_a_file_is_of_one_machine_and_one_set_of_versions(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    _measured(_results(path))
    other_peak = HEADER | {"machine": HEADER["machine"] | {"matrix_peak_gflops": 2}}
    assert _measured(_results(path, keep=True, header=other_peak), "other").turns, "noise in the peak is no difference"
    for other in (
        HEADER | {"machine": HEADER["machine"] | {"cpu": "slide rule"}},
        HEADER | {"versions": {"torch": "2"}},
    ):
        with pytest.raises(UserError, match="another machine or with other versions"):
            _results(path, keep=True, header=other)
        _results(path, header=other)


def test_going_on_with_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(UserError, match="no measures"):
        _results(tmp_path / "results.json", keep=True)


def _read(results: Results) -> dict[str, Any]:
    from benchmarks.record import read_results

    return read_results(results.path)
