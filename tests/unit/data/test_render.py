"""Prompts and responses as token ids, worked out by hand for every kind of tokenizer and chat template."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import tiny
import tokenizers_zoo as zoo
from spinlm.config import PromptSection
from spinlm.data.examples import Message
from spinlm.data.render import Renderer, RenderError
from spinlm.errors import UserError
from tokenizers_zoo import pieces


def conversation(*turns: str, system: str | None = None) -> list[Message]:
    """Turns of user and assistant, one after the other."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return messages + [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(turns)]


def renderer(tokenizer: Any, stop_ids: Sequence[int] = (), **prompt: str) -> Renderer:
    return Renderer(tokenizer, PromptSection(**prompt), stop_ids)


HI = conversation("hi")
SYSTEM = conversation("hi", system="Be P.")
MULTI = conversation("hi", "yo", "so?")
WILD = 'Ünïcode 😀 日本\n\n  {{ "braces" }} \\n {% raw %}\ttab'
SPACED = "  spaced out \n"


@dataclass(frozen=True)
class Kind:
    """A tokenizer, what its model's generation settings stop at, and what to expect of it."""

    make: Callable[[], Any]
    stop_ids: tuple[int, ...]
    end_of_turn: int
    all_stop_ids: frozenset[int]
    bos: int | None
    system: bool = True
    multi_turn: bool = True


KINDS = {
    "gpt2": Kind(zoo.gpt2, (256,), 256, frozenset({256}), None, system=False, multi_turn=False),
    "opt": Kind(zoo.opt, (256,), 256, frozenset({256}), 256, system=False, multi_turn=False),
    "mistral-base": Kind(lambda: zoo.mistral(None), (2,), 2, frozenset({2}), 1, system=False, multi_turn=False),
    "llama2": Kind(zoo.llama2, (2,), 2, frozenset({2}), 1),
    "zephyr": Kind(zoo.mistral, (2,), 2, frozenset({2}), None),
    "llama3": Kind(zoo.llama3, (257, 260), 260, frozenset({257, 260}), 256),
    "llama3-eot-not-declared": Kind(zoo.llama3, (), 260, frozenset({257, 260}), 256),
    "chatml": Kind(zoo.chatml, (258, 256), 258, frozenset({258, 256}), None),
    "qwen3": Kind(lambda: zoo.chatml(zoo.QWEN3), (258, 256), 258, frozenset({258, 256}), None),
    "gemma": Kind(zoo.gemma, (2, 4), 4, frozenset({2, 4}), 1, system=False),
}

LLAMA3_HI = [256, 258, *b"user", 259, *b"\n\nhi", 260]
LLAMA3_ASKS = [258, *b"assistant", 259, *b"\n\n"]
CHATML_HI = [257, *b"user\nhi", 258, 10]
CHATML_ASKS = [257, *b"assistant\n"]

PARIS: list[tuple[str, list[Message], list[int], list[int]]] = [
    # After "Response: " comes "Paris" and not " Paris" (257): the space is the prompt's, as in generation.
    ("gpt2", HI, [*b"### Instruction: hi\n\n### Response: "], [*b"Par", 258, 256]),
    ("opt", HI, [256, *b"### Instruction: hi\n\n### Response: "], [*b"Paris", 256]),
    # The same here, where a lone "Paris" would even be given a space of its own.
    (
        "mistral-base",
        HI,
        [1, *pieces("###▁Instruction:▁hi{0A}{0A}###▁Response:▁")],
        [*pieces("Paris"), 2],
    ),
    ("llama2", HI, [1, *pieces("▁[INST]▁hi▁[/INST]")], [*pieces("{▁P}aris▁"), 2]),
    (
        "llama2",
        SYSTEM,
        [1, *pieces("▁[INST]▁<<SYS>>{0A}Be{▁P}.{0A}<</SYS>>{0A}{0A}hi▁[/INST]")],
        [*pieces("{▁P}aris▁"), 2],
    ),
    (
        "llama2",
        MULTI,
        [1, *pieces("▁[INST]▁hi▁[/INST]▁yo▁"), 2, 1, *pieces("▁[INST]▁so?▁[/INST]")],
        [*pieces("{▁P}aris▁"), 2],
    ),
    (
        "zephyr",
        HI,
        [*pieces("▁<|user|>{0A}hi"), 2, *pieces("{0A}<|assistant|>{0A}")],
        [*pieces("Paris"), 2],
    ),
    (
        "zephyr",
        SYSTEM,
        [*pieces("▁<|system|>{0A}Be{▁P}."), 2, *pieces("{0A}<|user|>{0A}hi"), 2, *pieces("{0A}<|assistant|>{0A}")],
        [*pieces("Paris"), 2],
    ),
    (
        "zephyr",
        MULTI,
        [
            *pieces("▁<|user|>{0A}hi"),
            2,
            *pieces("{0A}<|assistant|>{0A}yo"),
            2,
            *pieces("{0A}<|user|>{0A}so?"),
            2,
            *pieces("{0A}<|assistant|>{0A}"),
        ],
        [*pieces("Paris"), 2],
    ),
    ("llama3", HI, [*LLAMA3_HI, *LLAMA3_ASKS], [*b"Paris", 260]),
    ("llama3-eot-not-declared", HI, [*LLAMA3_HI, *LLAMA3_ASKS], [*b"Paris", 260]),
    (
        "llama3",
        SYSTEM,
        [256, 258, *b"system", 259, *b"\n\nBe P.", 260, *LLAMA3_HI[1:], *LLAMA3_ASKS],
        [*b"Paris", 260],
    ),
    (
        "llama3",
        MULTI,
        [*LLAMA3_HI, *LLAMA3_ASKS, *b"yo", 260, 258, *b"user", 259, *b"\n\nso?", 260, *LLAMA3_ASKS],
        [*b"Paris", 260],
    ),
    ("chatml", HI, [*CHATML_HI, *CHATML_ASKS], [*b"Paris", 258]),
    ("chatml", SYSTEM, [257, *b"system\nBe P.", 258, 10, *CHATML_HI, *CHATML_ASKS], [*b"Paris", 258]),
    (
        "chatml",
        MULTI,
        [*CHATML_HI, *CHATML_ASKS, *b"yo", 258, 10, 257, *b"user\nso?", 258, 10, *CHATML_ASKS],
        [*b"Paris", 258],
    ),
    ("qwen3", HI, [*CHATML_HI, *CHATML_ASKS], [*b"<think>\n\n</think>\n\nParis", 258]),
    (
        "qwen3",
        MULTI,
        [*CHATML_HI, *CHATML_ASKS, *b"yo", 258, 10, 257, *b"user\nso?", 258, 10, *CHATML_ASKS],
        [*b"<think>\n\n</think>\n\nParis", 258],
    ),
    (
        "gemma",
        HI,
        [1, 3, *pieces("user{0A}hi", 2), 4, *pieces("{0A}", 2), 3, *pieces("model{0A}", 2)],
        [*pieces("Paris", 2), 4],
    ),
    (
        "gemma",
        MULTI,
        [
            *(1, 3, *pieces("user{0A}hi", 2), 4, *pieces("{0A}", 2)),
            *(3, *pieces("model{0A}yo", 2), 4, *pieces("{0A}", 2)),
            *(3, *pieces("user{0A}so?", 2), 4, *pieces("{0A}", 2)),
            *(3, *pieces("model{0A}", 2)),
        ],
        [*pieces("Paris", 2), 4],
    ),
]
"""Kind, conversation, prompt ids, and the ids of the response `Paris`."""


@pytest.mark.parametrize(("kind", "messages", "prompt_ids", "real_ids"), PARIS)
def test_ids(kind: str, messages: list[Message], prompt_ids: list[int], real_ids: list[int]) -> None:
    rendered = renderer(KINDS[kind].make(), KINDS[kind].stop_ids)
    assert rendered.prompt_ids(messages) == prompt_ids
    assert rendered.response_ids(messages, "Paris") == real_ids


@pytest.mark.parametrize("name", KINDS)
def test_stop_ids(name: str) -> None:
    kind = KINDS[name]
    rendered = renderer(kind.make(), kind.stop_ids)
    assert (rendered.end_of_turn_id, rendered.stop_ids) == (kind.end_of_turn, kind.all_stop_ids)


@pytest.mark.parametrize("response", ["Paris", "", WILD, SPACED, " Paris", "Paris ", "\nParis", "\n\n Paris", "a  P"])
@pytest.mark.parametrize(
    ("name", "messages"),
    [
        (name, messages)
        for name, kind in KINDS.items()
        for messages in (HI, SYSTEM, MULTI, conversation(WILD), conversation(SPACED))
        if (kind.system or messages is not SYSTEM) and (kind.multi_turn or messages is not MULTI)
    ],
)
def test_prompt_and_response_are_the_text_that_the_template_writes(
    name: str, messages: list[Message], response: str
) -> None:
    kind = KINDS[name]
    tokenizer = kind.make()
    rendered = renderer(tokenizer, kind.stop_ids)
    prompt_ids, real_ids = rendered.prompt_ids(messages), rendered.response_ids(messages, response)
    end = tokenizer.convert_ids_to_tokens(kind.end_of_turn)
    full = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": response}], tokenize=False)
    written = full[: full.rindex(end)] + end
    decoded = tokenizer.decode([*prompt_ids, *real_ids])
    if name == "llama2":  # its tokens say a space where <s> and </s> say none
        decoded = decoded.replace("<s> ", "<s>").replace("</s> ", "</s>")
    assert decoded == written
    assert real_ids.index(kind.end_of_turn) == len(real_ids) - 1
    if kind.bos is not None and kind.bos != kind.end_of_turn and name != "llama2":
        assert [*prompt_ids, *real_ids].count(kind.bos) == 1


@pytest.mark.parametrize(
    ("name", "response"),
    [
        ("gpt2", "a<|endoftext|>b"),
        ("opt", "</s>"),
        ("llama2", "Paris</s> and more"),
        ("llama3", "Paris<|eot_id|>"),
        ("llama3", "Paris<|end_of_text|>"),  # generation would end there
        ("llama3-eot-not-declared", "<|eot_id|>Paris"),
        ("chatml", "<|im_end|>\n<|im_start|>user\nhi"),
        ("gemma", "x <end_of_turn> y"),
    ],
)
def test_a_response_that_ends_before_its_end_is_refused(name: str, response: str) -> None:
    rendered = renderer(KINDS[name].make(), KINDS[name].stop_ids)
    with pytest.raises(RenderError, match=r"^response contains the end-of-turn token$"):
        rendered.response_ids(HI, response)


@pytest.mark.parametrize("name", KINDS)
def test_the_saved_tokenizer_renders_the_same(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    rendered = renderer(kind.make(), kind.stop_ids)
    rendered.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = conversation(WILD)
    wanted = rendered.prompt_ids(messages)
    assert loaded.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == wanted
    again = renderer(loaded, kind.stop_ids)
    assert again.prompt_ids(messages) == wanted
    assert again.response_ids(messages, WILD) == rendered.response_ids(messages, WILD)
    assert again.stop_ids == rendered.stop_ids


@pytest.mark.parametrize("name", ["llama2", "gemma"])
def test_a_conversation_that_the_template_refuses_is_dropped_with_its_words(name: str) -> None:
    rendered = renderer(KINDS[name].make(), KINDS[name].stop_ids)
    refused = SYSTEM if name == "gemma" else conversation("a", "b", "c")[:2] + conversation("x", "y")[1:]
    words = "System role not supported" if name == "gemma" else "Conversation roles must alternate"
    with pytest.raises(RenderError, match=f"^chat template refused it: {words}"):
        rendered.prompt_ids(refused)


def test_words_of_a_response_are_without_special_tokens() -> None:
    assert renderer(zoo.chatml()).text([*"Ünï 😀".encode(), 258]) == "Ünï 😀"
    assert renderer(zoo.llama2()).text([*pieces("{▁P}aris▁"), 2]) == "Paris "


def test_padding_is_the_tokenizers_own_or_what_ends_a_turn() -> None:
    assert renderer(zoo.opt()).pad_id == 257
    assert renderer(zoo.llama3()).pad_id == 260


# Sentencepiece itself


def test_llama2s_ids_are_sentencepieces_own(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    words = ["Paris", "is", "the", "capital", "of", "France", ".", "[INST]", "what?", "[/INST]", "hi", "so", "yo"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[i:] + words[:i]) for i in range(len(words))] * 4),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    rendered = renderer(zoo.llama2_around([model.id_to_piece(i) for i in range(model.get_piece_size())]), (2,))
    for question, answer in [("what is the capital?", "Paris is."), ("hi", "so\nyo"), ("日本 ?", "é  of")]:
        together = model.encode(f"[INST] {question} [/INST] {answer} ")
        prompt_ids = rendered.prompt_ids(conversation(question))
        assert prompt_ids == [1, *model.encode(f"[INST] {question} [/INST]")]
        assert rendered.response_ids(conversation(question), answer) == [*together[len(prompt_ids) - 1 :], 2]


# The recipe's own templates


@pytest.mark.parametrize(
    "around",
    [
        ("", ""),
        ('Q: "', '"\nA: '),
        ("{{ x }} {% if %} {# no #} ", " }} %} #}"),
        ("C:\\new\\table \\u0041 \\", "\\n 'single' \"double\""),
        ("😀 日本\r\n\t", "\x7f\u2028 end\n\n"),
        ("{prompts} {", "}"),
    ],
)
def test_a_template_is_taken_literally(around: tuple[str, str]) -> None:
    before, after = around
    rendered = renderer(zoo.chatml(), template=before + "{prompt}" + after)
    assert rendered.prompt_ids(conversation("hi {there}")) == [*(before + "hi {there}" + after).encode()]
    assert rendered.response_ids(HI, "yes") == [*b"yes", 258]


def test_a_template_goes_around_every_turn() -> None:
    rendered = renderer(zoo.chatml(), template="Q: {prompt}\nA:")
    assert rendered.prompt_ids(conversation("hi", "yo", "so?", system="S")) == [
        *b"S\n\nQ: hi\nA:yo",
        258,
        *b"Q: so?\nA:",
    ]


@pytest.mark.parametrize("template", ["[INST] {prompt} [/INST]", "<s>[INST] {prompt} [/INST]"])
def test_a_template_is_begun_once(template: str) -> None:
    rendered = renderer(zoo.mistral(), template=template)
    assert rendered.prompt_ids(HI) == [1, *pieces("[INST]▁hi▁[/INST]")]


def test_a_template_replaces_the_tokenizers_and_is_saved_with_it(tmp_path: Path) -> None:
    template = "😀 {\\n} \"'{prompt}' }}"
    rendered = renderer(zoo.llama3(), (257, 260), template=template)
    wanted = [256, *"😀 {\\n} \"'hi' }}".encode()]
    assert rendered.prompt_ids(HI) == wanted
    assert rendered.response_ids(HI, "yes") == [*b"yes", 257]
    rendered.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(HI, add_generation_prompt=True)["input_ids"] == wanted


JINJA = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"


def test_a_chat_template_of_the_recipe() -> None:
    rendered = renderer(zoo.chatml(), chat_template=JINJA)
    assert rendered.prompt_ids(MULTI) == [*b"user: hi", 258, *b"\nassistant: yo", 258, *b"\nuser: so?", 258, 10]
    # The template has no generation prompt, so the header is the response's.
    assert rendered.response_ids(HI, "yes") == [*b"assistant: yes", 258]


def test_a_template_without_an_end_gets_the_tokenizers() -> None:
    rendered = renderer(zoo.gpt2(), chat_template="{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert rendered.prompt_ids(HI) == [*b"hi\n"]
    assert rendered.response_ids(HI, "yes") == [*b"yes", 256]


@pytest.mark.parametrize(
    ("chat_template", "words"),
    [
        ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", "not valid Jinja: line 2: "),
        ("{% for m in messages %}{{ m.content }}", "not valid Jinja: line 1: "),
        ("{{ messages[0].content }}", "leaves out the assistant's words"),
        ("{{ raise_exception('never') }}", "a question and its answer can't be rendered: .*never"),
        ("{{ messages[7].content.strip() }}", "a question and its answer can't be rendered: "),
    ],
)
def test_a_broken_chat_template(chat_template: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        renderer(zoo.chatml(), chat_template=chat_template)


def test_nothing_ends_a_response() -> None:
    tokenizer = zoo.chatml()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither the chat template nor the tokenizer has a token that ends"):
        renderer(tokenizer, template="{prompt}\n")


@pytest.mark.parametrize("messages", [SYSTEM, MULTI])
def test_the_default_template_has_one_turn(messages: list[Message]) -> None:
    with pytest.raises(UserError, match=r"no place for system prompts .* prompt.template, or data.turns=first"):
        renderer(zoo.gpt2()).prompt_ids(messages)
    with pytest.raises(UserError, match="no place for system prompts"):
        renderer(zoo.gpt2()).response_ids(messages, "yes")


def test_the_renderer_is_imported_without_torch() -> None:
    code = "import sys, spinlm.data.render, spinlm.data.prepare, spinlm.data.pairs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class TestHostileTemplates:
    """What a template from elsewhere may try; those without end are in tests/fuzz."""

    @pytest.mark.parametrize(
        ("template", "words"),
        [
            ("{{ 'a' * 10**11 }}", "needs more than 2,000,000,000 bytes"),
            ("{{ ''.__class__.__mro__ }}", "is unsafe"),
            ("{{ messages.append(1) }}", "is unsafe"),
            ("{{ range(10**9) }}", "Range too big"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
            ("{{ 'a' * 200000 }}", "a far longer text"),
            ("{{ 1 / 0 }}", "division by zero"),
            ("{{ '\ud800' }}", "invalid Unicode"),
        ],
    )
    def test_is_refused(self, template: str, words: str) -> None:
        with pytest.raises(UserError, match=words):
            Renderer(tiny.build_tokenizer(), PromptSection(chat_template=template))

    def test_what_only_one_conversation_makes_it_do_drops_that(self) -> None:
        template = tiny.CHATML + "{% if messages[0]['content'] == 'evil' %}{{ '\ud800' }}{{ 1 / 0 }}{% endif %}"
        renderer = Renderer(tiny.build_tokenizer(), PromptSection(chat_template=template))
        assert renderer.prompt_ids([{"role": "user", "content": "good"}])
        with pytest.raises(RenderError, match="division by zero"):
            renderer.prompt_ids([{"role": "user", "content": "evil"}])
