"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from spinlm import interruption
from spinlm.errors import UserError, disk_trouble, without_secrets
from spinlm.paths import found

app = typer.Typer(
    help="SPIN: self-play fine-tuning for any Hugging Face causal language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[
    str | None, typer.Argument(metavar="[RECIPE.yaml]", help="The recipe; or only --model and --data.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value ...]", help="Change single keys of the recipe.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="A directory, a .gguf file or a hub name.")]
DataOption = Annotated[
    str | None, typer.Option("--data", help="A file, a directory, reasoning_gym:TASK or a hub dataset.")
]
IterationOption = Annotated[
    int | None, typer.Option("--iteration", help="Default: the first one where this stage isn't done.", min=0)
]
JudgeUrlOption = Annotated[
    str | None,
    typer.Option(
        "--judge-url", help="For arena and mt-bench: an OpenAI-compatible endpoint, up to /v1.", metavar="URL"
    ),
]
JudgeModelOption = Annotated[
    str | None, typer.Option("--judge-model", help="Who judges there. The key: SPINLM_JUDGE_KEY or OPENAI_API_KEY.")
]
JudgeConcurrencyOption = Annotated[int, typer.Option("--judge-concurrency", help="Requests at the same time.", min=1)]
JudgeTimeoutOption = Annotated[float, typer.Option("--judge-timeout", help="Seconds that a request may take.", min=0.1)]
JudgeMaxTokensOption = Annotated[int, typer.Option("--judge-max-tokens", help="Of what the judge says.", min=1)]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        "--against", help="Whom the judge holds players against: another player, a model, a JSONL file of answers."
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the code that comes with the run's model, where its recipe says so: the directory may be anybody's.",
    ),
]
QuestionsOption = Annotated[
    str | None,
    typer.Option("--questions", help="What is asked: a JSONL file, or a hub dataset. Default: see docs/judging.md."),
]


@app.command()
def run(
    recipe: RecipeArgument = None,
    overrides: Overrides = None,
    model: ModelOption = None,
    data: DataOption = None,
    fork: Annotated[
        Path | None,
        typer.Option("--fork", help="Start a new run here, from the artifacts of the recipe's run that still hold."),
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Make missing or corrupted artifacts anew.")] = False,
) -> None:
    """Play a recipe to its end, or go on where it was interrupted."""
    from spinlm.api import run as run_recipe

    run_recipe(_recipe(recipe, overrides, model, data), fork=fork, repair=repair)


@app.command()
def generate(
    recipe: RecipeArgument = None,
    overrides: Overrides = None,
    model: ModelOption = None,
    data: DataOption = None,
    iteration: IterationOption = None,
) -> None:
    """Only one iteration's synthetic responses (and the data and SFT before them)."""
    from spinlm.api import opened

    with opened(_recipe(recipe, overrides, model, data), only={"data", "sft", "generate"}) as stages:
        t = _iteration(stages, "generate", iteration)
        stages.generate(t, stages.opponent_of(t))


@app.command()
def train(
    recipe: RecipeArgument = None,
    overrides: Overrides = None,
    model: ModelOption = None,
    data: DataOption = None,
    iteration: IterationOption = None,
) -> None:
    """Only one iteration's scoring and training, on responses that are generated already."""
    from spinlm import selfplay
    from spinlm.api import opened

    with opened(_recipe(recipe, overrides, model, data), only={"score", "train"}) as stages:
        t = _iteration(stages, "train", iteration)
        selfplay.train_alone(stages, t)


@app.command()
def evaluate(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RUN | RECIPE.yaml]", help="A run directory, or the recipe of one.")
    ] = None,
    overrides: Overrides = None,
    model: ModelOption = None,
    data: DataOption = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            help="Run these benchmarks instead: a suite, a task of lm-eval's, or a file of either; arena, mt-bench.",
        ),
    ] = None,
    iterations: Annotated[
        str,
        typer.Option(
            "--iterations",
            help="With --suite: all, best, latest, or numbers: 0,2; before a judge, also names: control.",
        ),
    ] = "all",
    limit: Annotated[
        int | None, typer.Option("--limit", help="With --suite: only so many examples of each task, for a try.", min=1)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="With --suite: default: 4 on a CPU, as many as fit on a GPU.", min=1),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="With --suite: measure anew what was measured differently.")
    ] = False,
    judge_url: JudgeUrlOption = None,
    judge_model: JudgeModelOption = None,
    judge_concurrency: JudgeConcurrencyOption = 8,
    judge_timeout: JudgeTimeoutOption = 120.0,
    judge_max_tokens: JudgeMaxTokensOption = 2048,
    against: AgainstOption = None,
    questions: QuestionsOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Only the held-out measures, of every player that is trained already; with --suite, only benchmarks."""
    from spinlm import selfplay
    from spinlm.api import benchmark, conclude, judge, opened
    from spinlm.evaluation.judge import SUITES, JudgeSettings

    of_run = _recipe_of_run(recipe, overrides, trust_remote_code)
    if of_run is None and trust_remote_code:
        raise UserError("--trust-remote-code goes with a run directory: a recipe has model.trust_remote_code")
    of_run = of_run or _recipe(recipe, overrides, model, data)
    judged = [name for name in suite or () if name in SUITES]
    scored = [name for name in suite or () if name not in SUITES]
    if not suite and (limit or repair or iterations != "all"):
        raise UserError("--iterations, --limit and --repair go with --suite")
    if not scored and batch_size:
        raise UserError("--batch-size goes with --suite and a suite of lm-eval's tasks")
    if not judged and (judge_url or judge_model or against or questions):
        raise UserError(f"--judge-url, --judge-model, --against and --questions go with --suite {' or '.join(SUITES)}")
    if judged and not (judge_url and judge_model):
        raise UserError(f"{' and '.join(judged)}: a model judges: give both --judge-url and --judge-model")
    by = JudgeSettings(judge_url or "", judge_model or "", judge_concurrency, judge_timeout, judge_max_tokens)
    if scored:
        benchmark(of_run, scored, iterations, limit, batch_size, repair)
    if judged:
        judge(of_run, judged, by, iterations, against, questions, limit, repair)
    if suite:
        return
    with opened(of_run, only={"data", "evaluate"}) as stages:
        trained = list(itertools.takewhile(stages.is_trained, range(stages.recipe.iterations)))
        if not trained:
            raise UserError(f"{stages.run.path}: no iteration is trained yet: run spinlm train first")
        conclude(stages, selfplay.evaluate_alone(stages, trained))


@app.command()
def plan(
    recipe: RecipeArgument = None,
    overrides: Overrides = None,
    model: ModelOption = None,
    data: DataOption = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Plan for this GPU (H100, A100-80, RTX 4090, …), not this machine.")
    ] = None,
    processes: Annotated[int, typer.Option("--processes", help="Devices to run on.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes, operations, seconds.")] = False,
) -> None:
    """The memory, work and time that a recipe will take; loads no weights and writes nothing."""
    from rich.console import Console
    from rich.markup import escape

    from spinlm.planning import plan as plan_recipe

    planned = plan_recipe(_recipe(recipe, overrides, model, data), gpu, processes)
    if as_json:
        typer.echo(json.dumps(planned.as_dict(), indent=2))
        return
    console = Console()
    for table in planned.tables():
        console.print(table)
    for line in planned.assumptions:
        console.print(escape(line), soft_wrap=True)
    for line in planned.warnings:
        console.print(f"warning: {escape(line)}", style="bold red", soft_wrap=True)


@app.command()
def status(run_dir: Annotated[Path, typer.Argument(metavar="RUN")]) -> None:
    """What is done, what is left, how long it took."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from spinlm.reporting.status import status as stages_of
    from spinlm.rundir import RunDir, reading

    table = Table(title=escape(str(run_dir)))
    for heading in ("stage", "state", "seconds"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    with reading(run_dir):
        stages = stages_of(RunDir(run_dir))
    for stage in stages:
        table.add_row(stage.name, stage.state, f"{stage.seconds:.1f}" if stage.seconds else "")
    left = sum(stage.state != "done" for stage in stages)
    table.caption = f"{left} stages left" if left else "all done"
    Console().print(table)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN ...]", help="Several runs are compared.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where to write the page. Default: RUN/report.html; of several: comparison.html."),
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the page at an address, for a remote machine.")] = False,
    host: Annotated[
        str | None,
        typer.Option("--host", help="Default: 127.0.0.1; at another address, who knows the printed URL can read it."),
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="Default: 8765; 0: any free port.", min=0, max=65535)
    ] = None,
) -> None:
    """Write a run's report anew, as one HTML page, and show its summary; or compare several runs."""
    if serve and (len(runs) > 1 or out is not None):
        raise UserError("--serve shows the page of one run, and writes no file: give one RUN, and no --out")
    if not serve and (host is not None or port is not None):
        raise UserError("--host and --port go with --serve")
    from spinlm.rundir import reading

    if serve:
        _serve(runs[0], host, port)
    elif len(runs) > 1:
        with reading(Path(", ".join(map(str, runs)))):
            _compare(runs, out)
    else:
        with reading(runs[0]):
            _report(runs[0], out)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory.")],
    iteration: Annotated[str, typer.Option("--iteration", help="A number, best, latest, sft or control.")] = "best",
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the base model's weights.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write an iteration, the SFT model or the control as an adapter or a merged model, with tokenizer and card."""
    from spinlm.api import export as export_run

    typer.echo(f"exported to {export_run(run_dir, out, iteration, merge, trust_remote_code)}")


def _recipe(recipe: str | None, overrides: list[str] | None, model: str | None, data: str | None) -> Any:
    from spinlm.config import load_recipe

    changes = list(overrides or [])
    if recipe is not None and "=" in recipe and found(recipe) is None:
        changes.insert(0, recipe)
        recipe = None
    for key, value in (("model.name", model), ("data.source", data)):
        if value is not None:
            changes.append(f"{key}={json.dumps(value)}")
    if recipe is None and (model is None or data is None):
        raise UserError("give a recipe, or both --model and --data")
    return load_recipe(recipe, changes)


def _recipe_of_run(directory: str | None, overrides: list[str] | None, trust_remote_code: bool) -> Any:
    """A run directory's own recipe; None where something else is given."""
    from spinlm.api import Run

    place = None if directory is None else found(directory)
    if directory is None or place is None or not place.is_dir():
        return None
    if overrides:
        raise UserError(f"{directory}: a run keeps to its own recipe: take {' '.join(overrides)} out")
    return Run(directory).loadable_recipe(trust_remote_code).model_copy(update={"run_dir": directory})


def _report(path: Path, out: Path | None) -> None:
    from rich.console import Console

    from spinlm.files import write_text
    from spinlm.reporting import html
    from spinlm.reporting.report import Report, verdict
    from spinlm.reporting.summary import summarise
    from spinlm.reporting.verdict import closing_words
    from spinlm.rundir import RunDir

    run_dir = RunDir(path)
    running = run_dir.is_running()
    try:
        if out is None:
            out = html.write(run_dir, running)
        else:
            write_text(out, html.page(run_dir, running))
    except OSError as error:
        place = out or run_dir.path / html.FILE
        raise UserError(f"{place}: can't be written: {error.strerror}; give another place by --out FILE") from None
    summary = summarise(run_dir)
    if summary.measures:
        Console().print(Report(summary, []).table())
    typer.echo(verdict(summary))
    typer.echo(f"report: {out}")
    if summary.best is not None:
        typer.echo(closing_words(run_dir, summary, running))


def _compare(paths: list[Path], out: Path | None) -> None:
    from spinlm.reporting.comparison import FILE, write_comparison
    from spinlm.rundir import RunDir

    typer.echo(f"comparison: {write_comparison([RunDir(path) for path in paths], out or Path(FILE))}")


def _serve(path: Path, host: str | None, port: int | None) -> None:
    from spinlm.reporting.server import LOOPBACK, PORT, ReportServer
    from spinlm.rundir import RunDir

    with ReportServer(RunDir(path), LOOPBACK if host is None else host, PORT if port is None else port) as server:
        typer.echo(f"{path}: {server.address} (Ctrl-C ends it)")
        if server.is_private:
            typer.echo(f"from another machine: {server.tunnel}, then open {server.address} there")
        else:
            typer.echo("who has this address can read the report, and it goes over the network unencrypted")
        with suppress(interruption.Interrupted):
            server.serve_forever()


def _iteration(stages: Any, stage: str, asked: int | None) -> int:
    from spinlm.rundir import STOPPED

    count = stages.recipe.iterations
    if asked is not None:
        if asked >= count:
            raise UserError(f"--iteration {asked}: the recipe has {count} iterations, 0 to {count - 1}")
        return asked
    if stages.run.has_record(STOPPED):
        reason = stages.run.committed_json(STOPPED)["reason"]
        raise UserError(f"{stages.run.path}: has stopped, since {reason}; give --iteration to go on all the same")
    is_done = stages.is_generated if stage == "generate" else stages.is_trained
    return next((t for t in range(count) if not is_done(t)), count - 1)


def main() -> None:
    """Entry point: errors for people go to standard error, with exit code 2, without a traceback unless asked for."""
    _open_closed_streams()
    _quieten_libraries()
    try:
        with interruption.listening(owns_process=True):
            app()
    except UserError as error:
        _fail(str(error), of=error)
    except interruption.Interrupted as stop:
        _fail(str(stop), stop.exit_code)
    except Exception as error:
        if trouble := _trouble(error):
            _fail(str(trouble), of=error)
        _show_traceback(error)
        raise SystemExit(1) from None


def _trouble(error: Exception) -> UserError | None:
    """What to say of the machine's troubles; None where the error isn't one."""
    if _is_out_of_memory(error):
        return UserError(
            "memory has run out. Nothing committed is lost: what else runs on this machine or its GPU takes memory "
            "too, and spinlm plan RECIPE says what a run needs."
        )
    if trouble := disk_trouble(error, "the disk"):
        return trouble
    if isinstance(error, OSError) and error.filename is not None:
        how = "SPINLM_TRACEBACK=1 in the environment shows where that came up"
        return UserError(f"{error.filename}: {error.strerror}. Nothing committed is lost; {how}")
    return None


def _show_traceback(error: Exception) -> None:
    _say(without_secrets("".join(traceback.format_exception(error))))


def _say(words: str) -> None:
    """To standard error, after all that was said before. Nobody may be listening any more: the exit code stays."""
    for stream, last in ((sys.stdout, ""), (sys.stderr, words)):
        try:
            stream.write(last)
            stream.flush()
        except OSError:  # what is left in it Python would write at the very end, and exit with a code of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_closed_streams() -> None:
    """A standard stream that is closed leads nowhere: the first files to be opened would be in its place."""
    for name in ("stdin", "stdout", "stderr"):  # in the order of their numbers, of which the lowest free one is taken
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115 (it stays)


def _quieten_libraries() -> None:
    """Their warnings are for programmers, their bars are beside ours; each can be had back by its own variable."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }.items():
        os.environ.setdefault(name, value)


def _fail(message: str, code: int = 2, of: Exception | None = None) -> None:
    """End with a message, and where that is asked for the traceback of what it is about."""
    if of is not None and os.environ.get("SPINLM_TRACEBACK") == "1":
        _show_traceback(of)
    _say(f"spinlm: {message}\n")
    if "LOCAL_RANK" in os.environ:  # one process of several: don't wait for the others to end the group
        os._exit(code)
    raise SystemExit(code)


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from spinlm.hardware import is_out_of_memory

    return is_out_of_memory(error)
