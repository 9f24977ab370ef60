"""What no message may say."""

from __future__ import annotations

import pytest

from spinlm.errors import UserError, without_secrets


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "some_secret"]
)
def test_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, " s3cr3t/value+1\n")
    assert without_secrets("Illegal header value b'Bearer s3cr3t/value+1'") == "Illegal header value b'Bearer [key]'"


def test_one_that_is_a_part_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "12345678")
    monkeypatch.setenv("B_KEY", "1234567890")
    assert without_secrets("1234567890 and 12345678") == "[key] and [key]"


@pytest.mark.parametrize(
    ("name", "value"), [("HF_TOKEN", "EMPTY"), ("HF_HOME", "/home/somebody"), ("KEYBOARD", "qwertzuiop")]
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
