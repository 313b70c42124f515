"""
The command line: `pillion-sidecar` and `python -m pillion_sidecar`.

Subcommands: run, client, notify, ping, policy. Each subcommand imports only its own modules, because the kubelet starts an interpreter for each
`notify` and `ping`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pillion.errors import SettingsError, SidecarUnavailable
from pillion.wire import names

if TYPE_CHECKING:
    from pillion.wire.message import Request

USAGE = """usage: pillion-sidecar COMMAND [options]

commands:
  run      run the sidecar of one pod; `pillion-sidecar run --help` lists every setting, each a flag and an environment variable
  client   install the client library for trainers: client --to DIR
  notify   report to the sidecar in PILLION_RUNTIME_DIR that its pod is terminating, and return at once
  ping     check that the sidecar in PILLION_RUNTIME_DIR answers (exit status 0)
  policy   check a policy for a run without a cluster, and print all of it as JSON: policy FILE

`pillion-sidecar --version` prints the release.
"""
EX_USAGE: Final = 2
EX_UNAVAILABLE: Final = 69
EX_CONFIG: Final = 78
ANSWER_TIMEOUT_S: Final = 5.0
"""Timeout for the answer to `ping` and `notify`. The supervisor's loop answers in milliseconds, unless it or its node hangs. Shorter than the
probe's own timeout (30 s), so that the output names the cause."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand. Return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else EX_USAGE
    if given[0] == "--version":
        from importlib import metadata

        print(f"pillion-sidecar {metadata.version('pillion-sidecar')}")
        return 0
    command = {"run": _run, "client": _client, "notify": _notify, "ping": _ping, "policy": _policy}.get(given[0])
    if command is None:
        print(f"pillion-sidecar: unknown command {given[0]!r}\n{USAGE}", file=sys.stderr, end="")
        return EX_USAGE
    return command(given[1:])


def _run(arguments: Sequence[str]) -> int:
    import asyncio
    import logging

    from pillion_sidecar import app, log, settings

    try:
        own_settings = settings.from_arguments(arguments, os.environ)
    except SettingsError as err:
        return _refuse(err)
    log.configure(own_settings.log_level)
    try:
        return asyncio.run(app.run(own_settings))
    except Exception:  # a boundary: the starter of this process gets an exit status, and the log has the error
        logging.getLogger("pillion_sidecar").exception("the sidecar ends by an internal error")
        return app.Exit.INTERNAL


def _client(arguments: Sequence[str]) -> int:
    from pillion_sidecar.client_bundle import install

    parser = argparse.ArgumentParser(prog="pillion-sidecar client", description="Install the client library.")
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="a directory of the trainer's PYTHONPATH")
    folder = parser.parse_args(arguments).to
    try:
        made = install.lay_out(folder)
    except OSError as err:
        print(f"pillion-sidecar: the client cannot be installed in {folder}: {err}", file=sys.stderr)
        return EX_UNAVAILABLE
    print(f"pillion-sidecar: the client is in {made}", file=sys.stderr)
    return 0


def _notify(arguments: Sequence[str]) -> int:
    """Return 0 even if no sidecar listens. A failed preStop hook would only add an event to the pod."""
    from pillion.wire import control

    try:
        _ask(arguments, control.Notify(), "Report to the sidecar that its pod is terminating.")
    except SidecarUnavailable as err:
        print(f"pillion-sidecar: {err}", file=sys.stderr)
    return 0


def _ping(arguments: Sequence[str]) -> int:
    from pillion.wire import control

    try:
        _ask(arguments, control.Ping(), "Exit with status 0 if the sidecar answers.")
    except SidecarUnavailable as err:
        print(f"pillion-sidecar: {err}", file=sys.stderr)
        return EX_UNAVAILABLE
    return 0


def _policy(arguments: Sequence[str]) -> int:
    import json

    from pillion.wire import policy
    from pillion_sidecar import settings

    parser = argparse.ArgumentParser(
        prog="pillion-sidecar policy",
        description="Check a policy for a run without a cluster, and print all of it as JSON.",
    )
    parser.add_argument("file", metavar="FILE", help="a CheckpointPolicy or its spec, YAML or JSON")
    try:
        parsed_policy = settings.read_policy(parser.parse_args(arguments).file)
    except SettingsError as err:
        return _refuse(err)
    print(json.dumps(policy.dump(parsed_policy)))
    return 0


def _refuse(error: SettingsError) -> int:
    for problem in error.problems:
        print(f"pillion-sidecar: {problem}", file=sys.stderr)
    return EX_CONFIG


def _ask(arguments: Sequence[str], request: Request[Any], description: str) -> None:
    from pillion import connection

    parser = argparse.ArgumentParser(prog=f"pillion-sidecar {request.type}", description=description)
    parser.add_argument(
        "--runtime-dir", default=os.environ.get(names.ENV_RUNTIME_DIR, ""), help=f"environment: {names.ENV_RUNTIME_DIR}"
    )
    folder = parser.parse_args(arguments).runtime_dir
    if not folder:
        raise SidecarUnavailable(f"no runtime directory: give --runtime-dir, or set {names.ENV_RUNTIME_DIR}")
    connection.ask(os.path.join(folder, names.CONTROL_SOCKET), request, ANSWER_TIMEOUT_S)


if __name__ == "__main__":
    sys.exit(main())
