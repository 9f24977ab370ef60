"""Who answers the questions of a judged benchmark: players of a run, another model, or a file of answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from spinlm.config import AdapterSection, DataSection, ModelSection, PromptSection
from spinlm.data.examples import Message
from spinlm.data.formats import load_examples
from spinlm.data.prepare import TokenizedExample
from spinlm.data.questions import Question, load_questions
from spinlm.data.render import Renderer, RenderError
from spinlm.data.sources import commit_of, read_rows
from spinlm.errors import UserError, nearest
from spinlm.files import digest
from spinlm.generation.engine import Response
from spinlm.paths import found
from spinlm.players.models import Player, context_length
from spinlm.stages import Stages

MT_BENCH = "HuggingFaceH4/mt_bench_prompts"
"""The questions of MT-bench (arXiv 2306.05685), on the hub."""


@dataclass(frozen=True)
class QuestionSet:
    """Questions, and where they are from.

    Attributes:
        name: `held-out`, a file's name without its ending, or a dataset's on the hub.
        questions: At least one.
        held_out: Whether they are the run's held-out prompts, which its players have answered already.
        commit: That they were read at on the hub, where they are from there.
    """

    name: str
    questions: list[Question]
    held_out: bool = False
    commit: str | None = None

    @cached_property
    def hash(self) -> str:
        return digest([asdict(question) for question in self.questions])

    def limited(self, limit: int | None) -> QuestionSet:
        """The first of them, for a try."""
        if limit is None:
            return self
        return replace(self, name=f"{self.name}, the first {limit}", questions=self.questions[:limit])

    @classmethod
    def read(cls, source: str) -> QuestionSet:
        """From a file, a directory or the hub, there also by `name@revision`.

        Raises:
            UserError: They can't be had.
        """
        name, revision = _at_revision(source)
        questions = load_questions(name, revision)
        commit = commit_of(DataSection(source=name, revision=revision))
        return cls(Path(source).stem if found(source) else source, questions, commit=commit)

    @classmethod
    def of_run(cls, stages: Stages) -> QuestionSet:
        """The held-out prompts of a run, each as its whole conversation.

        Raises:
            UserError: Nothing is held out.
        """
        examples = stages.data.held_out
        if not examples:
            raise UserError(f"{stages.run.path}: holds nothing out: give questions by --questions FILE")
        conversations: dict[str, tuple[Message, ...]] = {
            example.id: (Message(role="user", content=example.prompt),) for example in examples
        }
        if not all(_renders_to(stages.renderer, conversations[e.id], e.prompt_ids) for e in examples):
            whole = {example.id: example.messages for example in load_examples(stages.dataset)[0]}
            conversations = {id: whole[id] for id in conversations}  # with system prompts and earlier turns
        return cls("held-out", [Question(id, messages) for id, messages in conversations.items()], held_out=True)


@dataclass(frozen=True)
class Sheet:
    """What somebody answers.

    Attributes:
        name: For people.
        player: The hash of the player's weights; None for a file of answers.
        texts: Of each question, one answer for each turn.
        cut: How many of them were cut at the cap on new tokens.
        commit: That another model was read at on the hub.
    """

    name: str
    player: str | None
    texts: list[list[str]]
    cut: int
    commit: str | None = None

    @cached_property
    def hash(self) -> str:
        return digest(self.texts)


class Contestant(Protocol):
    """Somebody who answers.

    Attributes:
        name: For people.
    """

    @property
    def name(self) -> str: ...

    def answer(self, questions: QuestionSet) -> Sheet:
        """Its answers, made where they aren't committed yet."""
        ...


@dataclass(frozen=True)
class PlayerOfRun:
    """One of the run's players."""

    stages: Stages
    player: Player

    @property
    def name(self) -> str:
        return self.player.name

    def answer(self, questions: QuestionSet) -> Sheet:
        """Held-out prompts have been answered already: by the greedy responses, where the recipe wants them."""
        if not questions.held_out:
            return _answer_in_turn(self.stages, self.player, questions)
        sampled, greedy = self.stages.answer(self.player)
        responses = (greedy or sampled).responses[: len(questions.questions)]
        return _sheet(self.player, [[of_prompt[0]] for of_prompt in responses])


class OtherModel:
    """A model that the run knows nothing of, by its own tokenizer and chat template."""

    def __init__(self, stages: Stages, name: str) -> None:
        """Loads no weights.

        Args:
            stages: The run's.
            name: A directory, a `.gguf` file or a name on the hub, there also with `@revision`.

        Raises:
            UserError: There is no such model.
        """
        known_by, revision = _at_revision(name)
        self.name = Path(name).name if found(name) else name
        self._of_run = stages
        recipe = stages.recipe
        changes = {
            "model": ModelSection(
                name=known_by, revision=revision, dtype=recipe.model.dtype, device=recipe.model.device
            ),
            "adapter": AdapterSection(),  # none is trained: the base plays
            "prompt": PromptSection(),
            "generation": recipe.generation.model_copy(update={"engine": "transformers"}),
        }
        self._stages = Stages(recipe.model_copy(update=changes), stages.run, stages.progress, only={"benchmark"})
        _ = self._stages.renderer, self._stages.players.config  # by which all but its weights is there

    def answer(self, questions: QuestionSet) -> Sheet:
        """One model is in memory: the run's is dropped first, and then this one."""
        self._of_run.close()
        self._of_run.players.forget()
        try:
            sheet = _answer_in_turn(self._stages, replace(self._stages.base, name=self.name), questions)
            return replace(sheet, commit=self._stages.players.commit)
        finally:
            self._stages.close()
            self._stages.players.forget()


@dataclass(frozen=True)
class FileOfAnswers:
    """Answers that somebody else has made: rows with `question_id` or `prompt`, and `response`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def answer(self, questions: QuestionSet) -> Sheet:
        """By name or by the prompt's words; a conversation of several turns has a list of responses.

        Raises:
            UserError: A question has no answer, or not one for each turn.
        """
        answers: dict[str, list[str]] = {}
        try:
            rows = read_rows(DataSection(source=str(self.path)))
        except UserError as error:
            raise UserError(str(error).replace("data.source", "--against")) from None
        for row in rows:
            given = row.columns.get("response")
            given = given if isinstance(given, list) else [given]
            texts = [text for text in given if isinstance(text, str)]
            if len(texts) < len(given):
                raise UserError(f"--against: {self.path}: {row.place}: response is not text, nor a list of texts")
            for key in ("question_id", "prompt"):
                if row.columns.get(key) is not None:
                    answers[str(row.columns[key])] = texts
        return Sheet(self.name, None, [self._of(question, answers) for question in questions.questions], cut=0)

    def _of(self, question: Question, answers: Mapping[str, list[str]]) -> list[str]:
        texts = answers.get(question.id, answers.get(question.messages[-1]["content"], []))
        if len(texts) != question.turns:
            wanted = "1 response" if question.turns == 1 else f"a list of {question.turns} responses"
            raise UserError(
                f"--against: {self.path}: question {question.id} wants {wanted}, and has {len(texts) or 'none'}: give "
                "rows with question_id or prompt, and response"
            )
        return texts


def opposing(stages: Stages, against: str | None) -> Contestant:
    """Who the others are held against: a player of the run, a file of answers, another model, in that order.

    Args:
        stages: The run's.
        against: None: the player that self-play started from.

    Raises:
        UserError: There is no such player, and no such file or model.
    """
    if against is None:
        against = "base" if stages.recipe.sft is None else "sft"
    if re.fullmatch(r"base|sft|control|iteration-\d+", against):
        return PlayerOfRun(stages, stages.player(against))
    if Path(against).suffix in (".json", ".jsonl", ".ndjson", ".csv", ".parquet"):
        if not found(against):
            raise UserError(f"--against: {against}: no such file")
        return FileOfAnswers(Path(against))
    try:
        return OtherModel(stages, against)
    except UserError as error:
        names = ["base", *stages.trained_players()]
        which = f"none of the run's players ({', '.join(names)})"
        raise UserError(
            f"--against: {against} is {which}, and no model either: {error}{nearest(against, names)}"
        ) from None


def _at_revision(name: str) -> tuple[str, str | None]:
    """What `name@revision` says of something on the hub; whatever is here has no revision."""
    if found(name):
        return name, None
    on_hub, _, revision = name.partition("@")
    return on_hub, revision or None


def slug(name: str) -> str:
    """A name as a part of a path: letters, digits, dots, underscores and single dashes."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[:60].strip("-.") or "unnamed"


def _answer_in_turn(stages: Stages, player: Player, questions: QuestionSet) -> Sheet:
    """All first turns, then all second ones, which hold the player's own answers to the first."""
    asked = questions.questions
    for question in asked:
        _prompt(stages.renderer, question, ["x"] * (question.turns - 1))  # refused now, not when much is done
    version = digest([player.hash, questions.hash])[:8]
    folder = f"benchmarks/answers/{slug(player.name)}/{slug(questions.name)}-{version}"
    responses: list[list[Response | None]] = [[] for _ in asked]
    for turn in range(max(question.turns for question in asked)):
        prompts = {
            place: _prompt(stages.renderer, question, [r.text if r else "" for r in responses[place]])
            for place, question in enumerate(asked)
            if question.turns > turn
        }
        fitting = _fitting(stages, player, prompts, must_fit=turn == 0)
        title = f"{player.name}: benchmark ({slug(questions.name)}, turn {turn + 1})"
        answers = stages.answer_prompts(f"{folder}/turn-{turn + 1}", title, player, list(fitting.values()))
        given = dict(zip(fitting, answers.responses, strict=True))
        for place in prompts:
            responses[place].append(given[place][0] if place in given else None)
    return _sheet(player, responses)


def _prompt(renderer: Renderer, question: Question, answers: Sequence[str]) -> TokenizedExample:
    try:
        prompt_ids = renderer.prompt_ids(question.asked(answers))
    except RenderError as error:
        raise UserError(f"questions: {question.id}: {error}") from None
    return TokenizedExample(question.id, prompt_ids, real_ids=[], prompt="", real="")


def _fitting(
    stages: Stages, player: Player, prompts: Mapping[int, TokenizedExample], must_fit: bool
) -> dict[int, TokenizedExample]:
    """The prompts that leave room for a response in the model's context."""
    context, new = context_length(stages.players.config), stages.recipe.generation.max_new_tokens
    if context is None:
        return dict(prompts)
    fitting = {place: prompt for place, prompt in prompts.items() if len(prompt.prompt_ids) + new <= context}
    if must_fit and len(fitting) < len(prompts):
        long = next(prompt for place, prompt in prompts.items() if place not in fitting)
        raise UserError(
            f"questions: {long.id} has {len(long.prompt_ids)} tokens: with generation.max_new_tokens, {new}, that is "
            f"over the {context} that {player.name} takes; leave it out"
        )
    return fitting


def _sheet(player: Player, responses: Sequence[Sequence[Response | None]]) -> Sheet:
    """A conversation that had no room left in the model has an empty answer, which counts as cut."""
    cut = sum(r is None or r.finish_reason == "length" for of_question in responses for r in of_question)
    texts = [["" if r is None else r.text for r in of_question] for of_question in responses]
    return Sheet(player.name, player.hash, texts, cut)


def _renders_to(renderer: Renderer, messages: Sequence[Message], prompt_ids: Sequence[int]) -> bool:
    try:
        return renderer.prompt_ids(messages) == prompt_ids
    except RenderError:
        return False
