"""
The whole of: what `pillion` makes of its arguments: help, version, wrong usage, options of a bucket, and the name of a place.

Called from: pytest.
"""

import argparse
from importlib import metadata
from pathlib import Path

import pytest

from pillion.errors import SettingsError
from pillion_sidecar.cli import main, parser, places
from pillion_sidecar.cli.exits import Ended, Exit


def test_every_command_of_the_parser_is_run_by_something() -> None:
    """A command without code, or code without a command, is a slip."""
    [commands] = [each for each in parser.build()._actions if isinstance(each, argparse._SubParsersAction)]
    assert list(commands.choices) == list(main.COMMANDS)


def test_without_a_command_it_says_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    """The status is that of wrong usage."""
    assert main.main([]) == Exit.USAGE
    assert "list the steps of a root" in capsys.readouterr().out


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the sidecar, whose part it is."""
    assert main.main(["--version"]) == Exit.WELL
    assert capsys.readouterr().out == f"pillion {metadata.version('pillion-sidecar')}\n"


def test_as_a_plugin_it_has_kubectls_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """kubectl looks for a program named kubectl-pillion."""
    monkeypatch.setattr("sys.argv", ["/usr/bin/kubectl-pillion"])
    with pytest.raises(SystemExit):
        main.main(["ls", "--help"])
    assert capsys.readouterr().out.startswith("usage: kubectl pillion ls")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ls", "{root}/none"], "{root}/none does not exist: name a directory of checkpoints"),
        (["ls", "{root}/file"], "{root}/file is a file: name a directory of checkpoints"),
        (["ls", "{root}"], "{root} holds no checkpoints, and no folders such as step-200"),
        (["show", "{root}"], "{root} holds no committed checkpoint"),
        (["show", "{root}", "7"], "{root} holds no committed checkpoint of step 7; it has none"),
        (["verify", "{root}", "--all"], "{root} holds no committed checkpoint"),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    """Status 1, one line on standard error, nothing on standard output."""
    (tmp_path / "file").write_text("")
    assert main.main([each.format(root=tmp_path) for each in arguments]) == Exit.FOUND
    said = capsys.readouterr()
    assert said.err.startswith("pillion: " + told.format(root=tmp_path))
    assert said.out == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ls", "ftp://host/path"], "s3://"),
        (["ls", "s3://bucket/run", "--parallelism", "0"], "storage.objectStore.parallelism"),
        (["ls", "s3://bucket/run", "--endpoint", "store.example"], "storage.objectStore.endpoint"),
        (["ls", "az://bucket/run", "--region", "eu-central-1"], "region needs s3://"),
        (["ls", "{root}", "--policy", "{root}/none.yaml"], "the policy file {root}/none.yaml cannot be read"),
        (["show", "{root}", "seven"], "step 'seven': a whole number such as 200, or latest is allowed"),
        (["show", "{root}/step-7", "8"], "{root}/step-7 names a step already: leave the step '8' out"),
        (["verify", "{root}", "7", "--all"], "--all verifies every step: leave the step out"),
        (["ls"], "no root: name a directory or a URL, or set PILLION_ROOT"),
    ],
)
def test_wrong_usage_names_the_argument_and_what_is_allowed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    told: str,
) -> None:
    """Status 2, before any request is made."""
    for name in ("PILLION_ROOT", "PILLION_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert main.main([each.format(root=tmp_path) for each in arguments]) == Exit.USAGE
    assert told.format(root=tmp_path) in capsys.readouterr().err


def options(*arguments: str, environ: dict[str, str] | None = None) -> tuple[object, str]:
    given = parser.build().parse_args(["ls", "s3://bucket/run", *arguments])
    found, ca_file = places.storage_options(given, environ or {})
    return found and (found.endpoint, found.region, found.parallelism), ca_file


def test_flags_take_precedence_over_the_policy_and_the_environment(tmp_path: Path) -> None:
    """A flag lays over the policy's section; --policy takes the place of PILLION_POLICY."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("storage: {objectStore: {endpoint: 'http://a:1', region: eu-central-1}}")
    environ = {"PILLION_POLICY": '{"storage": {"objectStore": {"region": "us-west-2"}}}', "PILLION_STORAGE_CA": "/ca"}
    assert options() == (None, "")
    assert options(environ=environ) == ((None, "us-west-2", 4), "/ca")
    assert options("--policy", str(policy), environ=environ) == (("http://a:1", "eu-central-1", 4), "/ca")
    given = ("--policy", str(policy), "--endpoint", "http://b:2", "--parallelism", "9", "--ca-file", "/mine")
    assert options(*given, environ=environ) == (("http://b:2", "eu-central-1", 9), "/mine")


@pytest.mark.parametrize(
    ("text", "root", "step"),
    [
        ("{root}", "{root}", None),
        ("{root}/", "{root}", None),
        ("{root}/step-7", "{root}", 7),
        ("{root}/step-7/", "{root}", 7),
        ("step-7", ".", 7),
        ("/step-7", "/", 7),
    ],
)
def test_a_place_may_end_with_a_step(tmp_path: Path, text: str, root: str, step: int | None) -> None:
    """Whether the step is there is the command's question."""
    place = places.open_place(text.format(root=tmp_path), None)
    assert (str(place.root), place.step) == (root.format(root=tmp_path), step)


def test_a_bucket_without_a_prefix_is_a_root() -> None:
    """No request is made for the name of a step."""
    place = places.open_place("s3://bucket/step-7", None)
    assert (str(place.root), place.step) == ("s3://bucket", 7)


def test_a_checkpoint_by_itself_has_no_root(tmp_path: Path) -> None:
    """What needs a root says so."""
    (tmp_path / ".metadata").write_bytes(b"x" * 100)
    place = places.open_place(str(tmp_path), None)
    with pytest.raises(Ended, match="this command needs a root"):
        places.root_of(place)
    with pytest.raises(SettingsError):
        places.open_place("gopher://x", None)
