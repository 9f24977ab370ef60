"""The one prompt renderer: SFT, generation, training, evaluation and export all see its tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from spinlm.config import PromptSection
from spinlm.data.examples import Message
from spinlm.data.limits import limited
from spinlm.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "
"""The paper's prompt, for tokenizers that have no chat template (section 6, and its repository)."""

LONGEST_RENDERING = 5
"""Seconds that a chat template may take for one conversation; a usual one takes a few microseconds a message."""

MOST_MEMORY = 2_000_000_000
"""Bytes that it may take."""

MOST_AROUND_A_MESSAGE = 1000
MOST_AROUND_ALL = 100_000
"""Characters that it may add, so that what is tokenised is in proportion to what is said."""

_PROBE = "spinlm"


class RenderError(ValueError):
    """This conversation can't be rendered; the message is the reason, for the list of dropped rows."""


class Renderer:
    """Turns conversations into token ids by the tokenizer's chat template.

    A tokenizer without one is given the recipe's template, or the paper's, as its chat template, so that
    the exported tokenizer renders what the model was trained on.

    Attributes:
        tokenizer: With `chat_template` set.
        end_of_turn_id: The token that ends every real response, exactly once.
        stop_ids: The tokens that end a generated response.

    Raises:
        UserError: The template is broken, or nothing in it or the tokenizer ends a response.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: PromptSection,
        model_stop_ids: Collection[int] = (),
    ) -> None:
        self.tokenizer: Any = tokenizer
        self._single_turn_only = False
        self._set_chat_template(prompt)
        self._tail = self._text_after_response()
        self._template_ends_turns, self.end_of_turn_id = self._end_of_turn(model_stop_ids)
        eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        self.stop_ids = frozenset([self.end_of_turn_id, *eos, *model_stop_ids])

    @property
    def pad_id(self) -> int:
        """Fills batches; always masked, so any token does."""
        pad = self.tokenizer.pad_token_id
        return int(self.end_of_turn_id if pad is None else pad)

    @property
    def bos_id(self) -> int | None:
        """The token that begins every sequence, for tokenizers that have one."""
        bos = self.tokenizer.bos_token_id
        return None if bos is None else int(bos)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the vocabulary's longest token: a text has at least its length over this many tokens."""
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's tokens, up to where the response begins.

        Raises:
            RenderError: The chat template refuses the conversation.
            UserError: It has turns that the default template has no place for.
        """
        return self._tokenize(self._prompt_text(messages))

    def response_ids(self, messages: Sequence[Message], response: str) -> list[int]:
        """The real response's tokens, its end-of-turn token included.

        Raises:
            RenderError: The chat template refuses the conversation, or the response holds a token that ends it.
        """
        prompt_text = self._prompt_text(messages)
        text = self._response_text(messages, response, prompt_text)
        if not self.stop_ids.isdisjoint(self._tokenize(text)):
            raise RenderError("response contains the end-of-turn token")
        if not self._template_ends_turns:
            return [*self._tokenize_after(prompt_text, text), self.end_of_turn_id]
        ids = self._tokenize_after(prompt_text, text + self._tail)
        return ids[: ids.index(self.end_of_turn_id) + 1]

    def text(self, ids: Sequence[int]) -> str:
        """The words of a response, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def text_with_specials(self, ids: Sequence[int]) -> str:
        """A response with its special tokens, but for the one that ended it."""
        words = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        return str(self.tokenizer.decode(list(words), skip_special_tokens=False))

    def markers(self) -> list[str]:
        """The lines that the template puts around a user's turn, which a response shouldn't have."""
        try:
            text = self._prompt_text([{"role": "user", "content": _PROBE}])
        except RenderError:
            return []
        around = text.replace(self.tokenizer.bos_token or "\n", "\n").split(_PROBE)
        lines = (line.strip() for part in around for line in part.splitlines())
        return list(dict.fromkeys(line for line in lines if len(line) > 2))

    def _set_chat_template(self, prompt: PromptSection) -> None:
        if prompt.chat_template is not None:
            self.tokenizer.chat_template = prompt.chat_template
        elif prompt.template is not None:
            self.tokenizer.chat_template = self._as_chat_template(prompt.template)
        elif self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = self._as_chat_template(PAPER_TEMPLATE)
            self._single_turn_only = True

    def _as_chat_template(self, template: str) -> str:
        """A template around one user turn, in Jinja; the system prompt goes first, turns follow one another."""
        starts_with_bos = self._tokenize_with_specials("x")[:1] == [self.tokenizer.bos_token_id]
        if starts_with_bos:
            template = template.removeprefix(self.tokenizer.bos_token)
        before, after = (json.dumps(part, ensure_ascii=False) for part in template.split("{prompt}"))
        return (
            ("{{ bos_token }}" if starts_with_bos else "")
            + "{% for message in messages %}"
            + "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
            + "{% elif message['role'] == 'user' %}"
            + f"{{{{ {before} + message['content'] + {after} }}}}"
            + "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}"
            + "{% endfor %}"
        )

    def _prompt_text(self, messages: Sequence[Message]) -> str:
        if self._single_turn_only and [message["role"] for message in messages] != ["user"]:
            raise UserError(
                "the tokenizer has no chat template, and the default one has no place for system prompts or "
                "earlier turns: give prompt.chat_template (Jinja), prompt.template, or data.turns=first"
            )
        return self._render(messages, add_generation_prompt=True)

    def _response_text(self, messages: Sequence[Message], response: str, prompt_text: str) -> str:
        """The response as the template writes it: some trim it, some put a header before it."""
        full = self._render([*messages, {"role": "assistant", "content": response}])
        if not full.startswith(prompt_text) or not full.endswith(self._tail):
            return response
        return full[len(prompt_text) : len(full) - len(self._tail)]

    def _text_after_response(self) -> str:
        try:
            full = self._render([{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}])
        except RenderError as error:
            raise UserError(f"a question and its answer can't be rendered: {error}") from None
        if _PROBE not in full:
            raise UserError("the chat template leaves out the assistant's words: give another prompt.chat_template")
        return full[full.rindex(_PROBE) + len(_PROBE) :]

    def _end_of_turn(self, model_stop_ids: Collection[int]) -> tuple[bool, int]:
        """Whether the template itself ends a response with a special token, and that token, or else the tokenizer's."""
        added = {token_id for token_id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special = added.union(self.tokenizer.all_special_ids, model_stop_ids)
        for token_id in self._tokenize(self._tail):
            if token_id in special:
                return True, token_id
        if self.tokenizer.eos_token_id is None:
            raise UserError("neither the chat template nor the tokenizer has a token that ends a response")
        return False, int(self.tokenizer.eos_token_id)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        import jinja2

        try:
            with limited(LONGEST_RENDERING, MOST_MEMORY):
                text = str(
                    self.tokenizer.apply_chat_template(
                        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
                    )
                )
        except (TimeoutError, MemoryError) as error:
            limit = f"{LONGEST_RENDERING} seconds" if isinstance(error, TimeoutError) else f"{MOST_MEMORY:,} bytes"
            raise UserError(
                f"the chat template needs more than {limit} for a conversation of {len(messages)} messages: give "
                "another prompt.chat_template"
            ) from None
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None
        except Exception as error:  # whatever its expressions come to
            raise RenderError(f"chat template refused it: {first_line(error)}") from None
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RenderError("chat template makes invalid Unicode of it") from None
        words = sum(len(message["content"]) for message in messages)
        if len(text) > 4 * words + MOST_AROUND_A_MESSAGE * len(messages) + MOST_AROUND_ALL:
            raise RenderError("chat template makes a far longer text of it")
        return text

    def _tokenize(self, text: str) -> list[int]:
        """Tokens of rendered text: its special tokens are written in it, none is added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokenize_after(self, context: str, text: str) -> list[int]:
        """Tokens of text that stands after a context, whose own tokens stay what they are without it.

        Where the tokenizer would merge the two, the text is tokenised at the start of a line: on its own, some
        tokenizers would put a space before it.
        """
        for before in (context, "\n"):
            before_ids, together = self._tokenize(before), self._tokenize(before + text)
            if together[: len(before_ids)] == before_ids:
                return together[len(before_ids) :]
        return self._tokenize(text)

    def _tokenize_with_specials(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])
