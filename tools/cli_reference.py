"""
Makes the sections of docs/reference/cli.md from the parser of `pillion`: ``python tools/cli_reference.py`` writes them, ``--check`` compares them.

The whole of: how a command's parser becomes a section. The sections stand between two markers; people write the text around them.
Called from: people, after a change in the parser; tests/unit/docs/test_cli_page.py, which compares.
Must never: describe an argument in words that `pillion COMMAND --help` does not have.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pillion_sidecar.cli import parser as cli_parser

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "reference" / "cli.md"
BEGIN: Final = "<!-- cli: generated -->"
END: Final = "<!-- cli: end -->"


def sections() -> str:
    """A section for each command: what it does, its usage, and a table of its arguments."""
    return "\n".join(_section(name, each) for name, each in commands().items())


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, in the order of the help."""
    [actions] = [each for each in cli_parser.build()._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(actions.choices)


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    rows = "".join(f"| {_names(each)} | {_escaped(each.help or '')} |\n" for each in _arguments(parser))
    return (
        f"## {name}\n\n{' '.join((parser.description or '').split())}\n\n```\n{_usage(name, parser)}\n```\n\n"
        f"| argument | meaning |\n|---|---|\n{rows}"
    )


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    words = [f"pillion {name}"]
    for each in _arguments(parser):
        if not each.option_strings:
            optional = each.nargs in ("?", "*")
            words.append(f"[{each.metavar}]" if optional else f"{each.metavar}")
    return " ".join([*words, "[options]"])


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    own = [each for each in parser._actions if not isinstance(each, argparse._HelpAction)]
    yield from (each for each in own if not each.option_strings)
    yield from (each for each in own if each.option_strings)


def _names(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar}`"
    value = "" if action.nargs == 0 else " " + _value(action)
    return ", ".join(f"`{name}{value}`" for name in action.option_strings)


def _value(action: argparse.Action) -> str:
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or action.dest.upper())


def _escaped(text: str) -> str:
    return " ".join(text.replace("%%", "%").split()).replace("|", "\\|")


def rendered(page: str) -> str:
    """The page with today's sections between its markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{sections()}\n{END}{after}"


def main() -> int:
    """Write, or check; the exit status is 1 when the page differs from the parser."""
    parser = argparse.ArgumentParser(description="Make the sections of docs/reference/cli.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; report whether the page differs")
    check = parser.parse_args().check
    page = PAGE.read_text()
    text = rendered(page)
    if text == page:
        return 0
    print(f"{PAGE.relative_to(ROOT)} {'differs from the parser' if check else 'written'}")
    if not check:
        PAGE.write_text(text)
    return int(check)


if __name__ == "__main__":
    sys.exit(main())
