"""The verifiers of real tasks, judging right, wrong, odd and hostile texts."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from spinlm.config import DataSection, ReasoningGymSection
from spinlm.data.formats import load_examples
from spinlm.data.sources import reasoning_gym_task
from spinlm.errors import UserError
from spinlm.evaluation import verifiers
from spinlm.evaluation.verifiers import correct, score


def examples(task: str, size: int = 3, **args: Any) -> list[tuple[str, dict[str, Any]]]:
    """Right answers and their verifiers, the latter read back from JSON."""
    section = DataSection(
        source=f"reasoning_gym:{task}", reasoning_gym=ReasoningGymSection(size=size, seed=4, args=args)
    )
    found, dropped = load_examples(section)
    assert dropped == []
    return [(e.response, json.loads(json.dumps(e.verifier))) for e in found]


TASKS = [
    "chain_sum",
    "basic_arithmetic",
    "prime_factorization",
    "spell_backward",
    "binary_matrix",
    "n_queens",
    "spiral_matrix",
    "string_insertion",
    "countdown",
    "simple_integration",
]


@pytest.mark.parametrize("task", TASKS)
def test_the_real_response_is_correct_and_others_are_not(task: str) -> None:
    for answer, verifier in examples(task):
        assert score(answer, verifier) == 1.0
        assert correct(f"\n {answer}  ", verifier)
        for wrong in ("", "   ", "I don't know.", "(", "[]", "{}", "1/0", "\x00", "-987654321"):
            assert 0.0 <= score(wrong, verifier) < 1.0
            assert not correct(wrong, verifier)


def test_an_entrys_own_answer_counts_and_not_its_neighbours() -> None:
    (first, verifier), (second, _) = examples("chain_sum", size=2)
    assert first != second
    assert correct(first, verifier)
    assert not correct(second, verifier)


def test_args_are_part_of_the_entry() -> None:
    ((answer, verifier),) = examples("chain_sum", size=1, min_terms=5, max_terms=5)
    assert correct(answer, verifier)


def test_a_part_of_the_score_is_not_correct() -> None:
    answer, verifier = examples("chain_sum")[0]
    assert score(f"The answer is {answer}", verifier) == pytest.approx(len(answer) / len(f"The answer is {answer}"))
    assert not correct(f"The answer is {answer}", verifier)
    answer, verifier = examples("string_insertion")[0]
    assert score(str(list(answer)), verifier) == 0.1


def test_what_a_verifier_fails_on_scores_nothing() -> None:
    _, verifier = examples("prime_factorization")[0]
    dataset = reasoning_gym_task("prime_factorization", 3, 4, {})
    with pytest.raises(ValueError, match="invalid literal"):
        dataset.score_answer("seven", dataset[0])
    assert score("seven", verifier) == 0.0


@pytest.mark.parametrize("task", sorted(verifiers.EVAL_TASKS | {"countdown", "simple_integration"}))
@pytest.mark.parametrize(
    "code",
    [
        "open('{path}', 'w')",
        "__import__('os').mkdir('{path}')",
        "[open('{path}', 'w')]",
        "[c for c in open('{path}', 'w')]",
        "eval(chr(49))",
        "exit()",
        "input()",
        "breakpoint()",
        "ｅｘｉｔ()",  # Python reads these letters as exit
        "print",
    ],
)
def test_code_is_not_run(task: str, code: str, tmp_path: Path) -> None:
    _, verifier = examples(task, size=1)[0]
    made = tmp_path / "made"
    assert score(code.format(path=made), verifier) < 0.05
    assert not made.exists()


@pytest.mark.parametrize("text", ["9**9**9", "(9**99999)**99999"])
def test_a_judgement_ends(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiers, "CPU_SECONDS", 0.2)
    answer, verifier = examples("countdown", size=1)[0]
    start = time.monotonic()
    assert score(text, verifier) < 0.05
    assert time.monotonic() - start < 30
    assert correct(answer, verifier)


def test_other_threads_may_judge() -> None:
    answer, verifier = examples("chain_sum", size=1)[0]
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(correct(answer, verifier)))
    thread.start()
    thread.join()
    assert found == [True]


def test_another_entry_than_the_datas_is_refused() -> None:
    answer, verifier = examples("chain_sum", size=1)[0]
    with pytest.raises(UserError, match=r"reasoning_gym:chain_sum\[0\] is not the entry .* the same PYTHONHASHSEED"):
        score(answer, {**verifier, "seed": 5})
    del verifier["sha256"]
    assert correct(answer, verifier)


def test_an_unknown_task() -> None:
    with pytest.raises(UserError, match="no such task; did you mean chain_sum"):
        score("1", {"task": "chain_sums", "size": 1, "seed": 0, "args": {}, "index": 0})
