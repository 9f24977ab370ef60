"""The page: there at any moment of a run, whole, small, and never in a run's way. What it does is in tests/browser."""

from __future__ import annotations

import base64
import hashlib
import random
import re
from pathlib import Path

import pytest

from made_run import WARNING, Made, MadeExample, MadeRun, plausible
from spinlm.errors import UserError
from spinlm.reporting import html
from spinlm.reporting.html import LivePage, page, write
from spinlm.rundir import RunDir
from spinlm.training.checkpoints import mark

EXAMPLES = [MadeExample(f"e{place}", f"question {place}") for place in range(4)]


def sections(text: str) -> list[str]:
    return re.findall(r'<section id="([a-z-]+)"', text)


def headline(text: str) -> str:
    found = re.search(r'<h2 id="headline">.*</span> (.*)</h2>', text)
    assert found is not None
    return found[1].replace("\u2011", "-")


class TestAtAnyMoment:
    def test_a_run_that_has_only_begun(self, tmp_path: Path) -> None:
        text = page(MadeRun(tmp_path / "run").run, running=True)
        assert headline(text) == "Not known yet: no iteration is measured."
        assert sections(text) == ["verdict", "run"]

    def test_only_data(self, tmp_path: Path) -> None:
        text = page(MadeRun(tmp_path / "run").data(EXAMPLES).run, running=True)
        assert sections(text) == ["verdict", "examples", "run"]
        assert "question 3" in text

    def test_the_start_is_measured(self, tmp_path: Path) -> None:
        text = page(MadeRun(tmp_path / "run").data(EXAMPLES).player("base", [Made()] * 4).run)
        assert sections(text) == ["verdict", "distributions", "examples", "run"]

    def test_a_training_under_way(self, tmp_path: Path) -> None:
        made = MadeRun(tmp_path / "run").data(EXAMPLES)
        checkpoint = made.run.checkpoints("iterations/0") / "abc/checkpoint-2"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 0.7}]}')
        mark(checkpoint)
        assert sections(page(made.run, running=True)) == ["verdict", "training", "examples", "run"]

    def test_nothing_held_out(self, tmp_path: Path) -> None:
        made = MadeRun(tmp_path / "run").data([]).training("iteration-0", [{"step": 1, "loss": 0.7}])
        text = page(made.run)
        assert headline(text).startswith("Not known: nothing was held out")
        assert sections(text) == ["verdict", "training", "run"]

    def test_all_of_it(self, tmp_path: Path) -> None:
        text = page(plausible(tmp_path / "run", examples=4, iterations=2, words=4, steps=3).run)
        assert sections(text) == [
            "verdict", "curves", "training", "distributions", "diagnostics", "examples", "run",
        ]  # fmt: skip

    def test_there_is_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="not a run directory"):
            page(RunDir(tmp_path))


class TestWhatItSays:
    def test_that_it_is_running_unfinished_or_finished(self, tmp_path: Path) -> None:
        made = plausible(tmp_path / "run", examples=4, iterations=1, words=4, steps=3)
        running, finished = page(made.run, running=True), page(made.run)
        assert '<body data-state="running" data-written="20' in running
        assert 'data-refresh="15"' in running
        assert '<body data-state="finished">' in finished
        made.run.forget("iterations/0/adapter")
        assert '<body data-state="unfinished" data-written="20' in page(made.run)
        assert "data-refresh" not in page(made.run)

    def test_a_served_page_finds_out_that_the_run_goes_on(self, tmp_path: Path) -> None:
        made = plausible(tmp_path / "run", examples=4, iterations=1, words=4, steps=3)
        text = page(made.run, served=True)
        assert '<body data-state="finished" data-refresh="60">' in text
        assert "The run isn’t going on. This page reloads itself every 60 seconds" in text
        running = page(made.run, running=True, served=True)
        assert 'data-refresh="15"' in running
        assert "isn’t going on" not in running

    def test_a_finished_page_is_the_same_each_time(self, tmp_path: Path) -> None:
        made = plausible(tmp_path / "run", examples=4, iterations=1, words=4, steps=3)
        assert page(made.run) == page(made.run)

    def test_warnings_and_why_it_stopped(self, tmp_path: Path) -> None:
        made = MadeRun(tmp_path / "run").data(EXAMPLES)
        made.diagnostics(0, {"drift": 0.5}, WARNING, {**WARNING, "title": "Another", "cause": "`beta` is <1"}).stopped(
            1, "no gain for 2 iterations"
        )
        text = page(made.run)
        assert "2 warnings</a> on the way" in text
        for words in ("iteration-0: Real responses become less likely", WARNING["cause"], WARNING["remedy"], "Another"):
            assert words.replace("'", "&#39;") in text
        assert "<dd><code>beta</code> is &lt;1</dd>" in text
        assert "The loop ended after 1 iteration: no gain for 2 iterations" in text

    def test_no_warning(self, tmp_path: Path) -> None:
        text = page(MadeRun(tmp_path / "run").data(EXAMPLES).diagnostics(0, {"drift": 0.5}).run)
        assert "No warning: every diagnostic is within its threshold." in text
        assert "on the way" not in text

    def test_the_recipe_versions_hashes_time_and_tokens(self, tmp_path: Path) -> None:
        made = (
            MadeRun(tmp_path / "run", {"seed": 17})
            .data(EXAMPLES)
            .generated(0)
            .took("iterations/0/synthetic", 90.0, 1800)
        )
        text = page(made.run)
        assert "seed: 17" in text
        assert "<dt>version of torch</dt><dd>2.13.0</dd>" in text
        assert f"<dt>SHA-256 of the dataset</dt><dd>{'0' * 64}</dd>" in text
        assert made.run.hash("data") in text
        row = re.search(r"<tr>.*iteration 0: generate.*</tr>", text)
        assert row is not None
        assert re.findall(r"<td>(.*?)</td>", row[0]) == ["done", "1:30 min", "1,800", "20"]

    def test_time_of_benchmarks(self, tmp_path: Path) -> None:
        made = MadeRun(tmp_path / "run").data(EXAMPLES).took("benchmarks/arena/iteration-0-vs-base/judge", 90.0)
        row = re.search(r"<tr>.*benchmark arena.*</tr>", page(made.run))
        assert row is not None
        assert re.findall(r"<td>(.*?)</td>", row[0]) == ["done", "1:30 min", "–", "–"]

    def test_shards_are_one_row_under_the_hash_that_their_users_know(self, tmp_path: Path) -> None:
        from spinlm.files import digest

        made = MadeRun(tmp_path / "run").data(EXAMPLES).generated(0)
        made.commit("iterations/0/synthetic/00001.jsonl", "generate", [{"id": "t1"}])
        hashes = [made.run.hash(f"iterations/0/synthetic/0000{n}.jsonl") for n in (0, 1)]
        assert (
            f'<th scope="row">iterations/0/synthetic/*.jsonl</th><td>generate</td><td>2</td><td>{digest(hashes)}</td>'
            in page(made.run)
        )


class TestOfItself:
    def test_nothing_is_loaded(self, tmp_path: Path) -> None:
        text = page(plausible(tmp_path / "run", examples=4, iterations=1, words=4, steps=3).run)
        ours = text.replace(html.plotting_library(), "")
        assert not re.findall(
            r'(?:src|href|action|data|poster)=["\']?(?!#|data:,)[^"\'> ]+', ours.partition("<main")[0]
        )
        assert "@import" not in ours
        assert "url(" not in ours

    def test_its_policy_allows_its_own_scripts_and_nothing_else(self, tmp_path: Path) -> None:
        text = page(MadeRun(tmp_path / "run").run)
        scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
        assert len(hashes) == 2
        policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
        assert policy is not None
        assert policy[1].replace("&#39;", "'") == (
            f"default-src 'none'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'; style-src 'unsafe-inline'; "
            "img-src data:; base-uri 'none'; form-action 'none'"
        )

    def test_its_scripts_do_not_end_early(self) -> None:
        for script in (html.plotting_library(), html._own_script()):
            assert "</script" not in script.lower()
            assert "<!--" not in script

    @pytest.mark.parametrize("greedy", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_a_thousand_examples_stay_under_5_mb(self, tmp_path: Path, greedy: bool) -> None:
        """Six players with responses of 600 characters that have nothing in common, and pack worse than English."""
        draw = random.Random(0)
        words = ["".join(draw.choices("etaoinshrdlucmfwypvbgkjqxz", k=draw.randint(2, 9))) for _ in range(5000)]

        def text(length: int = 600) -> str:
            return " ".join(draw.choices(words, k=length // 6))[:length]

        made = MadeRun(tmp_path / "run", {"sft": {}, "iterations": 3, "evaluation": {"control": True}})
        made.data([MadeExample(f"e{n}", text(300), text()) for n in range(1000)])
        for player in ("base", "sft", "iteration-0", "iteration-1", "iteration-2", "control"):
            made.player(player, [Made(text(), greedy=text() if greedy else None) for _ in range(1000)])
        for t in range(3):
            made.training(f"iteration-{t}", [{"step": s, "loss": 1 / 3, "margin": 1 / 7} for s in range(2000)])
        written = write(made.run)
        assert written.stat().st_size < 5_000_000
        found = re.search(r"(\d+) of 1000 examples: those whose outcome", written.read_text(encoding="utf-8"))
        assert (found is not None) is greedy
        if found:
            assert int(found[1]) > 600

    @pytest.mark.slow
    def test_emoji_are_counted_in_bytes(self, tmp_path: Path) -> None:
        """Few examples, whose characters are four bytes each and can't be packed: more than 5 MB in all."""
        draw = random.Random(0)
        made = MadeRun(tmp_path / "run", {"sft": {}, "iterations": 10, "evaluation": {"control": True}})
        made.data([MadeExample(f"e{n}") for n in range(60)])
        names = (
            "loss",
            "margin",
            "reward_accuracy",
            "logprob_per_token_real",
            "logprob_per_token_synthetic",
            "grad_norm",
        )
        for player in ("base", "sft", *(f"iteration-{t}" for t in range(10)), "control"):
            made.player(
                player, [Made("".join(chr(0x1F300 + draw.randrange(700)) for _ in range(1170))) for _ in range(60)]
            )
            rows = [{"step": step, **{name: draw.random() for name in names}} for step in range(1, 101)]
            made.training(player, rows)
        assert write(made.run).stat().st_size < 5_000_000

    def test_a_player_that_has_diverged(self, tmp_path: Path) -> None:
        """Whose numbers aren't numbers: the page is made, and says so."""
        made = MadeRun(tmp_path / "run", {"iterations": 1}).data(EXAMPLES).player("base", [Made(margin=1.0)] * 4)
        nan = float("nan")
        made.player("iteration-0", [Made(real_logprob=nan, margin=nan, logprob=nan)] * 4)
        made.training("iteration-0", [{"step": 1, "loss": nan, "grad_norm": float("inf")}])
        made.diagnostics(0, {"drift": nan})
        assert "nan [nan, nan]" in page(made.run).replace("<small>", " ").replace("</small>", "")

    def test_texts_that_no_encoding_holds(self, tmp_path: Path) -> None:
        made = MadeRun(tmp_path / "run").data([MadeExample("\ud800", "\udfff", "\x00")])
        made.player("base", [Made("\ud83d")])
        assert write(made.run).read_bytes().decode("utf-8")

    def test_markup_of_others_is_text(self, tmp_path: Path) -> None:
        sections = {
            "model": {"name": "<script>alert(1)</script>"},
            "data": {"source": "</script>\u202e{{ 70707 * 7 }}"},
        }
        made = MadeRun(tmp_path / "run", sections).data([MadeExample("</script>", "<!--", "<img onerror=alert(1)>")])
        made.diagnostics(0, {"<b>": 1.0}, {**WARNING, "message": "<img src=x onerror=alert(1)>"})
        text = page(made.run)
        for markup in ("<script>alert", "<b>", "<img", "\u202e", "494949"):
            assert (
                markup
                not in text.replace(html.plotting_library(), "").replace(html._own_script(), "").partition("<main")[2]
            )


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run").data(EXAMPLES).player("base", [Made()] * 4)
    path = made.path / "evaluation/base/examples.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(
        UserError, match=r"evaluation/base/examples.jsonl: not what was committed .*'evaluate'.*--repair"
    ):
        page(made.run)


class TestLivePage:
    @pytest.fixture
    def made(self, tmp_path: Path) -> MadeRun:
        return MadeRun(tmp_path / "run").data(EXAMPLES)

    @pytest.fixture
    def said(self) -> list[str]:
        return []

    def state(self, made: MadeRun) -> str:
        found = re.search(r'data-state="(\w+)"', (made.path / "report.html").read_text(encoding="utf-8"))
        return found[1] if found else ""

    def test_it_says_that_the_run_is_going_on_until_it_ends(self, made: MadeRun, said: list[str]) -> None:
        live = LivePage(made.run, said.append)
        live.update()
        assert self.state(made) == "running"
        live.end()
        assert self.state(made) == "unfinished"
        assert said == []

    def test_what_did_not_begin_does_not_end(self, made: MadeRun, said: list[str]) -> None:
        LivePage(made.run, said.append).end()
        assert not (made.path / "report.html").exists()

    def test_in_the_end_it_shows_all_that_was_committed(self, made: MadeRun, said: list[str]) -> None:
        live = LivePage(made.run, said.append)
        made.training("iteration-0", [{"step": 1, "loss": 0.5}])
        live.end()
        assert sections((made.path / "report.html").read_text(encoding="utf-8"))[1] == "training"
        assert self.state(made) == "unfinished"

    def test_it_is_written_as_often_as_it_is_worth(
        self, made: MadeRun, said: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It costs 2 s here, so it is worth it again 100 s later."""
        written: list[float] = []
        clock = [1000.0]

        def costly(run: RunDir, running: bool) -> None:
            written.append(clock[0])
            clock[0] += 2.0

        monkeypatch.setattr(html, "write", costly)
        monkeypatch.setattr(html.time, "monotonic", lambda: clock[0])
        live = LivePage(made.run, said.append)
        for _ in range(30):
            live.update()
            clock[0] += 10.0
        assert written == [1000.0, 1102.0, 1204.0]
        live.update(now=True)
        assert len(written) == 4

    def test_one_that_can_not_be_written_stops_nothing(self, made: MadeRun, said: list[str]) -> None:
        (made.path / "data/held_out.jsonl").write_text("{")
        live = LivePage(made.run, said.append)
        live.update()
        live.conclude()
        assert len(said) == 2
        assert "report.html: not written: CorruptArtifact: " in said[0]
        assert "data/held_out.jsonl" in said[0]
        assert "\n" not in said[0]

    def test_of_several_processes_one_writes(self, made: MadeRun, said: list[str]) -> None:
        live = LivePage(made.run, said.append, writes=False)
        live.update()
        live.conclude()
        assert not (made.path / "report.html").exists()
