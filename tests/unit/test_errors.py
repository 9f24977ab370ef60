"""What no message may say, and what is said of a disk that takes no more."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from spinlm.errors import UserError, disk_trouble, without_secrets, writing


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MYAPIKEY", "somesecret"],
)
def test_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, " s3cr3t/value+1\n")
    assert without_secrets("Illegal header value b'Bearer s3cr3t/value+1'") == "Illegal header value b'Bearer [key]'"
    assert without_secrets("at https://host/?key=s3cr3t%2Fvalue%2B1") == "at https://host/?key=[key]"


def test_one_that_is_a_part_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "12345678")
    monkeypatch.setenv("B_KEY", "1234567890")
    assert without_secrets("1234567890 and 12345678") == "[key] and [key]"


@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_TOKEN", "EMPTY"), ("HF_HOME", "/home/somebody"), ("KEYBOARD", "qwertzuiop"), ("MONKEY", "banana")],
)
def test_what_is_no_secret(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A placeholder may be a word, and a variable of another name holds something else."""
    monkeypatch.setenv(name, value)
    assert without_secrets(f"it says {value}") == f"it says {value}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://me:pw@host/x, since", "at https://[key]@host/x, since"),
        ("at https://token@host", "at https://[key]@host"),
        ("at https://host/a@b, mail me@host", "at https://host/a@b, mail me@host"),
    ],
)
def test_no_password_of_a_url(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_a_message_for_people_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    assert str(UserError("the hub says: hf_0123456789 is expired")) == "the hub says: [key] is expired"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/a"), "run/a: the disk is full. .*: make space, and run"),
        (OSError(errno.EDQUOT, "quota"), "run: the disk is full"),
        (OSError(errno.ENOSPC, "full", "a", None, "run/link"), "run/link: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "run/a"), "run/a: Read-only file system. .*: see to it"),
        (OSError(errno.EIO, "Input/output error"), "run: Input/output error"),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"), "run: the disk is full"),
        (Exception("No space left on device (os error 28)"), "run: the disk is full"),
    ],
)
def test_where_and_what_to_do(error: Exception, words: str) -> None:
    with pytest.raises(UserError, match=f"^{words}"), writing(Path("run")):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError(),
        FileNotFoundError(errno.ENOENT, "x"),
        PermissionError(errno.EPERM, "of a socket"),
        UserError("No space left on device"),
    ],
)
def test_anything_else_is_not_meant(error: Exception) -> None:
    assert disk_trouble(error, "run") is None
    with pytest.raises(type(error)), writing(Path("run")):
        raise error
