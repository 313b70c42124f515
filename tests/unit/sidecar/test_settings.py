"""The sidecar's settings: precedence, and every problem at once."""

from dataclasses import fields
from pathlib import Path

import pytest

import pillion
from pillion.wire import policy
from pillion_sidecar import settings


def test_a_flag_wins_over_the_environment_and_that_over_the_default() -> None:
    """Argument > environment > default, for each setting by itself."""
    environ = {"PILLION_RUNTIME_DIR": "/run/a", "PILLION_LINGER_S": "7", "PILLION_PEER_TIMEOUT_S": "8"}
    found = settings.from_arguments(["--linger-s", "3"], environ)
    assert (found.runtime_dir, found.linger_s, found.peer_timeout_s) == ("/run/a", 3.0, 8.0)
    assert found.persist_timeout_s == settings.Settings(runtime_dir="x").persist_timeout_s


def test_all_wrong_settings_are_told_at_once_each_with_what_is_allowed() -> None:
    """One error lists the missing folder, the nonsense numbers and the unknown level, by their names."""
    environ = {"PILLION_LINGER_S": "soon", "PILLION_WRITE_THREADS": "0", "PILLION_LOG_LEVEL": "LOUD"}
    with pytest.raises(pillion.SettingsError) as caught:
        settings.from_arguments([], environ)
    told = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for name in (
        "PILLION_RUNTIME_DIR",
        "PILLION_LINGER_S='soon'",
        "PILLION_WRITE_THREADS='0'",
        "PILLION_LOG_LEVEL='LOUD'",
    ):
        assert name in told


def test_every_setting_is_a_flag_and_an_environment_variable(capsys: pytest.CaptureFixture[str]) -> None:
    """`run --help` lists each field by its flag, with its variable."""
    with pytest.raises(SystemExit):
        settings.from_arguments(["--help"], {})
    shown = capsys.readouterr().out
    for each in fields(settings.Settings):
        assert "--" + each.name.replace("_", "-") in shown
        assert each.metadata["env"] in shown


def test_a_policy_is_read_from_a_document_a_json_text_or_a_yaml_file(tmp_path: Path) -> None:
    """The same policy in three spellings."""
    document = {"trigger": {"periodSteps": 5}, "staging": {"overlap": "Skip"}}
    file = tmp_path / "policy.yaml"
    file.write_text(
        "spec:\n  trigger: {periodSteps: 5}\n  staging: {overlap: Skip}\n".replace("spec:\n", "").replace("  ", "")
    )
    expected = policy.parse(document, embedded=True)
    assert settings.read_policy(document) == expected
    assert settings.read_policy('{"trigger": {"periodSteps": 5}, "staging": {"overlap": "Skip"}}') == expected
    assert settings.read_policy(str(file)) == expected
    assert settings.read_policy(None) == policy.parse({}, embedded=True)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("/nowhere/policy.yaml", "cannot be read"),
        ('{"trigger": ', "neither JSON nor YAML"),
        ({"triger": {}}, "triger"),
    ],
)
def test_a_policy_that_cannot_be_read_is_a_settings_error(source: object, told: str) -> None:
    """The text says what is wrong: the file, the syntax, or the field."""
    with pytest.raises(pillion.SettingsError, match=told):
        settings.read_policy(source)  # type: ignore[arg-type]  # what a user may pass
