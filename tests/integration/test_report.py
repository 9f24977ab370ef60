"""`spinlm report` on real runs: finished, interrupted, going on, broken, several, served."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spinlm as package
from integration.command import Waiting, contents, flip_a_byte, refused, rows, spinlm, succeeded, waiting_at

RUN = ("run", "recipe.yaml", "evaluation.control=true")


def headline(page: Path) -> str:
    found = re.search(r'<h2 id="headline">.*</span> (.*)</h2>', page.read_text(encoding="utf-8"))
    assert found is not None
    return found[1].replace("\u2011", "-")


def state(page: Path) -> str:
    found = re.search(r'<body data-state="(\w+)"', page.read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def test_a_run_leaves_its_report(finished: Path) -> None:
    run = finished / "runs/recipe"
    assert state(run / "report.html") == "finished"
    assert headline(run / "report.html").startswith("Perhaps: iteration-1 is better than sft")
    assert "spinlm export runs/recipe OUT --merge" in (run / "report.html").read_text(encoding="utf-8")


def test_its_metrics_are_the_runs_own(finished: Path) -> None:
    run = finished / "runs/recipe"
    metrics = rows(run / "metrics.jsonl")
    logged = {
        (row["player"], row["step"]): row["value"]
        for row in metrics
        if (row["source"], row["metric"]) == ("training", "loss")
    }
    written = rows(run / "iterations/1/training.jsonl")
    assert [logged["iteration-1", row["step"]] for row in written[1:]] == [row["loss"] for row in written[1:]]
    measures = json.loads((run / "evaluation/iteration-0/measures.json").read_text())
    held_out = {row["metric"]: row for row in metrics if (row["source"], row["player"]) == ("held_out", "iteration-0")}
    assert held_out.keys() == measures.keys()
    assert held_out["real_nll"]["low"] == measures["real_nll"]["low"]
    diagnosed = json.loads((run / "iterations/1/diagnostics.json").read_text())["values"]
    found = [row["metric"] for row in metrics if (row["source"], row["player"]) == ("diagnostics", "iteration-1")]
    assert found == sorted(diagnosed)


def test_writing_it_anew_changes_no_byte_and_shows_the_summary(copied: Path) -> None:
    run = copied / "runs/recipe"
    before = contents(run, without=())
    (run / "report.html").unlink()
    (run / "metrics.jsonl").unlink()
    out = succeeded(spinlm("report", "runs/recipe", cwd=copied)).out
    assert contents(run, without=()) == before
    assert "iteration 1" in out
    assert "Best iteration: iteration-1, by real_nll: " in out
    for t in (0, 1):
        for warning in json.loads((run / f"iterations/{t}/diagnostics.json").read_text())["warnings"]:
            assert f"iteration-{t}: {warning['title']}" in out.split("warnings, to be read before using a model: ")[1]
    assert "use: iteration-1, if anything: by real NLL a token it isn't told from sft." in out
    assert "next: Write the best iteration as a model of its own: spinlm export runs/recipe OUT --merge" in out
    assert "\nreport: runs/recipe/report.html\n" in out


def test_to_another_place(finished: Path, tmp_path: Path) -> None:
    before = contents(finished, without=())
    succeeded(spinlm("report", "runs/recipe", "--out", str(tmp_path / "new/page.html"), cwd=finished))
    assert contents(finished, without=()) == before
    assert headline(tmp_path / "new/page.html") == headline(finished / "runs/recipe/report.html")


def test_an_interrupted_run(half_finished: Path) -> None:
    run = half_finished / "runs/recipe"
    succeeded(spinlm("report", "runs/recipe", cwd=half_finished))
    assert state(run / "report.html") == "unfinished"
    assert "the command that started it goes on, at iteration 1: generate" in (run / "report.html").read_text()
    assert {row["player"] for row in rows(run / "metrics.jsonl")} == {"base", "sft", "iteration-0"}


def test_a_run_without_anything_measured(place: Path) -> None:
    succeeded(spinlm("generate", *RUN[1:], "--iteration", "0", cwd=place))
    assert headline(place / "runs/recipe/report.html") == "Not known yet: no iteration is measured."
    assert state(place / "runs/recipe/report.html") == "unfinished"
    assert "No iteration is measured yet." in succeeded(spinlm("report", "runs/recipe", cwd=place)).out


class TestWhileARunGoesOn:
    @pytest.fixture
    def waiting(self, place: Path) -> Iterator[Waiting]:
        """The command, stopped between two shards of iteration 1's responses until it is told to go on."""
        waiting = waiting_at("iterations/1/synthetic/00001", RUN, place)
        yield waiting
        waiting.kill()

    def test_its_page_says_so_until_it_is_done(self, place: Path, waiting: Waiting) -> None:
        page = place / "runs/recipe/report.html"
        assert state(page) == "running"
        succeeded(spinlm("report", "runs/recipe", cwd=place))
        assert state(page) == "running"
        assert "<td>1 of 3</td>" in page.read_text(encoding="utf-8")
        succeeded(waiting.go_on())
        assert state(page) == "finished"

    def test_one_that_was_killed_is_called_unfinished(self, place: Path, waiting: Waiting) -> None:
        waiting.kill()
        succeeded(spinlm("report", "runs/recipe", cwd=place))
        assert state(place / "runs/recipe/report.html") == "unfinished"


def test_a_run_that_ends_by_an_error_is_not_called_running(place: Path) -> None:
    message = refused(spinlm(*RUN, "training.learning_rate=1e30", "training.max_grad_norm=0", cwd=place))
    assert "training stopped at step" in message
    assert state(place / "runs/recipe/report.html") == "unfinished"


def test_a_page_that_can_not_be_written_stops_no_run(place: Path, finished: Path) -> None:
    (place / "runs/recipe").mkdir(parents=True)
    (place / "runs/recipe/lock").write_text("")
    started = spinlm("generate", *RUN[1:], "--iteration", "0", cwd=place)
    succeeded(started)
    (place / "runs/recipe/report.html").unlink()
    (place / "runs/recipe/report.html").mkdir()
    out = succeeded(spinlm(*RUN, cwd=place)).out
    assert "runs/recipe/report.html: not written: IsADirectoryError" in out
    assert "next: Write the best iteration as a model of its own: spinlm export runs/recipe OUT --merge" in out
    (place / "runs/recipe/report.html").rmdir()
    assert contents(place / "runs/recipe") == contents(finished / "runs/recipe")


class TestComparing:
    def test_two_runs(self, finished: Path, without_sft: Path, tmp_path: Path) -> None:
        one, other = str(finished / "runs/recipe"), str(without_sft / "runs/recipe")
        out = succeeded(spinlm("report", one, other, cwd=tmp_path)).out
        assert out == "comparison: comparison.html\n"
        text = (tmp_path / "comparison.html").read_text(encoding="utf-8")
        assert "iterations: 2 -&gt; 1" in text
        assert "sft.learning_rate: 0.01 -&gt; None" in text
        assert "hold out different examples" not in text
        assert [path.name for path in tmp_path.iterdir()] == ["comparison.html"]

    def test_to_another_place(self, finished: Path, without_sft: Path, tmp_path: Path) -> None:
        runs = (str(finished / "runs/recipe"), str(without_sft / "runs/recipe"))
        succeeded(spinlm("report", *runs, "--out", "ab.html", cwd=tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["ab.html"]

    def test_with_no_run(self, finished: Path, tmp_path: Path) -> None:
        refused(spinlm("report", "runs/recipe", "runs/other", cwd=finished), "runs/other", "not a run directory")
        assert not (finished / "comparison.html").exists()


class TestServing:
    def test_the_page_at_an_address_and_the_way_to_it(self, finished: Path) -> None:
        arguments = [sys.executable, "-u", "-m", "spinlm", "report", "runs/recipe", "--serve", "--port", "0"]
        server = subprocess.Popen(arguments, cwd=finished, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert server.stdout is not None
        first, second = server.stdout.readline(), server.stdout.readline()
        found = re.fullmatch(r"runs/recipe: http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)\n", first)
        assert found is not None, first
        assert f"ssh -N -L {found[1]}:127.0.0.1:{found[1]} " in second
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20)
        connection.request("GET", "/")
        assert "Perhaps: iteration\u20111 is better than sft" in connection.getresponse().read().decode()
        server.send_signal(signal.SIGINT)
        _, complaints = server.communicate(timeout=20)
        assert (server.returncode, complaints) == (0, "")

    def test_of_one_run_only(self, finished: Path) -> None:
        refused(spinlm("report", "runs/recipe", "runs/recipe", "--serve", cwd=finished), "--serve", "one RUN")
        refused(spinlm("report", "runs/recipe", "--serve", "--out", "x.html", cwd=finished), "--serve", "--out")

    def test_no_run(self, finished: Path) -> None:
        refused(spinlm("report", "runs/other", "--serve", cwd=finished), "runs/other", "not a run directory")


class TestBrokenRuns:
    @pytest.mark.parametrize(
        "name",
        [
            "data/held_out.jsonl",
            "evaluation/sft/measures.json",
            "evaluation/iteration-1/examples.jsonl",
            "evaluation/base/sampled/00000.jsonl",
            "iterations/0/training.jsonl",
            "iterations/1/diagnostics.json",
            "commits/evaluation--control--measures.json.json",
            "layout.json",
        ],
    )
    @pytest.mark.parametrize("damage", ["cut short", "gone", "a byte"])
    def test_the_file_is_named(self, copied: Path, name: str, damage: str) -> None:
        path = copied / "runs/recipe" / name
        if damage == "cut short":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif damage == "a byte":
            flip_a_byte(path)
        elif name.startswith("commits/"):
            pytest.skip("an artifact without a record was interrupted, which is no damage")
        else:
            path.unlink()
        before = contents(copied / "runs/recipe", without=())
        refused(spinlm("report", "runs/recipe", cwd=copied), f"runs/recipe/{name}: ", "--repair")
        assert contents(copied / "runs/recipe", without=()) == before

    def test_the_header(self, copied: Path) -> None:
        (copied / "runs/recipe/run.json").write_text('{"recipe": {"itera')
        refused(spinlm("report", "runs/recipe", cwd=copied), "runs/recipe/run.json: not what was written")

    def test_timings_cut_short_are_no_damage(self, copied: Path) -> None:
        path = copied / "runs/recipe/timings.jsonl"
        path.write_text(path.read_text()[:-20])
        succeeded(spinlm("report", "runs/recipe", cwd=copied))

    def test_a_file_is_no_run(self, copied: Path) -> None:
        refused(spinlm("report", "recipe.yaml", cwd=copied), "recipe.yaml: not a run directory")

    def test_a_place_that_can_not_be_written(self, finished: Path) -> None:
        refused(spinlm("report", "runs/recipe", "--out", "recipe.yaml/page.html", cwd=finished), "can't be written")


def test_from_python(finished: Path) -> None:
    run = package.Run(finished / "runs/recipe")
    evaluations = run.evaluations
    assert list(evaluations.columns) == ["player", "iteration", "measure", "value", "low", "high", "prompts"]
    best = evaluations.query("measure == 'real_nll'").dropna(subset="iteration").sort_values("value").iloc[0]
    assert (best["player"], best["iteration"], best["prompts"]) == ("iteration-1", 1, 3)
    assert best["value"] == run.measures["iteration-1"]["real_nll"]["value"]
    metrics = run.metrics
    assert len(metrics) == len(rows(finished / "runs/recipe/metrics.jsonl"))
    assert metrics.query("source == 'training' and player == 'sft' and metric == 'loss'")["step"].tolist() == [1, 2, 3]
