"""`make audit`: are there known vulnerabilities in the versions that are pinned?

    python tools/audit.py [--database URL]

By pip-audit, which asks the database OSV; the exit code is not 0 where it knows of one. Where the database can't be
reached, that is said, and nothing fails: `make check` works without a network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[1]
PINNED = ("constraints.txt", "requirements-vllm.txt")
OSV = "https://api.osv.dev/v1/query"
SECONDS = 15

VULNERABLE = {"package": {"name": "jinja2", "ecosystem": "PyPI"}, "version": "2.11.2"}
"""What any such database knows of (CVE-2020-28493): one that doesn't would find every version good."""

IGNORED: dict[str, str] = {}
"""Advisories that don't concern what the package is used for here, and why not."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Known vulnerabilities of the pinned versions.")
    parser.add_argument("--database", default=OSV, metavar="URL", help="another one with OSV's interface")
    database = parser.parse_args().database
    if trouble := why_not(database):
        print(f"AUDIT SKIPPED: no version was looked up: {database}: {trouble}", flush=True)
        return 0
    return max(audit(ROOT / name, database) for name in PINNED)


def why_not(database: str) -> str | None:
    """Why it can't be asked; None where it can."""
    try:
        with urlopen(Request(database, json.dumps(VULNERABLE).encode()), timeout=SECONDS) as response:
            answer = json.load(response)
    except (URLError, OSError, ValueError) as error:
        return f"can't be reached: {error}"
    if not isinstance(answer, dict) or not answer.get("vulns"):
        return "doesn't know of a vulnerability that everybody knows of"
    return None


def audit(pinned: Path, database: str) -> int:
    """pip-audit's exit code; a version that it can't look up fails too."""
    print(f"{pinned.name}:", flush=True)
    options = ["--no-deps", "--disable-pip", "--strict", "--progress-spinner", "off", "--timeout", str(SECONDS)]
    options += ["--vulnerability-service", "osv", "--osv-url", database]
    options += [option for advisory in IGNORED for option in ("--ignore-vuln", advisory)]
    return subprocess.run([sys.executable, "-m", "pip_audit", "--requirement", str(pinned), *options]).returncode


if __name__ == "__main__":
    sys.exit(main())
