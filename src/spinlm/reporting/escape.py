"""Text of models and datasets is untrusted: here it becomes something that a page can hold and that does nothing."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup, escape

_JOINED = (
    "[\u0590-\u1cff\ua800-\uabff\ufb1d-\ufdff\ufe70-\ufefc\U00010a00-\U00011fff"  # Hebrew, Arabic, Indic and so on
    "\u2190-\u2bff\ufe0f\U0001f000-\U0001faff]"  # emoji
)
"""Characters after which a joiner or a non-joiner (U+200D, U+200C) is a part of how they are written."""

_UNSEEN = re.compile(
    f"\r(?!\n)|(?<!{_JOINED})[\u200c\u200d]|"
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # control characters, but for tab and newline
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # unseen, or turn direction
    "\ud800-\udfff"  # lone surrogates, which UTF-8 can't hold
    "\U000e0000-\U000e007f]"  # tags
)


def json_for_script(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it ends the element or begins another.

    Numbers that JSON doesn't know (of a player that has diverged) become null.
    """
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def plain(text: str) -> str:
    """Text in which every character that can't be seen is named, for titles and attributes."""
    return _UNSEEN.sub(lambda found: f"[{_code(found[0])}]", text)


def visible(text: object) -> Markup:
    """Text as HTML in which every character that can't be seen is shown by its code; Markup is left as it is."""
    if isinstance(text, Markup):
        return text
    shown, end = Markup(""), 0
    content = str(text).replace("\r\n", "\n")
    for found in _UNSEEN.finditer(content):
        shown += escape(content[end : found.start()]) + Markup('<span class="unseen" title="{}">{}</span>').format(
            unicodedata.name(found[0], "control character").lower(), _code(found[0])
        )
        end = found.end()
    return shown + escape(content[end:])


def with_code(text: object) -> Markup:
    """The same, with what stands between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(visible(text))))


def _code(character: str) -> str:
    return f"U+{ord(character):04X}"
