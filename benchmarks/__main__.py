"""The command: python -m benchmarks."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import typer

from spinlm.errors import UserError, first_line

RESULTS = Path("benchmarks/results")


def bench(
    only: Annotated[
        str, typer.Option(help="Take these measures, separated by commas (train: all train-…); the file keeps others.")
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes and fewer measures: rough, in some minutes.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Don't take again what the results file has whole, by the same settings.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The results file.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of SPINConfig, key=value.")] = None,
    size: Annotated[list[str] | None, typer.Option("--size", help="A size, name=value; see settings.py.")] = None,
    vllm_python: Annotated[Path, typer.Option(help="The interpreter that has vLLM.")] = Path(".venv-vllm/bin/python"),
    show: Annotated[Path | None, typer.Option(help="Only show this results file.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Show the table as Markdown.")] = False,
) -> None:
    """Measure, side by side, and write a table and JSON. Nothing else should run on the machine meanwhile."""
    from benchmarks import settings as given
    from benchmarks.bench import Bench

    if show is None:
        sizes = given.with_sizes(given.QUICK if quick else given.Sizes(), size or [])
        what = Bench(sizes, given.parse(settings or []), vllm_python)
        show = out or RESULTS / ("quick.json" if quick else "full.json")
        failed = _measure(what, _chosen(only, quick), show, keep=resume or bool(only), resume=resume)
    else:
        failed = False
    _show(show, as_markdown)
    if failed:
        raise typer.Exit(1)


def _chosen(only: str, quick: bool) -> list[str]:
    from benchmarks.measures import MEASURES, QUICK

    wanted = [name.strip() for name in only.split(",") if name.strip()]
    chosen = {name: [m for m in MEASURES if m == name or m.startswith(f"{name}-")] for name in wanted}
    for name, measures in chosen.items():
        if not measures:
            raise UserError(f"--only {name}: no such measure; there are: {', '.join(MEASURES)}")
    if not wanted:
        return list(QUICK if quick else MEASURES)
    return [measure for measure in MEASURES if any(measure in measures for measures in chosen.values())]


def _measure(what: object, names: list[str], path: Path, keep: bool, resume: bool) -> bool:
    """Take the measures; whether one of them failed."""
    from benchmarks.bench import Bench, Skipped
    from benchmarks.machine import PACKAGES, machine
    from benchmarks.measures import MEASURES
    from benchmarks.record import Results
    from spinlm.api import versions

    assert isinstance(what, Bench)
    _be_quiet()
    header = {"machine": machine(what.sizes.peak_size), "versions": versions(PACKAGES)}
    results = Results(path, header, keep, say=_say)
    any_failed = False
    for name in names:
        if resume and results.is_finished(name, what.settings()):
            _say(f"{name}: is in {path} already")
            continue
        started, failed = time.perf_counter(), None
        _say(f"{name}: begins")
        try:
            MEASURES[name](what, results.begin(name, what.settings()))
        except Skipped as reason:
            failed = f"skipped: {reason}"
        except Exception as error:  # the other measures can still be taken
            traceback.print_exc()
            failed, any_failed = f"failed: {first_line(error)}", True
        results.finish(name, time.perf_counter() - started, failed)
        _say(f"{name}: {failed or 'done'} after {time.perf_counter() - started:.0f} s")
        gc.collect()
    return any_failed


def _show(path: Path, as_markdown: bool) -> None:
    from rich.console import Console

    from benchmarks.record import read_results
    from benchmarks.table import markdown, table

    results = read_results(path)
    if as_markdown:
        print(markdown(results))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(table(results))
    print(f"results: {path}")


def _be_quiet() -> None:
    import datasets
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    """Run, and say in one line what its user can put right."""
    try:
        typer.run(bench)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
