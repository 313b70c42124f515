"""
The entry point of `pillion` and `kubectl-pillion`: parses, runs the command, and turns errors into a line and an exit status.

Called from: the scripts of the distribution; `python -m pillion_sidecar.cli.main`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pillion.errors import LoadError, PillionError, SettingsError, UsageError
from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.cli import (
    comparing,
    completion,
    copying,
    doctor,
    exporting,
    listing,
    output,
    parser,
    pinning,
    places,
    pruning,
    report,
    saving,
    showing,
    verifying,
)
from pillion_sidecar.cli.exits import Ended, Exit

KUBECTL_PLUGIN: Final = "kubectl-pillion"
"""Name under which kubectl finds the program: `kubectl pillion ...` runs it."""

COMMANDS: Final[Mapping[str, Callable[[argparse.Namespace], Exit]]] = {
    "ls": listing.run,
    "show": showing.run,
    "verify": verifying.run,
    "diff": comparing.run,
    "export": exporting.run,
    "cp": copying.run,
    "pin": pinning.pin,
    "unpin": pinning.unpin,
    "prune": pruning.run,
    "report": report.run,
    "save": saving.run,
    "doctor": doctor.run,
    "completion": completion.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Return the exit status."""
    program = "kubectl pillion" if os.path.basename(sys.argv[0]) == KUBECTL_PLUGIN else "pillion"
    own_parser = parser.build(program)
    given = own_parser.parse_args(arguments)
    if given.version:
        from importlib import metadata

        output.show(f"{program} {metadata.version('pillion-sidecar')}\n")
        return Exit.WELL
    if given.command is None:
        own_parser.print_help()
        return Exit.USAGE
    logging.basicConfig(format=f"{program}: %(message)s", level=logging.WARNING)
    try:
        return _run(given)
    except BrokenPipeError:
        # The reader, such as `head`, has enough. Python would complain about its standard output once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.WELL
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _run(given: argparse.Namespace) -> int:
    try:
        return COMMANDS[given.command](given)
    except Ended as err:
        return _refuse(err.status, str(err))
    except SettingsError as err:
        return _refuse(Exit.USAGE, *err.problems)
    except UsageError as err:
        return _refuse(Exit.USAGE, str(err))
    except catalog.Damaged as err:
        return _refuse(Exit.FOUND, str(err))
    except LoadError as err:
        return _refuse(Exit.UNREACHABLE, str(err))
    except PillionError as err:
        return _refuse(Exit.UNREACHABLE, str(err))
    except BrokenPipeError:
        raise
    except OSError as err:
        return _refuse(Exit.UNREACHABLE, places.explain(err))
    except Exception:  # a boundary: a script gets an exit status of its own for an error of ours, and the traceback is on standard error
        logging.getLogger(__name__).exception("an error of pillion itself")
        return Exit.INTERNAL


def _refuse(status: Exit, *problems: str) -> Exit:
    for problem in problems:
        output.say(f"pillion: {problem}")
    return status


if __name__ == "__main__":
    sys.exit(main())
