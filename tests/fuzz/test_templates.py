"""Chat templates of anything, escapes and endless ones among them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from fuzz.cases import accepted_or_refused, cases
from spinlm.config import DataSection, PromptSection
from spinlm.data.examples import Example
from spinlm.data.prepare import prepare
from spinlm.data.render import Renderer

EXAMPLES = [
    Example(
        f"x{i}",
        ({"role": "system", "content": "s"}, {"role": "user", "content": f"a {i}"}),
        "b" * i,
    )
    for i in range(1, 5)
]
expressions = st.sampled_from(
    [
        "messages",
        "messages[0]['content']",
        "messages[99].content",
        "message['role']",
        "message.content.upper()",
        "loop.index0 / 0",
        "bos_token",
        "eos_token",
        "add_generation_prompt",
        "undefined",
        "undefined.x",
        "raise_exception('no')",
        "raise_exception(messages)",
        "strftime_now('%Y')",
        "messages | tojson",
        "messages | length",
        "messages | map(attribute='content') | join(',')",
        "'a' * 9999",
        "1 / 0",
        "none + 1",
        "messages + 1",
        "{'a': 1}['b']",
        "range(5) | list",
        "range(10 ** 9)",
        "2 ** 99999 ",
        "''.__class__",
        "messages.append(1)",
        "cycler.__init__.__globals__",
        "namespace(a=1).a",
        "message | safe",
        "'%s' % message",
        "'{0.__class__}'.format(message)",
        "lipsum()",
        "'\\ud800'",
        "'\\x00'",
        "message.content | int('x', 99)",
        "message.content[::-1]",
    ]
)


@st.composite
def statements(draw: st.DrawFn, depth: int = 3) -> str:
    """A part of a template."""
    kind = draw(st.integers(0, 8 if depth else 2))
    if kind == 0:
        return draw(st.text(max_size=5) | st.sampled_from(["<|im_end|>", "{%", "%}", "{{", "}}", "{#", "\n", "\ud800"]))
    if kind <= 2:
        return f"{{{{ {draw(expressions)} }}}}"
    inner = "".join(draw(st.lists(statements(depth - 1), max_size=3)))
    if kind <= 5:
        return f"{{% for message in {draw(st.just('messages') | expressions)} %}}{inner}{{% endfor %}}"
    if kind == 6:
        return f"{{% if {draw(expressions)} %}}{inner}{{% endif %}}"
    if kind == 7:
        return f"{{% set x = {draw(expressions)} %}}{inner}"
    return f"{{% generation %}}{inner}{{% endgeneration %}}"


framed = statements().map(lambda inner: tiny.CHATML.replace("{% endfor %}", inner + "{% endfor %}", 1))
templates = st.lists(statements(), max_size=4).map("".join) | framed | framed | st.text(max_size=40)


def _used(template: str) -> None:
    """As one that comes with a tokenizer."""
    renderer = Renderer(tiny.build_tokenizer(template), PromptSection())
    split = prepare(EXAMPLES, [], renderer, DataSection(source="d", held_out=1), seed=0)
    assert split.train
    renderer.markers()


@cases(0.1)
@given(template=templates.filter(lambda text: "{" in text))
def test_templates(template: str) -> None:
    accepted_or_refused("chat templates", lambda: _used(template))


OUT_OF_THE_SANDBOX = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch PLACE').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('PLACE', 'w') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}{{ messages[0].nothing.x }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
]


@pytest.mark.parametrize("template", OUT_OF_THE_SANDBOX)
def test_out_of_the_sandbox(template: str, tmp_path: Path) -> None:
    assert accepted_or_refused("templates, escapes", lambda: _used(template.replace("PLACE", f"{tmp_path}/x"))) is None
    assert list(tmp_path.iterdir()) == []
    assert EXAMPLES[0].messages[1] == {"role": "user", "content": "a 1"}


ENDLESS = [
    "{{ 'a' * 10**11 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{{ (3 ** (10 ** 8)) % 7 }}",
    "{{ messages | tojson(indent=10 ** 10) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ('a b' * 1000000) | wordwrap(1) }}",
]


@pytest.mark.slow
@pytest.mark.parametrize("template", ENDLESS)
def test_endless(template: str) -> None:
    assert accepted_or_refused("templates, endless", lambda: _used(template)) is None
