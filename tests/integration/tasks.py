"""Benchmark tasks for lm-eval out of local files, small, but with scores that differ between players."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

WORDS = ("ab", "abab", "ababab", "red", "blue", "cat", "dog", "a1", "say", "aaa", "bb", "cc")
LETTERS = {letter: "low" if letter < "n" else "high" for letter in "abcdefghijklmnopqrstuvwxyz"}

PICK = """
task: pick
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/pick.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
num_fewshot: 2
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""

SAY = """
task: say
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/say.jsonl}}}}
output_type: generate_until
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}\\n"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - name: first-letter
    filter:
      - {{function: regex, regex_pattern: "[a-z]", fallback: a}}
      - {{function: map, mapping_dict: {letters}, default_value: none}}
      - {{function: take_first}}
"""

SUITE = {
    "description": "two local tasks",
    "percent": True,
    "tasks": [
        {"task": "pick.yaml", "title": "picks", "num_fewshot": 1, "metric": "acc_norm"},
        {"task": "say.yaml", "num_fewshot": 1, "metric": "exact_match"},
    ],
    "paper": {"source": "a paper", "rows": {"theirs": {"pick": 40.0, "say": 50.5}}},
}


def write(folder: Path) -> Path:
    """`pick.yaml` (the most likely of three words), `say.yaml` (generated text) and `mine.yaml`, a suite of both."""
    folder.mkdir()
    _write_rows(folder / "pick.jsonl", [_pick(number) for number in range(40)])
    _write_rows(folder / "say.jsonl", [_say(number) for number in range(24)])
    (folder / "pick.yaml").write_text(PICK.format(folder=folder.resolve()))
    (folder / "say.yaml").write_text(SAY.format(folder=folder.resolve(), letters=json.dumps(LETTERS)))
    (folder / "mine.yaml").write_text(yaml.safe_dump(SUITE))
    return folder


def _pick(number: int) -> dict[str, object]:
    draw = random.Random(number)
    return {"question": f"say {draw.choice(WORDS)}", "choices": draw.sample(WORDS, 3), "gold": draw.randrange(3)}


def _say(number: int) -> dict[str, object]:
    return {"question": f"say {WORDS[number % 12]} {number}", "answer": "low" if number % 3 else "high"}


def _write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
