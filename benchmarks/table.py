"""Results as a table, for the terminal and for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

COLUMNS = ("measure", "what", "against", "median", "min to max", "goal", "reached", "same")


def rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each figure, and one for each measure that has none."""
    for name, measure in results["measures"].items():
        checks = measure.get("checks", [])
        same = "" if not checks else "yes" if all(check["same"] for check in checks) else "NO"
        for figure in measure.get("figures", []):
            spread = f"{figure['low']:.3g} to {figure['high']:.3g} ({figure['count']})"
            median = f"{figure['median']:.3g}"
            yield name, figure["what"], figure["against"], median, spread, _goal(figure), _reached(figure), same
        if not measure.get("figures"):
            yield name, measure.get("failed", "not finished"), "", "", "", "", "", same


def table(results: dict[str, Any]) -> Table:
    """For the terminal."""
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=_title(results))
    for column in COLUMNS:
        shown.add_column(column)
    for row in rows(results):
        shown.add_row(*row)
    return shown


def markdown(results: dict[str, Any]) -> str:
    """For the docs."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows(results)]
    return "\n".join([_title(results), "", *("| " + " | ".join(line) + " |" for line in lines)])


def _title(results: dict[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['vector_units'])}), "
        f"{machine['memory_gib']} GiB, matrix peak {machine['matrix_peak_gflops']} GFLOP/s; {packages}"
    )


def _goal(figure: dict[str, Any]) -> str:
    if figure["at_least"] is not None:
        return f"≥ {figure['at_least']:.3g}"
    return "" if figure["at_most"] is None else f"≤ {figure['at_most']:.3g}"


def _reached(figure: dict[str, Any]) -> str:
    return {True: "yes", False: "no", None: ""}[figure["reached"]]
