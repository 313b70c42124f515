"""
The whole of: docs/reference/cli.md has the commands, arguments and exit statuses of `pillion`.

Called from: pytest.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any, Final

from pillion_sidecar.cli.exits import Exit


def _tool() -> Any:
    """The program, which is in no package."""
    path = Path(__file__).parents[3] / "tools" / "cli_reference.py"
    spec = importlib.util.spec_from_file_location("cli_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cli_reference: Final = _tool()
PAGE: Final[str] = cli_reference.PAGE.read_text()


def test_the_sections_are_those_of_the_parser() -> None:
    """After a change in the parser: `python tools/cli_reference.py`."""
    assert cli_reference.rendered(PAGE) == PAGE


def test_the_exit_statuses_are_those_of_the_code() -> None:
    """All of them, in order."""
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", PAGE, flags=re.MULTILINE)] == sorted(map(int, Exit))


def test_every_argument_has_a_meaning() -> None:
    """An argument without help is none that a person can use."""
    silent = [
        (name, each.dest)
        for name, parser in cli_reference.commands().items()
        for each in parser._actions
        if not each.help
    ]
    assert silent == []
