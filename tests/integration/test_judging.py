"""Judged benchmarks: the real command, a real run, and a judge behind a real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from integration.command import (
    Outcome,
    contents,
    differing,
    flip_a_byte,
    killed_at,
    refused,
    rows,
    spinlm,
    spinlm_process,
    succeeded,
)
from judge_server import HANG, JudgeServer, by_merit, error, pieces
from spinlm.evaluation.judge import READINGS, TRIES
from spinlm.evaluation.verdicts import PAIRWISE
from spinlm.files import digest, read_json
from spinlm.reporting.judged import judged_tables
from spinlm.rundir import RunDir

KEY = "sk-judge-0123456789abcdef"
RUN = "runs/recipe"
QUESTIONS = [
    {"question_id": number, "category": "odd" if number % 2 else "even", "turns": turns, "reference": reference}
    for number, turns, reference in (
        (1, ["say a", "again"], ["a", "aa"]),
        (2, ["say b"], []),
        (3, ["say c", "and d"], []),
        (4, ["say nothing"], None),
    )
]
ASKED = 2 * len(QUESTIONS)


def worth(text: str) -> int:
    """A judge's taste that nobody shares, so that every verdict depends on the very words."""
    return int(digest(text)[:8], 16)


by_words = by_merit(worth)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPINLM_JUDGE_KEY", KEY)


@pytest.fixture
def asked(copied: Path) -> Path:
    """The finished run, and a file of questions beside it."""
    (copied / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return copied


@pytest.fixture(scope="session")
def answered(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose sft, control and last iteration have answered the questions; only to be copied."""
    place = tmp_path_factory.mktemp("answered") / "place"
    shutil.copytree(finished, place, symlinks=True)
    (place / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    with JudgeServer(by_words) as server:
        succeeded(arena(place, server, "--iterations", "control,1", "--questions", "questions.jsonl"))
    forget_results(place)
    return place


@pytest.fixture
def ready(answered: Path, tmp_path: Path) -> Path:
    """A copy of that, where nothing has been judged."""
    shutil.copytree(answered, tmp_path / "ready", symlinks=True)
    return tmp_path / "ready"


def forget_results(place: Path) -> None:
    run = RunDir(place / RUN)
    for record in run.records():
        if record["key"].startswith(("benchmarks/arena", "benchmarks/mt-bench")):
            run.forget(record["key"])
    for name in ("verdicts", "arena", "mt-bench"):
        shutil.rmtree(place / RUN / "benchmarks" / name, ignore_errors=True)


def suite(name: str, place: Path, server: JudgeServer, *options: str) -> Outcome:
    judge = ("--judge-url", server.url, "--judge-model", "org/judge")
    return spinlm("evaluate", RUN, "--suite", name, *judge, *options, cwd=place)


def arena(place: Path, server: JudgeServer, *options: str) -> Outcome:
    return suite("arena", place, server, *options)


def result(place: Path, key: str) -> dict[str, Any]:
    """Of the one judging of these contestants."""
    (path,) = (place / RUN / "benchmarks" / key).glob("*/result.json")
    return dict(read_json(path))


def judged_rows(place: Path, key: str) -> list[dict[str, Any]]:
    (path,) = (place / RUN / "benchmarks" / key).glob("*/questions.jsonl")
    return rows(path)


def held_out(place: Path, player: str) -> list[str]:
    """A player's greedy responses to the held-out prompts."""
    shards = sorted((place / RUN / "evaluation" / player / "greedy").glob("*.jsonl"))
    return [row["responses"][0]["text"] for shard in shards for row in rows(shard)]


def answers(place: Path, player: str) -> list[list[str]]:
    """A player's answers to the questions, by question and turn."""
    (folder,) = (place / RUN / "benchmarks/answers" / player).iterdir()
    found: dict[str, list[str]] = {str(question["question_id"]): [] for question in QUESTIONS}
    for turn in sorted(folder.iterdir()):
        for shard in sorted(turn.glob("*.jsonl")):
            for row in rows(shard):
                found[row["id"]].append(row["responses"][0]["text"])
    return list(found.values())


def preferred(one: str, other: str) -> float:
    return 0.5 if one == other else float(worth(one) > worth(other))


class TestArena:
    def test_held_out_prompts_are_answered_already(self, copied: Path) -> None:
        """What the judge prefers is known, so the win rate is; and nothing is generated."""
        with JudgeServer(by_words) as server:
            outcome = succeeded(arena(copied, server))
        expected = {}
        for player in ("iteration-0", "iteration-1"):
            mine, theirs = held_out(copied, player), held_out(copied, "sft")
            expected[player] = [preferred(one, other) for one, other in zip(mine, theirs, strict=True)]
            found = result(copied, f"arena/{player}-vs-sft")
            assert found["win_rate"]["value"] == pytest.approx(sum(expected[player]) / 3)
            assert (found["wins"], found["ties"], found["losses"]) == tuple(
                expected[player].count(value) for value in (1.0, 0.5, 0.0)
            )
            assert (found["player"], found["other"], found["judge"]) == (player, "sft", "org/judge")
            assert (found["questions"], found["no_verdict"]) == ("held-out", 0)
            rows_of_it = judged_rows(copied, f"arena/{player}-vs-sft")
            assert [(row["length"], row["other_length"]) for row in rows_of_it] == [
                (len(one), len(other)) for one, other in zip(mine, theirs, strict=True)
            ]
        assert not (copied / RUN / "benchmarks/answers").exists()
        assert "arena: held-out, judged by org/judge" in outcome.out
        assert "iteration-1 against sft" in outcome.out
        assert pieces(server.requests[0]["messages"][0]["content"])["request"].startswith("say a")

    def test_questions_of_several_turns(self, ready: Path) -> None:
        with JudgeServer(by_words) as server:
            succeeded(arena(ready, server, "--iterations", "latest", "--questions", "questions.jsonl"))
        mine, theirs = answers(ready, "iteration-1"), answers(ready, "sft")
        assert [len(texts) for texts in mine] == [2, 1, 2, 1]
        wins = [preferred("".join(one), "".join(other)) for one, other in zip(mine, theirs, strict=True)]
        assert result(ready, "arena/iteration-1-vs-sft")["win_rate"]["value"] == sum(wins) / 4
        asked = [pieces(body["messages"][0]["content"]) for body in server.requests]
        of = next(parts for parts in asked if (parts["request 1"], parts.get("request 2")) == ("say a", "again"))
        assert {of["A's answer 1"], of["B's answer 1"]} == {mine[0][0], theirs[0][0]}
        assert {of["A's answer 2"], of["B's answer 2"]} == {mine[0][1], theirs[0][1]}

    def test_a_judge_that_sees_only_the_order(self, ready: Path) -> None:
        with JudgeServer(lambda _: "Verdict: A") as server:
            succeeded(arena(ready, server, "--iterations", "1", "--questions", "questions.jsonl"))
        found = result(ready, "arena/iteration-1-vs-sft")
        assert (found["win_rate"]["value"], found["ties"]) == (0.5, 4)
        assert (found["position_bias"]["value"], found["first_preferred"]["value"]) == (1.0, 1.0)

    def test_swapping_the_players_mirrors_it_and_asks_nobody(self, ready: Path) -> None:
        with JudgeServer(by_words) as server:
            one = ("--iterations", "control", "--against", "sft", "--questions", "questions.jsonl")
            other = ("--iterations", "sft", "--against", "control", "--questions", "questions.jsonl")
            succeeded(arena(ready, server, *one))
            requests = len(server.requests)
            succeeded(arena(ready, server, *other))
            assert len(server.requests) == requests > 0
        mine, theirs = result(ready, "arena/control-vs-sft"), result(ready, "arena/sft-vs-control")
        for name in ("win_rate", "length_controlled_win_rate"):
            assert mine[name]["value"] == pytest.approx(1 - theirs[name]["value"], abs=1e-9)
            assert mine[name]["low"] == pytest.approx(1 - theirs[name]["high"], abs=1e-9)
        assert (mine["wins"], mine["losses"]) == (theirs["losses"], theirs["wins"])
        assert mine["position_bias"] == theirs["position_bias"]

    def test_equal_answers_are_a_tie_and_nobody_is_asked(self, ready: Path) -> None:
        mine = answers(ready, "iteration-1")
        same = [{"question_id": number, "response": texts} for number, texts in enumerate(mine, start=1)]
        same[0]["response"] = ["another", "answer"]
        write_rows(ready / "same.jsonl", same)
        with JudgeServer(by_words) as server:
            options = ("--iterations", "1", "--questions", "questions.jsonl", "--against", "same.jsonl")
            succeeded(arena(ready, server, *options))
        assert len(server.requests) == 2
        found = result(ready, "arena/iteration-1-vs-same.jsonl")
        assert (found["equal_answers"], found["position_bias"]["prompts"]) == (3, 1)
        assert found["ties"] + found["wins"] + found["losses"] == 4

    def test_no_verdict_is_counted_and_never_guessed(self, ready: Path) -> None:
        def silent_on_one(prompt: str) -> str:
            return "I can't tell." if pieces(prompt).get("request") == "say b" else by_words(prompt)

        with JudgeServer(silent_on_one) as server:
            outcome = arena(ready, server, "--iterations", "1", "--questions", "questions.jsonl")
        found = result(ready, "arena/iteration-1-vs-sft")
        assert (found["no_verdict"], found["win_rate"]["prompts"]) == (1, 3)
        assert found["wins"] + found["ties"] + found["losses"] == 3
        assert "iteration-1 against sft: 1 without a verdict" in " ".join(succeeded(outcome).out.split())
        silent = judged_rows(ready, "arena/iteration-1-vs-sft")[1]
        assert (silent["shown_first"], silent["shown_second"]) == (None, None)
        assert silent["judge"] == ["I can't tell."] * 2
        assert sum("say b" in body["messages"][0]["content"] for body in server.requests) == 2 * READINGS

    def test_only_the_first_questions_for_a_try(self, copied: Path) -> None:
        """Their result is one of its own."""
        with JudgeServer(by_words) as server:
            succeeded(arena(copied, server, "--iterations", "1", "--limit", "2"))
            requests = len(server.requests)
            succeeded(arena(copied, server, "--iterations", "1"))
        assert requests <= 4
        results = sorted((copied / RUN / "benchmarks/arena/iteration-1-vs-sft").glob("*/result.json"))
        counts = {found["questions"]: found["win_rate"]["prompts"] for found in map(read_json, results)}
        assert counts == {"held-out": 3, "held-out, the first 2": 2}

    def test_a_damaged_result(self, ready: Path) -> None:
        options = ("--iterations", "1", "--questions", "questions.jsonl")
        with JudgeServer(by_words) as server:
            succeeded(arena(ready, server, *options))
            before = contents(ready / RUN)
            requests = len(server.requests)
            (damaged,) = (ready / RUN / "benchmarks/arena/iteration-1-vs-sft").glob("*/result.json")
            flip_a_byte(damaged)
            refused(arena(ready, server, *options), "result.json: not what was committed", "--repair")
            succeeded(arena(ready, server, *options, "--repair"))
            assert len(server.requests) == requests
        assert contents(ready / RUN) == before


class TestMTBench:
    def test_grades(self, ready: Path) -> None:
        """The grade is the length of the answer that is graded, up to 10."""

        def grade(prompt: str) -> str:
            *_, last = pieces(prompt).values()
            return f"It has {len(last)} characters.\nGrade: {min(max(len(last), 1), 10)}"

        with JudgeServer(grade) as server:
            options = ("--iterations", "1", "--against", "control", "--questions", "questions.jsonl")
            outcome = succeeded(suite("mt-bench", ready, server, *options))
        assert len(server.requests) == 2 * 6
        for player in ("iteration-1", "control"):
            grades = [[min(max(len(text), 1), 10) for text in texts] for texts in answers(ready, player)]
            found = result(ready, f"mt-bench/{player}")
            assert found["grade"]["value"] == pytest.approx(sum(map(sum, grades)) / 6)
            assert found["turns"]["1"]["value"] == sum(of[0] for of in grades) / 4
            assert found["turns"]["2"]["value"] == (grades[0][1] + grades[2][1]) / 2
            assert found["categories"]["odd"]["value"] == (sum(grades[0]) + sum(grades[2])) / 4
            assert found["categories"]["even"]["value"] == (sum(grades[1]) + sum(grades[3])) / 2
            assert found["no_verdict"] == 0
            assert [row["grades"] for row in judged_rows(ready, f"mt-bench/{player}")] == grades
        prompts = [pieces(body["messages"][0]["content"]) for body in server.requests]
        assert {of.get("reference answer") for of in prompts if of.get("request 1") == "say a"} == {"a", "aa"}
        assert not any("reference answer" in of for of in prompts if of.get("request") == "say b")
        assert "mt-bench: questions, judged by org/judge" in outcome.out

    def test_the_default_questions_are_on_the_hub(self, copied: Path) -> None:
        with JudgeServer(by_words) as server:
            message = refused(suite("mt-bench", copied, server), "mt-bench: questions: HuggingFaceH4/mt_bench_prompts")
        assert "give them by --questions FILE" in message

    def test_they_are_taken_from_there(self, ready: Path) -> None:
        """A directory of that name stands in for the hub."""
        hub = ready / "HuggingFaceH4/mt_bench_prompts"
        hub.mkdir(parents=True)
        write_rows(hub / "train.jsonl", [{"prompt_id": 0, "category": "writing", "prompt": ["say a", "say b"]}])
        with JudgeServer(lambda _: "Grade: 7") as server:
            succeeded(suite("mt-bench", ready, server, "--iterations", "best"))
        assert result(ready, "mt-bench/sft")["grade"] == {"value": 7.0, "low": 7.0, "high": 7.0, "prompts": 1}
        assert judged_rows(ready, "mt-bench/sft")[0]["id"] == "0"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def by_transformers(family: str, seed: int, messages: list[dict[str, str]]) -> list[int]:
    """The greedy answer of a tiny model, by transformers' own generate."""
    tokenizer, model = tiny.build_tokenizer(), tiny.build_model(family, seed=seed)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    stops = [tiny.END_OF_TEXT, tiny.IM_END]
    out = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=stops, pad_token_id=tiny.END_OF_TEXT)
    return list(out[0, ids.shape[1] :].tolist())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class TestOtherContestants:
    def test_another_model(self, asked: Path) -> None:
        """It answers by its own weights, on the run's held-out prompts and on others."""
        tiny.save_model(asked / "another", "gpt2", seed=1)
        with JudgeServer(by_words) as server:
            succeeded(arena(asked, server, "--iterations", "1", "--against", "another"))
            more = ("--iterations", "1", "--against", "./another", "--questions", "questions.jsonl")
            succeeded(arena(asked, server, *more))
        folder = asked / RUN / "benchmarks/answers/another"
        examples = rows(asked / RUN / "data/held_out.jsonl")
        held_out = rows(next(folder.glob("held-out-*/turn-1/00000.jsonl")))
        first, second = (rows(next(folder.glob(f"questions-*/turn-{turn}/00000.jsonl")))[0] for turn in (1, 2))
        assert [row["id"] for row in held_out] == [example["id"] for example in examples]
        for example, row in zip(examples, held_out, strict=True):
            assert row["responses"][0]["token_ids"] == by_transformers("gpt2", 1, [user(example["prompt"])])
        said = [user("say a")]
        assert first["responses"][0]["token_ids"] == by_transformers("gpt2", 1, said)
        said += [{"role": "assistant", "content": first["responses"][0]["text"]}, user("again")]
        assert second["responses"][0]["token_ids"] == by_transformers("gpt2", 1, said)
        results = sorted((asked / RUN / "benchmarks/arena/iteration-1-vs-another").glob("*/result.json"))
        assert {read_json(path)["questions"] for path in results} == {"held-out", "questions"}

    def test_a_file_of_answers(self, copied: Path) -> None:
        prompts = [row["prompt"] for row in rows(copied / RUN / "data/held_out.jsonl")]
        write_rows(copied / "people.jsonl", [{"prompt": prompt, "response": "x" * 50} for prompt in prompts])
        with JudgeServer(by_words) as server:
            succeeded(arena(copied, server, "--iterations", "0", "--against", "people.jsonl"))
        found = result(copied, "arena/iteration-0-vs-people.jsonl")
        wins = [preferred(one, "x" * 50) for one in held_out(copied, "iteration-0")]
        assert found["win_rate"]["value"] == pytest.approx(sum(wins) / 3)
        assert found["other_length"]["value"] == 50

    def test_a_file_without_an_answer(self, ready: Path) -> None:
        path = write_rows(ready / "some.jsonl", [{"question_id": 2, "response": "b"}])
        with JudgeServer(by_words) as server:
            options = ("--iterations", "1", "--questions", "questions.jsonl", "--against", str(path))
            refused(arena(ready, server, *options), "question 1 wants a list of 2 responses, and has none")

    def test_a_conversation_with_a_system_prompt(self, place: Path) -> None:
        """The judge, and another model, see the whole held-out conversation."""
        conversations = [
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"say {'a' * (i + 1)}"},
                {"role": "assistant", "content": f"{'ab' * (i % 4 + 1)} {i}"},
            ]
            for i in range(12)
        ]
        write_rows(place / "data.jsonl", [{"messages": turns} for turns in conversations])
        changes = ("iterations=1", "sft=null", "data.held_out=2", "data.max_prompt_tokens=90", "data.max_length=110")
        succeeded(spinlm("run", "recipe.yaml", *changes, cwd=place))
        tiny.save_model(place / "another", "gpt2", seed=1)
        with JudgeServer(by_words) as server:
            succeeded(arena(place, server, "--against", "another"))
        for body in server.requests:
            of = pieces(body["messages"][0]["content"])
            assert (of["system prompt"], of["request"][:4]) == ("Be brief.", "say ")
        assert len(server.requests) > 0


class TestInterrupted:
    def options(self) -> tuple[str, ...]:
        return ("--iterations", "1", "--questions", "questions.jsonl", "--judge-concurrency", "1")

    def test_it_goes_on_where_it_was(self, ready: Path, tmp_path: Path) -> None:
        """The rate is limited for good after five verdicts; afterwards only the others are asked for."""
        whole = tmp_path / "whole"
        shutil.copytree(ready, whole, symlinks=True)
        with JudgeServer(by_words) as server:
            succeeded(arena(whole, server, *self.options()))
            all_prompts = [body["messages"][0]["content"] for body in server.requests]

        def stops(prompt: str) -> str:
            if len(stopping.requests) == 5:
                stopping.faults = [error(429, "enough for today", Retry_After="0")] * TRIES
            return by_words(prompt)

        with JudgeServer(stops) as stopping:
            outcome = arena(ready, stopping, *self.options())
        refused(outcome, "answers 429: enough for today", "The verdicts until now are kept")
        assert len(list((ready / RUN / "benchmarks/verdicts").glob("*/*.json"))) == 5
        assert not (ready / RUN / "benchmarks/arena").exists()
        with JudgeServer(by_words) as server:
            succeeded(arena(ready, server, *self.options()))
            assert [body["messages"][0]["content"] for body in server.requests] == all_prompts[5:]
            succeeded(arena(ready, server, *self.options()))
            assert len(server.requests) == len(all_prompts) - 5
        assert differing(whole / RUN, ready / RUN) == []

    @pytest.mark.slow
    def test_it_is_killed(self, ready: Path, tmp_path: Path) -> None:
        whole = tmp_path / "whole"
        shutil.copytree(ready, whole, symlinks=True)
        place = {"call": "spinlm.evaluation.judge:write_json", "matching": "verdicts", "moment": "before"}
        committing = {"call": "spinlm.rundir:Artifact._commit", "matching": "benchmarks/arena", "moment": "before"}
        with JudgeServer(by_words) as server:
            succeeded(arena(whole, server, *self.options()))
            count = len(server.requests)
            judge = ("--judge-url", server.url, "--judge-model", "org/judge")
            arguments = ("evaluate", RUN, "--suite", "arena", *judge, *self.options())
            killed_at(place, committing, None, arguments=arguments, cwd=ready)
            assert len(server.requests) == 2 * count + 1  # the first verdict was lost with the process
        assert differing(whole / RUN, ready / RUN) == []

    def test_a_signal_ends_it_while_the_judge_is_thinking(self, ready: Path) -> None:
        def interrupts(prompt: str) -> str:
            if len(thinking.requests) == 3:
                thinking.faults = [HANG] * 9
                os.kill(os.getpid(), signal.SIGINT)
            return by_words(prompt)

        with JudgeServer(interrupts) as thinking:
            outcome = arena(ready, thinking, *self.options())
            assert outcome.code == 130
            assert outcome.err.splitlines()[-1] == "spinlm: stopped by SIGINT; the same command goes on from here"
            asked = len(thinking.requests)
            assert asked in (3, 4)  # the one that it is thinking about is let go
        with JudgeServer(by_words) as server:
            succeeded(arena(ready, server, *self.options()))
            assert [body for body in server.requests if body in thinking.requests[:2]] == []

    def test_how_many_are_asked_at_once_changes_nothing(self, ready: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        shutil.copytree(ready, other, symlinks=True)
        for place, concurrency in ((ready, "1"), (other, "8")):
            with JudgeServer(by_words) as server:
                options = ("--iterations", "1", "--questions", "questions.jsonl", "--judge-concurrency", concurrency)
                succeeded(arena(place, server, *options))
                assert server.most_at_once <= int(concurrency)
        assert differing(ready / RUN, other / RUN) == []

    def test_a_changed_answer_is_judged_anew(self, ready: Path) -> None:
        texts = answers(ready, "iteration-1")
        rows_of_file = [{"question_id": i, "response": ["x"] * len(of)} for i, of in enumerate(texts, start=1)]
        options = ("--iterations", "1", "--questions", "questions.jsonl", "--against", "file.jsonl")
        with JudgeServer(by_words) as server:
            write_rows(ready / "file.jsonl", rows_of_file)
            succeeded(arena(ready, server, *options))
            before = len(server.requests)
            rows_of_file[1]["response"] = ["y"]
            write_rows(ready / "file.jsonl", rows_of_file)
            succeeded(arena(ready, server, *options))
            assert len(server.requests) == before + 2
        results = list((ready / RUN / "benchmarks/arena/iteration-1-vs-file.jsonl").glob("*/result.json"))
        assert len(results) == 2  # nothing that is committed is replaced


class TestTheKey:
    def test_it_is_sent_and_written_nowhere(self, ready: Path) -> None:
        """Not even where the server sends it back in all it says; at last in a process of its own."""
        options = ("evaluate", RUN, "--suite", "arena", "--iterations", "1", "--judge-model", "org/judge")
        outcomes = []
        with JudgeServer(lambda prompt: f"{KEY}\n{by_words(prompt)}") as server:
            judging = (*options, "--judge-url", server.url, "--questions", "questions.jsonl")
            server.hello = error(401, f"Incorrect API key: {KEY}")
            outcomes.append(spinlm(*judging, cwd=ready))
            refused(outcomes[-1], "doesn't take the key in SPINLM_JUDGE_KEY: Incorrect API key: [key]")
            server.hello = None
            server.faults = [error(429, f"Bearer {KEY} is too fast", Retry_After="0")] * 100
            outcomes.append(spinlm(*judging, cwd=ready))
            refused(outcomes[-1], "answers 429: Bearer [key] is too fast")
            server.faults = []
            outcomes.append(succeeded(spinlm_process(*judging, cwd=ready)))
            assert set(server.authorization) == {f"Bearer {KEY}"}
        for outcome in outcomes:
            assert KEY not in outcome.out + outcome.err
        for name, content in contents(ready, without=()).items():
            assert KEY.encode() not in (content if isinstance(content, bytes) else content.encode()), name

    def test_the_url_is_written_nowhere_either(self, ready: Path) -> None:
        with JudgeServer(by_words) as server:
            succeeded(arena(ready, server, "--iterations", "1", "--questions", "questions.jsonl"))
            for name, content in contents(ready, without=()).items():
                assert server.url.encode() not in (content if isinstance(content, bytes) else content.encode()), name


class TestBadInput:
    @pytest.fixture
    def server(self) -> Iterator[JudgeServer]:
        with JudgeServer(by_words) as server:
            yield server

    def test_a_judge_that_isnt_there(self, asked: Path) -> None:
        """It is found out before anything is generated."""
        with JudgeServer(by_words) as server:
            pass
        before = contents(asked / RUN)
        options = ("--iterations", "1", "--questions", "questions.jsonl")
        message = refused(arena(asked, server, *options), f"the judge org/judge at {server.url} can't be reached")
        assert message.count("\n") == 1
        assert contents(asked / RUN) == before

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--suite", "arena"), ("arena: a model judges: give both --judge-url and --judge-model",)),
            (("--suite", "arena", "--judge-url", "http://h/v1"), ("give both --judge-url and --judge-model",)),
            (("--suite", "mt-bench", "--judge-model", "m"), ("mt-bench: a model judges: give both",)),
            (("--judge-url", "http://h/v1"), ("go with --suite arena or mt-bench",)),
            (("--against", "base"), ("go with --suite arena or mt-bench",)),
            (("--limit", "3"), ("go with --suite",)),
            (("--suite", "arena", "--batch-size", "3"), ("--batch-size goes with --suite and a suite of lm-eval's",)),
            (("--suite", "arena", "--judge-url", "h", "--judge-model", "m"), ("--judge-url: h: give it as http://",)),
        ],
    )
    def test_options_that_dont_go_together(self, copied: Path, options: tuple[str, ...], words: tuple[str]) -> None:
        before = contents(copied / RUN)
        refused(spinlm("evaluate", RUN, *options, cwd=copied), *words)
        assert contents(copied / RUN) == before

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--iterations", "5"), ("has no trained iteration '5'; trained are: 0, 1",)),
            (("--iterations", "0,5"), ("has no trained iteration '5'; trained are: 0, 1",)),
            (("--iterations", "worst"), ("has no trained iteration 'worst'",)),
            (
                ("--against", "iteration-7"),
                ("iteration-7 isn't trained yet", "there are: base, sft, iteration-0, iteration-1"),
            ),
            (
                ("--against", "sfft"),
                ("--against: sfft is none of the run's players (base, sft, iteration-0", "did you mean sft?"),
            ),
            (("--against", "./nothing"), ("./nothing is none of the run's players", "no such directory")),
            (("--against", "nothing.jsonl"), ("--against: nothing.jsonl: no such file",)),
            (("--iterations", "0", "--against", "iteration-0"), ("iteration-0 can't be held against itself",)),
            (("--questions", "nothing.jsonl"), ("arena: questions: nothing.jsonl: no such file",)),
            (("--questions", "long.jsonl"), ("questions: long.jsonl:1 has", "over the 128 that sft takes")),
        ],
    )
    def test_what_isnt_there(
        self, copied: Path, server: JudgeServer, options: tuple[str, ...], words: tuple[str, ...]
    ) -> None:
        write_rows(copied / "long.jsonl", [{"prompt": "word " * 100}])
        before = contents(copied / RUN)
        refused(arena(copied, server, *options), *words)
        assert contents(copied / RUN) == before
        assert server.requests == []

    def test_overrides_of_a_run(self, copied: Path) -> None:
        refused(spinlm("evaluate", RUN, "seed=1", cwd=copied), "a run keeps to its own recipe: take seed=1 out")

    def test_a_run_directory_is_enough_for_held_out_measures(self, copied: Path) -> None:
        before = contents(copied / RUN)
        succeeded(spinlm("evaluate", RUN, cwd=copied))
        assert contents(copied / RUN) == before

    def test_no_run(self, place: Path, server: JudgeServer) -> None:
        refused(arena(place, server), "runs/recipe")
        assert not (place / RUN).exists()

    def test_a_run_without_iterations(self, place: Path, server: JudgeServer) -> None:
        succeeded(spinlm("generate", "recipe.yaml", cwd=place))
        refused(arena(place, server), "no iteration is trained yet")

    def test_nothing_held_out(self, place: Path, server: JudgeServer) -> None:
        changes = ("iterations=1", "sft=null", "data.held_out=0")
        succeeded(spinlm("run", "recipe.yaml", *changes, cwd=place))
        refused(arena(place, server), "holds nothing out: give questions by --questions FILE")

    def test_another_base_model_under_the_same_name(self, asked: Path, server: JudgeServer) -> None:
        tiny.save_model(asked / "model", "llama", seed=1)
        refused(arena(asked, server, "--questions", "questions.jsonl"), "model.name: ./model isn't the base")

    @pytest.mark.parametrize("name", ["arena", "mt-bench"])
    def test_a_judge_that_says_nothing_of_use(self, ready: Path, name: str) -> None:
        """Nothing is committed, nothing is kept: a better judge of the same name may follow."""
        options = ("--iterations", "1", "--questions", "questions.jsonl")
        with JudgeServer(lambda _: "As a language model, I like both.") as server:
            refused(
                suite(name, ready, server, *options), "gives no verdict that can be read", "I like both.", "org/judge"
            )
        assert not (ready / RUN / "benchmarks" / name).exists()
        assert not (ready / RUN / "benchmarks/verdicts").exists()


def test_tables_come_from_the_run_directory_alone(ready: Path) -> None:
    with JudgeServer(by_words) as server:
        options = ("--iterations", "1,control", "--questions", "questions.jsonl")
        outcome = succeeded(arena(ready, server, *options))
    shutil.move(ready / RUN, ready / "elsewhere")
    (table,) = judged_tables(RunDir(ready / "elsewhere"))
    assert table.title == "arena: questions, judged by org/judge"
    assert [row[0] for row in table.rows] == ["control against sft", "iteration-1 against sft"]
    for row in table.rows:
        assert row[0] in outcome.out
        assert re.fullmatch(r"\d\.\d+ \[\d\.\d+, \d\.\d+\]", row[1])


def test_a_player_that_was_trained_anew_has_no_results(ready: Path) -> None:
    with JudgeServer(by_words) as server:
        succeeded(arena(ready, server, "--iterations", "1,control", "--questions", "questions.jsonl"))
    run = RunDir(ready / RUN)
    artifact = run.artifact("control/adapter", "control", {})
    with artifact.staging() as place:
        shutil.copytree(ready / RUN / "iterations/0/adapter", place)
    (table,) = judged_tables(run)
    assert [row[0] for row in table.rows] == ["iteration-1 against sft"]


class TinyJudge:
    """A small model that has learned how a verdict looks, and no more: it says A, B, tie, and now and then nonsense."""

    def __init__(self) -> None:
        self._tokenizer, self._model = tiny.build_tokenizer(), tiny.build_model("llama")
        self._lock = threading.Lock()
        self.said: dict[str, str] = {}
        prompt = self._ids(PAIRWISE)
        verdicts = [prompt + self._tokens(f"Verdict: {verdict}<|im_end|>") for verdict in ("A", "B", "tie")]
        longest = max(map(len, verdicts))
        ids = torch.tensor([row + [tiny.END_OF_TEXT] * (longest - len(row)) for row in verdicts])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in verdicts])
        labels[:, : len(prompt)] = -100
        optimiser = torch.optim.Adam(self._model.parameters(), lr=1e-2)
        for _ in range(45):
            self._model(input_ids=ids, labels=labels).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    def __call__(self, prompt: str) -> str:
        """A sample that depends on the prompt alone."""
        ids = torch.tensor([self._ids(prompt)])
        with self._lock, torch.random.fork_rng():
            torch.manual_seed(int(digest(prompt)[:12], 16))
            out = self._model.generate(
                ids, do_sample=True, max_new_tokens=16, eos_token_id=tiny.IM_END, pad_token_id=tiny.END_OF_TEXT
            )
            self.said[prompt] = self._tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return self.said[prompt]

    def _ids(self, prompt: str) -> list[int]:
        """The end of the prompt, as much as the model takes."""
        messages = [{"role": "user", "content": prompt}]
        return self._tokens(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))[
            -60:
        ]

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_real_model_judges(copied: Path) -> None:
    """From end to end: what comes out is what the model said, its nonsense counted and left out."""
    questions = [{"question_id": number, "prompt": f"say {number}"} for number in range(1, 25)]
    write_rows(copied / "many.jsonl", questions)
    theirs = {f"say {number}": f"no {number}" for number in range(1, 25)}
    write_rows(
        copied / "people.jsonl", [{"prompt": prompt, "response": response} for prompt, response in theirs.items()]
    )
    judge = TinyJudge()
    with JudgeServer(judge) as server:
        options = ("--iterations", "1", "--questions", "many.jsonl", "--against", "people.jsonl")
        succeeded(arena(copied, server, *options))
    outcomes: dict[str, dict[str, float | None]] = {prompt: {} for prompt in theirs}
    for prompt, words in judge.said.items():
        of = pieces(prompt)
        people_are_first = of["A's answer"] == theirs[of["request"]]
        winner = {"Verdict: A": 1.0, "Verdict: B": 0.0, "Verdict: tie": 0.5}.get(words.strip())
        value = None if winner is None else 1 - winner if people_are_first else winner
        outcomes[of["request"]]["second" if people_are_first else "first"] = value
    judged = [o for o in outcomes.values() if None not in o.values()]
    values = [o["first"] if o["first"] == o["second"] else 0.5 for o in judged]
    found = result(copied, "arena/iteration-1-vs-people.jsonl")
    assert 0 < found["no_verdict"] == 24 - len(judged) < 24
    assert found["win_rate"]["value"] == pytest.approx(sum(value or 0 for value in values) / len(values))
    assert found["position_bias"]["value"] == pytest.approx(
        sum(o["first"] != o["second"] for o in judged) / len(judged)
    )
    unreadable = sum(value is None for o in outcomes.values() for value in o.values())
    assert len(server.requests) == 48 + (READINGS - 1) * unreadable
