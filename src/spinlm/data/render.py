"""The one prompt renderer: SFT, generation, training, evaluation and export all see its tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinlm.config import PromptSection
from spinlm.data.examples import Message
from spinlm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "
"""The paper's prompt, for tokenizers that have no chat template (section 6, and its repository)."""

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
        self._tail_ids = self._up_to_end_of_turn(self._tokenize(self._tail), model_stop_ids)
        self.end_of_turn_id = self._tail_ids[-1]
        eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        self.stop_ids = frozenset([self.end_of_turn_id, *eos, *model_stop_ids])

    @property
    def pad_id(self) -> int:
        """Fills batches; always masked, so any token does."""
        pad = self.tokenizer.pad_token_id
        return int(self.end_of_turn_id if pad is None else pad)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's tokens, up to where the response begins.

        Raises:
            RenderError: The chat template refuses the conversation.
            UserError: It has turns that the default template has no place for.
        """
        return self._tokenize(self._prompt_text(messages))

    def response_ids(self, messages: Sequence[Message], response: str) -> list[int]:
        """The real response's tokens, its end-of-turn token included.

        Tokenised in its context, unless the tokenizer would merge it with the prompt's end: the prompt's
        tokens have to be those that generation sees.

        Raises:
            RenderError: The chat template refuses the conversation, or the response holds the end-of-turn token.
        """
        prompt_text = self._prompt_text(messages)
        prompt_ids = self._tokenize(prompt_text)
        text = self._response_text(messages, response, prompt_text)
        together = self._tokenize(prompt_text + text)
        in_context = together[: len(prompt_ids)] == prompt_ids
        ids = together[len(prompt_ids) :] if in_context else self._tokenize(text)
        if self.end_of_turn_id in ids:
            raise RenderError("response contains the end-of-turn token")
        return ids + self._tail_ids

    def text(self, ids: Sequence[int]) -> str:
        """The words of a response, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _set_chat_template(self, prompt: PromptSection) -> None:
        if prompt.chat_template is not None:
            self.tokenizer.chat_template = _template_text(prompt.chat_template)
        elif prompt.template is not None:
            self.tokenizer.chat_template = self._as_chat_template(prompt.template)
        elif self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = self._as_chat_template(PAPER_TEMPLATE)
            self._single_turn_only = True

    def _as_chat_template(self, template: str) -> str:
        """A template around one user turn, in Jinja; the system prompt goes first, turns follow one another."""
        before, after = (json.dumps(part, ensure_ascii=False) for part in template.split("{prompt}"))
        starts_with_bos = self._tokenize_with_specials("x")[:1] == [self.tokenizer.bos_token_id]
        return (
            ("{{ bos_token }}" if starts_with_bos else "")
            + "{% for message in messages %}"
            + "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
            + "{% elif message['role'] == 'user' %}"
            + f"{{{{ {before} + message['content'] + {after} }}}}"
            + "{% else %}{{ message['content'] + eos_token }}{% endif %}"
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

    def _up_to_end_of_turn(self, tail_ids: list[int], model_stop_ids: Collection[int]) -> list[int]:
        special = set(self.tokenizer.all_special_ids) | set(model_stop_ids)
        for place, token in enumerate(tail_ids):
            if token in special:
                return tail_ids[: place + 1]
        if self.tokenizer.eos_token_id is None:
            raise UserError("neither the chat template nor the tokenizer has a token that ends a response")
        return [int(self.tokenizer.eos_token_id)]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RenderError(f"chat template refused it: {error}") from None
        return str(text)

    def _tokenize(self, text: str) -> list[int]:
        """Tokens of rendered text: its special tokens are written in it, none is added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokenize_with_specials(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])


def _template_text(template: str) -> str:
    """The Jinja text itself, read from a file where the recipe names one."""
    if "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"prompt.chat_template: {template}: {error.strerror}") from None
