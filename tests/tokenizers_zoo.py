"""Small tokenizers that behave like the well-known ones, with ids that can be worked out by hand.

Byte-level tokenizers: a byte's id is its value, special tokens come after them. SentencePiece ones: 0 to 2
are `<unk>`, `<s>`, `</s>`, then come the bytes, then the pieces; `pieces` writes them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import tiny

# Chat templates, as published (ChatML without the default system prompt; Qwen3's without tools).

CHATML = tiny.CHATML

QWEN3 = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

ZEPHYR = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


def gpt2() -> PreTrainedTokenizerFast:
    """GPT-2 and GPT-Neo: the word pattern, nothing added, no template. 256 <|endoftext|>, 257 'ĠP', 258 'is'."""
    return _byte_level(
        ["<|endoftext|>"], merges=[("Ġ", "P"), ("i", "s")], bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def opt() -> PreTrainedTokenizerFast:
    """OPT: GPT-2's, but </s> (256) is put first. No template."""
    return _byte_level(["</s>", "<pad>"], first="</s>", bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def chatml(template: str = CHATML) -> PreTrainedTokenizerFast:
    """Qwen: 256 <|endoftext|> pads, 257 <|im_start|>, 258 <|im_end|> ends; nothing is added."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _byte_level(specials, template=template, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def llama3() -> PreTrainedTokenizerFast:
    """Llama 3: 256 <|begin_of_text|>, 257 <|end_of_text|>, 258/259 header, 260 <|eot_id|>."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return _byte_level(
        specials, first=specials[0], template=LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


def llama2(template: str | None = LLAMA2) -> PreTrainedTokenizerFast:
    """Llama 2: `<s>` is put first, and ▁ before the text after each special token (`legacy` behaviour)."""
    return _sentencepiece(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        strip=1,
        first="<s>",
        template=template,
        bos_token="<s>",
        eos_token="</s>",
    )


def mistral(template: str | None = ZEPHYR) -> PreTrainedTokenizerFast:
    """Mistral and Zephyr: `<s>` is put first, and ▁ before a text's very first word only."""
    return _sentencepiece(
        pre_tokenizer=pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False),
        strip=1,
        first="<s>",
        template=template,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )


def gemma() -> PreTrainedTokenizerFast:
    """Gemma: <bos> is put first, and no ▁; turns are special tokens."""
    return _sentencepiece(
        normalizer=normalizers.Replace(" ", "▁"),
        strip=0,
        specials=["<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        first="<bos>",
        template=GEMMA,
        bos_token="<bos>",
        eos_token="<eos>",
    )


def llama2_around(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Llama 2's tokenizer around the pieces of a trained SentencePiece model, the likeliest merges first."""
    vocabulary = {text: place for place, text in enumerate(texts)}
    merges = [
        (text[:cut], text[cut:])
        for text in texts
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _finished(tokenizer, ["<unk>", "<s>", "</s>"], "<s>", LLAMA2, names)


SPACE = 259
"""The id of ▁, where SentencePiece pieces begin; then ▁▁ and ▁P, then the printable ASCII characters."""

_PIECES = ["▁", "▁▁", "▁P", *(chr(code) for code in range(33, 127))]


def pieces(text: str, offset: int = 0) -> list[int]:
    """Ids of pieces written out: each character is one, but for those in braces: `{▁P}aris`, `{0A}` (a byte)."""
    ids: list[int] = []
    while text:
        end = text.index("}") if text[0] == "{" else 0
        piece = text[1:end] if end else text[0]
        is_byte = end and piece not in _PIECES
        ids.append(offset + (3 + int(piece, 16) if is_byte else SPACE + _PIECES.index(piece)))
        text = text[end + 1 :]
    return ids


def _byte_level(
    specials: Sequence[str],
    merges: Sequence[tuple[str, str]] = (),
    first: str | None = None,
    template: str | None = None,
    **names: str,
) -> PreTrainedTokenizerFast:
    alphabet = tiny._byte_alphabet()
    vocabulary = {alphabet[byte]: byte for byte in range(256)} | {text: 256 + i for i, text in enumerate(specials)}
    vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, specials, first, template, names)


def _sentencepiece(
    strip: int,
    first: str,
    template: str | None,
    normalizer: Any = None,
    pre_tokenizer: Any = None,
    specials: Sequence[str] = ("<unk>", "<s>", "</s>"),
    **names: str,
) -> PreTrainedTokenizerFast:
    texts = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *_PIECES]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: place for place, text in enumerate(texts)},
            merges=[("▁", "▁"), ("▁", "P")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", strip, 0)] if strip else []),
        ]
    )
    return _finished(tokenizer, specials, first, template, {"unk_token": "<unk>", **names})


def _finished(
    tokenizer: Tokenizer, specials: Sequence[str], first: str | None, template: str | None, names: dict[str, str]
) -> PreTrainedTokenizerFast:
    """Declare the special tokens; `first` is put before every text."""
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    if first is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, tokenizer.token_to_id(first))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    return fast
