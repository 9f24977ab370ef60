"""Untrusted text: whatever it is, it becomes a page's text, and every character in it can be seen."""

import json

import pytest
from markupsafe import Markup

from spinlm.reporting.escape import json_for_script, plain, visible, with_code

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>",
    "a & b",
    "line\u2028separator\u2029",
    "\x00\x1b[31m\x9b",
    "lone \ud83d surrogate, and \udc80",
    "\u202egnp.exe",
    '"quotes" and \\ backslash',
]


@pytest.mark.parametrize("text", HOSTILE)
def test_json_in_a_script_element(text: str) -> None:
    written = json_for_script({"text": [text]})
    assert json.loads(written) == {"text": [text]}
    assert not set("<>&\u2028\u2029") & set(written)
    written.encode("utf-8")


def test_numbers_that_json_does_not_know_are_null() -> None:
    value = {"a": [float("nan"), 1.5], "b": (float("inf"), {"c": -float("inf")})}
    assert json.loads(json_for_script(value)) == {"a": [None, 1.5], "b": [None, {"c": None}]}


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("<b>&\"'", "&lt;b&gt;&amp;&#34;&#39;"),
        ("a\x00b", 'a<span class="unseen" title="control character">U+0000</span>b'),
        ("\u202e", '<span class="unseen" title="right-to-left override">U+202E</span>'),
        ("\u200b<", '<span class="unseen" title="zero width space">U+200B</span>&lt;'),
        ("\ud800", '<span class="unseen" title="control character">U+D800</span>'),
        ("\U000e0041", '<span class="unseen" title="tag latin capital letter a">U+E0041</span>'),
        ("می\u200cخواهم", "می\u200cخواهم"),  # Persian: a non-joiner within a word
        ("क्\u200dष", "क्\u200dष"),  # Devanagari: a joiner after a virama
        ("👩\u200d🚀 ❤\ufe0f\u200d🔥", "👩\u200d🚀 ❤\ufe0f\u200d🔥"),
        ("a\u200db", 'a<span class="unseen" title="zero width joiner">U+200D</span>b'),
        ("ب\u200c\u200c", 'ب\u200c<span class="unseen" title="zero width non-joiner">U+200C</span>'),
        ("of\r\nWindows", "of\nWindows"),
        ("over\rwritten", 'over<span class="unseen" title="control character">U+000D</span>written'),
        (3, "3"),
    ],
)
def test_visible(text: object, html: str) -> None:
    assert visible(text) == html


def test_visible_leaves_markup_of_our_own() -> None:
    assert visible(Markup("<b>\u200b")) == "<b>\u200b"


def test_what_stands_between_backticks_is_code() -> None:
    assert with_code("lower `beta<1>` or `x`, not a ` alone") == (
        "lower <code>beta&lt;1&gt;</code> or <code>x</code>, not a ` alone"
    )
    assert with_code("`\u202e`") == '<code><span class="unseen" title="right-to-left override">U+202E</span></code>'


def test_plain_names_them_in_brackets() -> None:
    assert plain("run\u202e\x07\ud800<b>") == "run[U+202E][U+0007][U+D800]<b>"
    assert plain("ordinary: é, 漢字, 🙂, عربي") == "ordinary: é, 漢字, 🙂, عربي"
