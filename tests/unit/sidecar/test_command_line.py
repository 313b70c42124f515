"""
The whole of: `pillion-sidecar` as a person or a kubelet uses it: help, version, exit statuses.

Called from: pytest.
Must never: start a sidecar.
"""

import json
import logging
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Final

import pytest

from pillion_sidecar import __main__, app, settings

PAGE: Final = Path(__file__).parents[3] / "docs" / "reference" / "settings.md"


def test_help_says_meaning_unit_and_default_of_each_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag has its text, its default with the unit, and its variable."""
    with pytest.raises(SystemExit):
        settings.from_arguments(["--help"], {})
    shown = " ".join(capsys.readouterr().out.split())
    for each in fields(settings.Settings):
        default = settings.default_text(each)
        told = (
            f"{each.metadata['text']}{f' Default: {default}.' if default else ''} Environment: {each.metadata['env']}"
        )
        assert " ".join(told.split()) in shown
    assert "Default: 120 s." in shown


def test_the_page_of_the_settings_is_what_the_code_says() -> None:
    """docs/reference/settings.md has one row a setting, in the order and the words of settings.py."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `--")]
    assert rows == [
        f"| `--{each.name.replace('_', '-')}` | `{each.metadata['env']}` | {settings.default_text(each)} | {each.metadata['text']} |"
        for each in fields(settings.Settings)
    ]


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` names the program and its release, and needs no settings."""
    assert __main__.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pillion-sidecar {metadata.version('pillion-sidecar')}\n"


def test_an_internal_error_has_the_exit_status_that_the_guide_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody caught ends the process with 70, and its traceback is in the log, not lost in a status of 1."""

    async def fails(_: settings.Settings) -> app.Exit:
        raise ZeroDivisionError("a slip")

    monkeypatch.setattr(app, "run", fails)
    monkeypatch.setattr("pillion_sidecar.log.configure", lambda _: None)
    with caplog.at_level(logging.ERROR, "pillion_sidecar"):
        assert __main__.main(["run", "--runtime-dir", str(tmp_path)]) == 70
    assert caplog.records[-1].exc_info is not None
    assert __main__.main(["run"]) == 78


def test_a_policy_is_checked_and_printed_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A right one is JSON with every default in it; of a wrong one all problems are told, and the status is that of bad settings."""
    file = tmp_path / "policy.yaml"
    file.write_text("store: Own\n")
    assert __main__.main(["policy", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["store"], found["restore"]["mode"]) == ("Own", "Latest")
    file.write_text("store: Mine\ntriger: {}\n")
    assert __main__.main(["policy", str(file)]) == 78
    told = capsys.readouterr()
    assert told.out == ""
    assert all(name in told.err for name in ("store", "triger"))
