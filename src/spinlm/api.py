"""What the command line and Python programs call: run, or run a stage, export, look."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from datetime import timedelta
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING

from spinlm import interruption
from spinlm.config import Recipe, refuse_secrets
from spinlm.errors import OutOfMemory, UserError, writing
from spinlm.files import copy, flush_directory, flush_to_disk, make_directory, read_json, write_json
from spinlm.paths import found
from spinlm.reporting.benchmarks import benchmark_records, benchmark_tables
from spinlm.reporting.card import model_card
from spinlm.reporting.diagnostics import diagnostics
from spinlm.reporting.judged import judged_tables
from spinlm.reporting.metrics import evaluations_frame, metrics_frame
from spinlm.reporting.report import Report, Sample, verdict
from spinlm.reporting.summary import beside_the_others, measured_players, summarise
from spinlm.reporting.training_log import folder_of
from spinlm.reporting.verdict import closing_words
from spinlm.rundir import RunDir, reading

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console

    from spinlm.evaluation.judge import JudgeSettings
    from spinlm.results import Evaluation
    from spinlm.stages import Stages

SAMPLES_SHOWN = 3
_RECORDED = ("spinlm", "torch", "transformers", "peft", "accelerate", "datasets")


class Run:
    """A run directory, for reading.

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises UserError where there is no run."""
        self.path = Path(path)
        self._run_dir = RunDir(self.path)
        self._run_dir.header()

    @cached_property
    def recipe(self) -> Recipe:
        return self._run_dir.recipe()

    def loadable_recipe(self, trust_remote_code: bool = False) -> Recipe:
        """The recipe, to load the run's model by.

        Args:
            trust_remote_code: Let code run that comes with the model, where the recipe says so. Who has the run
                directory from somebody else hasn't said so.

        Raises:
            UserError: The recipe says so, and you don't.
        """
        if self.recipe.model.trust_remote_code and not trust_remote_code:
            raise UserError(
                f"{self.path}: its recipe has model.trust_remote_code: code that comes with {self.recipe.model.name} "
                "would run. Read it; where you trust it, and who made the run, give --trust-remote-code (in Python: "
                "trust_remote_code=True)"
            )
        return self.recipe

    @property
    def best(self) -> Path:
        """The best iteration's adapter (or model)."""
        return self._pointed("best")

    @property
    def latest(self) -> Path:
        """The last iteration's adapter (or model)."""
        return self._pointed("latest")

    @property
    def measures(self) -> dict[str, dict[str, dict[str, float]]]:
        """Each player's held-out measures: measure to value, low, high, prompts."""
        names = measured_players(self._run_dir, self.recipe)
        return {name: self._run_dir.committed_json(f"evaluation/{name}/measures.json") for name in names}

    @property
    def benchmarks(self) -> DataFrame:
        """Each player's benchmark scores, all metrics, in lm-eval's units.

        Columns: suite, player, task, metric, value, stderr, shots, examples.
        """
        from pandas import DataFrame

        columns = ["suite", "player", "task", "metric", "value", "stderr", "shots", "examples"]
        return DataFrame(benchmark_records(self._run_dir), columns=columns)

    @property
    def trained(self) -> list[int]:
        """The iterations whose main player is committed."""
        return [
            t
            for t in range(self.recipe.iterations)
            if self._run_dir.has_record(f"iterations/{t}/{self.recipe.weights}")
        ]

    @property
    def evaluations(self) -> DataFrame:
        """The held-out measures: player, iteration, measure, value, low, high, prompts; a row for each measure."""
        return evaluations_frame(self._run_dir)

    @property
    def metrics(self) -> DataFrame:
        """Every number of the run: source, player, step, metric, value, low, high, count; see docs/measures.md."""
        return metrics_frame(self._run_dir)

    def _pointed(self, name: str) -> Path:
        link = self.path / name
        if not link.exists():
            raise UserError(f"{link}: not there yet: no iteration is trained")
        weights, run = link.resolve(), self.path.resolve()
        if not weights.is_relative_to(run):
            raise UserError(f"{link}: leads out of the run: delete it, and spinlm run makes it anew")
        self._run_dir.verify(weights.relative_to(run).as_posix())
        return weights


def run(recipe: Recipe, fork: str | Path | None = None, repair: bool = False, console: Console | None = None) -> Run:
    """Run a recipe to its end, from wherever its run directory stands.

    Args:
        recipe: What to do.
        fork: A new run directory that takes over from the recipe's run what still holds.
        repair: Make artifacts anew that are missing or aren't what was committed.
        console: Where to show progress; default: standard output.

    Raises:
        UserError: Something that the person who runs it can put right.
    """
    from spinlm.selfplay import play

    forked_from = None
    if fork is not None:
        forked_from = Path(recipe.run_dir)
        RunDir(forked_from).header()
        recipe = recipe.model_copy(update={"run_dir": str(fork)})
    with opened(recipe, console=console, forked_from=forked_from, repair=repair) as stages:
        conclude(stages, play(stages))
    return Run(recipe.run_dir)


@contextmanager
def opened(
    recipe: Recipe,
    only: set[str] | None = None,
    console: Console | None = None,
    forked_from: Path | None = None,
    repair: bool = False,
) -> Iterator[Stages]:
    """A run's stages, its directory locked; see `run` and `Stages`."""
    refuse_secrets(recipe.model_dump(), where=recipe.run_dir)  # in a recipe that no file has been read for
    from accelerate import PartialState
    from rich.console import Console

    from spinlm.companions import watching
    from spinlm.players.models import find_device
    from spinlm.reporting.progress import Progress
    from spinlm.stages import Stages

    # A barrier may wait for the main process's slowest work: reading the dataset, hashing or saving a model.
    processes = PartialState(cpu=find_device(recipe.model.device).type == "cpu", timeout=timedelta(days=1))
    run_dir = RunDir(Path(recipe.run_dir))
    with (
        interruption.listening(),
        watching(processes.process_index, processes.num_processes),
        writing(run_dir.path),
        run_dir.locked() if processes.is_main_process else nullcontext(),
    ):
        if processes.is_main_process:
            broken = run_dir.begin(recipe, versions(), forked_from, repair)
        processes.wait_for_everyone()
        progress = Progress(console or Console(), speaks=processes.is_main_process)
        if processes.is_main_process:
            for key in broken:
                progress.say(f"{key}: not what was committed, so it is made anew")
        with closing(Stages(recipe, run_dir, progress, only, repair)) as stages:
            try:
                yield stages
            except OutOfMemory as error:
                raise error.with_estimate(_estimate(stages, error)) from None
            finally:
                stages.page.end()


def _estimate(stages: Stages, error: OutOfMemory) -> str:
    """What was planned for whatever ran out of memory; nothing where that can't be found out now."""
    from spinlm.planning import estimate

    clear_frames(error.__traceback__)  # of what was interrupted, and what it holds
    error.__context__ = None
    try:
        stages.players.forget()
        return estimate(stages.recipe, error.phase, stages.data, stages.processes.num_processes) if error.phase else ""
    except Exception:
        return ""


def conclude(stages: Stages, evaluations: list[Evaluation]) -> None:
    """Write the report and show it."""
    if not stages.processes.is_main_process:
        return
    run_dir = stages.run
    with reading(run_dir.path):
        summary = summarise(run_dir)
        report = Report(summary, _samples(stages, evaluations))
        run_dir.put("report.md", report.markdown())
        if stages.data.held_out:
            stages.progress.console.print(report.table())
        stages.progress.say(verdict(summary))
        _say_samples(stages, report)
        if stages.page.conclude():
            stages.progress.say(f"report: {run_dir.path / 'report.html'}")
        stages.progress.say(closing_words(run_dir, summary))


def _samples(stages: Stages, evaluations: list[Evaluation]) -> list[Sample]:
    return [
        Sample(example.prompt, example.real, {e.player.name: e.sampled[place][0].text for e in evaluations})
        for place, example in enumerate(stages.data.held_out[:SAMPLES_SHOWN])
    ]


def _say_samples(stages: Stages, report: Report) -> None:
    for sample in report.samples:
        stages.progress.say(f"\nprompt: {sample.prompt}\n  real: {sample.real}")
        for player, response in sample.responses.items():
            stages.progress.say(f"  {player}: {response}")


def benchmark(
    recipe: Recipe,
    suites: Sequence[str],
    iterations: str = "all",
    limit: int | None = None,
    batch_size: int | None = None,
    repair: bool = False,
    console: Console | None = None,
) -> Run:
    """Put benchmark suites to a run's players: the base, the SFT model, iterations, and the control if it is there.

    Args:
        recipe: The run's.
        suites: Names of suites or of lm-eval's tasks, or files of either.
        iterations: `all` that are trained, `best`, `latest`, or numbers with commas between them.
        limit: Only this many examples of each task, for a try.
        batch_size: Requests in a forward pass; default: 4 on a CPU, as many as fit on a GPU.
        repair: Measure anew what was measured differently, or isn't what was committed.
        console: Where to show progress; default: standard output.

    Raises:
        UserError: Something that the person who runs it can put right.
    """
    source = Run(recipe.run_dir)
    chosen = _chosen(source, iterations)

    from spinlm import benchmarking
    from spinlm.evaluation.harness import Catalogue
    from spinlm.evaluation.suites import find_suite

    catalogue = Catalogue()
    found = dict(find_suite(name, catalogue) for name in suites)
    settings = benchmarking.Settings(chosen, limit, batch_size, repair)
    with opened(recipe, only=set(), console=console) as stages:
        benchmarking.run_suites(stages, found, catalogue, settings)
        if stages.processes.is_main_process:
            _show_benchmarks(stages, [benchmarking.folder_of(name, limit) for name in found])
    return source


def _show_benchmarks(stages: Stages, folders: Sequence[str]) -> None:
    """All tables in a file, those of these folders on the terminal."""
    with reading(stages.run.path):
        tables = benchmark_tables(stages.run)
    path = stages.run.put("benchmarks.md", "# Benchmarks\n\n" + "\n".join(table.markdown() for table in tables))
    for table in tables:
        if table.folder in folders:
            stages.progress.console.print(table.rich())
    stages.progress.say(f"benchmarks: {path}")


def judge(
    recipe: Recipe,
    suites: Sequence[str],
    settings: JudgeSettings,
    players: str = "all",
    against: str | None = None,
    questions: str | None = None,
    limit: int | None = None,
    repair: bool = False,
    console: Console | None = None,
) -> Run:
    """Let a model judge a run's players, and show what it makes of them.

    Args:
        recipe: The run's.
        suites: `arena`, `mt-bench` or both.
        settings: Who judges, and how it is asked.
        players: `all` iterations that are trained, `best`, `latest`, or numbers of iterations and the names of
            other players, with commas between them.
        against: Whom they are held against: another player, a file of answers, or another model. None: the
            player that self-play started from.
        questions: A file, or a dataset on the hub. None: the held-out prompts for arena, MT-bench's for mt-bench.
        limit: Only this many of them, for a try.
        repair: Make anew those answers, results and verdicts that aren't what was kept.
        console: Where to show progress; default: standard output.

    Raises:
        UserError: Something that the person who runs it can put right.
    """
    source = Run(recipe.run_dir)
    names = _players_named(source, players)

    from spinlm.judging import Judging, judge_run

    with opened(recipe, only={"evaluate", "benchmark"}, console=console) as stages:
        if repair and stages.processes.is_main_process:
            stages.run.repair("benchmarks/answers/", *(f"benchmarks/{suite}/" for suite in suites))
        keys = judge_run(stages, Judging(suites, names, against, questions, limit, repair), settings)
        with reading(stages.run.path):
            tables = judged_tables(stages.run, keys)
        for table in tables:
            stages.progress.console.print(table.rich())
        for key in keys:
            stages.progress.say(f"{key.split('/')[1]}: {stages.run.path / key}")
    return source


def _players_named(source: Run, asked: str) -> list[str]:
    """Names of players: of iterations, by their numbers, and of others."""
    parts = [part.strip() for part in asked.split(",")]
    others = list(dict.fromkeys(part for part in parts if part in ("base", "sft", "control")))
    numbers = ",".join(part for part in parts if part not in others)
    return [*others, *([f"iteration-{t}" for t in _chosen(source, numbers)] if numbers else [])]


def _chosen(source: Run, asked: str) -> list[int]:
    """The numbers of the iterations that `--iterations` means."""
    trained = source.trained
    if not trained:
        raise UserError(f"{source.path}: no iteration is trained yet: run spinlm run first")
    if asked == "all":
        return trained
    if asked in ("best", "latest"):
        return [int((source.best if asked == "best" else source.latest).parent.name)]
    known = {str(t): t for t in trained}
    for one in asked.split(","):
        if one.strip() not in known:
            raise UserError(f"{source.path}: has no trained iteration {one.strip()!r}; trained are: {', '.join(known)}")
    return sorted({known[one.strip()] for one in asked.split(",")})


def export(
    run_path: str | Path,
    out: str | Path,
    iteration: str = "best",
    merge: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write an iteration's adapter, or the merged model, with tokenizer and model card.

    Args:
        run_path: The run directory.
        out: A directory that is new or empty.
        iteration: A number, `best` or `latest`.
        merge: Merge the adapter into the base model's weights.
        trust_remote_code: Let code run that comes with the model, where the run's recipe says so.

    Raises:
        UserError: There is no such iteration, `out` isn't empty, or there is code that you don't trust.
    """
    source, out = Run(run_path), Path(out)
    source.loadable_recipe(trust_remote_code)
    if found(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and isn't empty; give a new directory")
    if out.resolve() == Path.cwd():
        raise UserError(f"{out}: the working directory itself; give a new one, in it or elsewhere")
    if not merge and source.recipe.adapter is not None and source.recipe.model.name.endswith(".gguf"):
        raise UserError(
            f"{source.path}: its base is a GGUF file, which an adapter alone can't name: export with --merge"
        )
    name, weights = _weights_of(source, iteration)
    with writing(out):
        _export(source, name, weights, out.resolve(), merge)
    return out


def _export(source: Run, name: str, weights: Path, out: Path, merge: bool) -> None:
    """All of it or nothing."""
    if not weights.is_dir():
        raise UserError(f"{weights}: not a directory with weights, which an iteration's are")
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    make_directory(beside.parent)
    try:
        _write_export(source, name, weights, beside, merge)
        flush_to_disk(beside)
        if out.exists():
            out.rmdir()
        beside.rename(out)
        flush_directory(out.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_export(source: Run, name: str, weights: Path, out: Path, merge: bool) -> None:
    from spinlm.data.render import Renderer
    from spinlm.players.models import Player, Players

    recipe, whole = source.recipe, merge or source.recipe.adapter is None
    # Merged into the base as it is on the hub or the disk, not as it was quantised for training.
    model = recipe.model.model_copy(update={"load_in_4bit": False})
    players = Players(model, recipe.adapter, commit=source._run_dir.origin().get("model"))
    if whole:
        players.merged(Player(name, weights, "exported")).save_pretrained(out)
    else:
        copy(weights, out)
        _name_the_base(out / "adapter_config.json", recipe.model.name, players.revision)
    Renderer(players.tokenizer, recipe.prompt, players.stop_ids()).tokenizer.save_pretrained(out)
    (out / "README.md").write_text(_card(source._run_dir, name, whole), encoding="utf-8")


def _card(run: RunDir, name: str, merged: bool) -> str:
    with reading(run.path):
        summary = beside_the_others(run, summarise(run), name)
        found = diagnostics(run, run.recipe()).get(name)
        warnings = [] if found is None else found.warnings
        return model_card(name, run.header(), merged, summary, warnings, run.origin())


def _name_the_base(config: Path, base: str, revision: str | None) -> None:
    """An adapter finds its base by name and revision: a local name has to hold wherever it is loaded from."""
    here = found(base)
    name = str(here.resolve()) if here else base
    try:
        settings = dict(read_json(config))
    except (ValueError, TypeError, OSError):
        raise UserError(f"{config.name}: not an adapter's settings; spinlm run with --repair makes it anew") from None
    write_json(config, settings | {"base_model_name_or_path": name, "revision": revision})


def _weights_of(source: Run, player: str) -> tuple[str, Path]:
    """A player's name and weights, which are what was committed."""
    if player in ("best", "latest"):
        weights = source.best if player == "best" else source.latest
        return f"iteration-{weights.parent.name}", weights
    names = {str(t): f"iteration-{t}" for t in range(source.recipe.iterations)} | {"sft": "sft", "control": "control"}
    run, kind = source._run_dir, source.recipe.weights
    trained = {one: name for one, name in names.items() if run.has_record(f"{folder_of(name)}/{kind}")}
    if player not in trained:
        raise UserError(f"{source.path}: has no trained {player!r}; trained are: {', '.join(trained) or 'none'}")
    key = f"{folder_of(trained[player])}/{kind}"
    run.verify(key)
    return trained[player], (run.path / key).resolve()


def versions(packages: Sequence[str] = _RECORDED) -> dict[str, str]:
    """Of Python and of packages; by default of those that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
