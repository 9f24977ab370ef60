"""Names of contestants as parts of paths."""

from __future__ import annotations

import pytest

from spinlm.contestants import slug


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("iteration-0", "iteration-0"),
        ("org/model--v2.gguf", "org-model-v2.gguf"),
        ("../../etc/passwd", "etc-passwd"),
        ("..", "unnamed"),
        ("gpt 4: «new»", "gpt-4-new"),
        ("模型", "unnamed"),
        ("x" * 300, "x" * 60),
        ("x" * 59 + "/y", "x" * 59),
    ],
)
def test_a_name_stays_within_its_folder(name: str, part: str) -> None:
    """And without a double dash, which stands for a slash in the names of commits."""
    assert slug(name) == part
