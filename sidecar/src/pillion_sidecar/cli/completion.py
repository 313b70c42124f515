"""
`pillion completion`: the script that completes commands and arguments in a shell. Called from: `cli.main`.
"""

from __future__ import annotations

import argparse

import shtab

from pillion_sidecar.cli import output, parser
from pillion_sidecar.cli.exits import Exit


def run(arguments: argparse.Namespace) -> Exit:
    """Print the script of one shell."""
    output.show(shtab.complete(parser.build(), shell=arguments.shell))
    return Exit.WELL
