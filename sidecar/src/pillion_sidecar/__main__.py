"""
`pillion-sidecar` and `python -m pillion_sidecar`: the command line. Subcommands: run.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from pillion.errors import SettingsError
from pillion_sidecar import app, log, settings

USAGE = """usage: pillion-sidecar run [options]

commands:
  run    run the sidecar of one pod; `pillion-sidecar run --help` lists every setting, each a flag and an environment variable
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0] != "run":
        print(f"pillion-sidecar: unknown command {given[0]!r}\n{USAGE}", file=sys.stderr, end="")
        return 2
    try:
        found = settings.from_arguments(given[1:], os.environ)
    except SettingsError as err:
        for problem in err.problems:
            print(f"pillion-sidecar: {problem}", file=sys.stderr)
        return app.Exit.BAD_SETTINGS
    log.configure(found.log_level)
    return asyncio.run(app.run(found))


if __name__ == "__main__":
    sys.exit(main())
