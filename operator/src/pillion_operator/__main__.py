"""
`pillion-operator` and `python -m pillion_operator`: the command line. Subcommands: inject, webhook, controller.

The whole of: arguments, files, and exit statuses. Must never: talk to a cluster; the modules that do are imported by the subcommand that needs them,
so that `inject` stays light.
"""

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from enum import IntEnum
from importlib import metadata
from typing import Any, Final

import yaml

from pillion.errors import SettingsError
from pillion_operator import log, offline, settings
from pillion_operator.injection import checkpoint_policy, decide


class Exit(IntEnum):
    """Exit statuses of `inject`. Of several pods, the one that is refused decides, then the one that is injected."""

    INJECTED = 0
    """A pod was injected, or `--remove` was done."""
    USAGE = 2
    """A flag is wrong; the text names it."""
    SKIPPED = 3
    """No pod is to be injected; the text is the reason."""
    DENIED = 4
    """A pod would be refused; the text is the reason."""
    BAD_INPUT = 65
    """A file cannot be read, or is no YAML."""
    BAD_SETTINGS = 78
    """An environment variable is wrong; the text names it."""


_PROCESSES: Final = {
    "webhook": "inject the sidecar into pods that opted in, when the API server creates them",
    "controller": "manage policies, checkpoints and certificates while this replica holds the Lease",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status."""
    parser = argparse.ArgumentParser(prog="pillion-operator", description="The operator of Pillion.")
    parser.add_argument(
        "--version", action="version", version=f"pillion-operator {metadata.version('pillion-operator')}"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "inject",
        help="inject the sidecar into the pods and pod templates of a file, without a cluster",
        description="Does to pods what the webhook does, and prints the documents. The decisions go to the standard error.",
        epilog="exit status: " + ", ".join(f"{each.value} {each.name.lower().replace('_', ' ')}" for each in Exit),
    )
    command.add_argument(
        "-f", "--file", required=True, metavar="FILE", help="pods and workloads, YAML; - is the standard input"
    )
    command.add_argument(
        *("-p", "--policy"),
        action="append",
        default=[],
        metavar="FILE",
        help="CheckpointPolicy objects, or a bare spec; those in --file are used too",
    )
    command.add_argument("--image", help="the sidecar's image; default: PILLION_SIDECAR_IMAGE, or this release's")
    command.add_argument("--diff", action="store_true", help="print what changes instead of the documents")
    command.add_argument("--remove", action="store_true", help="take out again what injection did")
    for name, purpose in _PROCESSES.items():
        commands.add_parser(
            name,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}. Runs until SIGTERM. Settings are variables of the environment; "
            "the log goes to the standard error, one JSON object a line.",
            epilog="exit status: 0 stopped by a signal, 69 no API server or no port, 70 internal, 78 bad settings",
        )
    given = parser.parse_args(arguments)
    return _serve(given.command) if given.command in _PROCESSES else _inject(given)


def _serve(command: str) -> int:
    try:
        loaded = settings.from_env(os.environ, in_cluster=True)
    except SettingsError as err:
        return _fail(Exit.BAD_SETTINGS, err.problems)
    if command == "webhook":
        from pillion_operator.webhook import app as webhook

        log.configure(loaded.log_level)
        return webhook.run(loaded)
    from pillion_operator.controller import app as controller

    log.configure(loaded.log_level, "kopf")
    return controller.run(loaded)


def _inject(given: argparse.Namespace) -> int:
    try:
        loaded = settings.from_env(os.environ)
        documents = _documents(given.file)
        policies = [document for document in documents if offline.is_policy(document)]
        policies += [document for path in given.policy for document in _documents(path)]
    except SettingsError as err:
        return _fail(Exit.BAD_SETTINGS, err.problems)
    except (OSError, ValueError, yaml.YAMLError) as err:
        return _fail(Exit.BAD_INPUT, [str(err)])
    if given.image:
        loaded = dataclasses.replace(loaded, sidecar_image=given.image)
    if given.remove:
        _print(documents, offline.remove(documents), as_diff=given.diff)
        return Exit.INJECTED
    result, outcomes = offline.inject(documents, [checkpoint_policy.from_object(each) for each in policies], loaded)
    for outcome in outcomes:
        verb = type(outcome.decision).__name__.lower()
        text = f"{outcome.where}: {verb}: {outcome.decision.reason}: {decide.message(outcome.decision)}"
        print(f"pillion-operator: {text}", file=sys.stderr)
    if any(isinstance(outcome.decision, decide.Deny) for outcome in outcomes):
        return Exit.DENIED
    for where in offline.made_elsewhere(documents):
        text = "its pods are created by a training runtime and are not in this file: the webhook injects them"
        print(f"pillion-operator: {where}: {text} (or inject its pods, or the JobSet that it makes)", file=sys.stderr)
    if not outcomes:
        print("pillion-operator: the file has no pod and no pod template of a known kind", file=sys.stderr)
    _print(documents, result, as_diff=given.diff)
    return Exit.INJECTED if any(isinstance(outcome.decision, decide.Inject) for outcome in outcomes) else Exit.SKIPPED


def _fail(status: Exit, problems: Sequence[str]) -> int:
    for problem in problems:
        print(f"pillion-operator: {problem}", file=sys.stderr)
    return status


def _documents(path: str) -> list[dict[str, Any]]:
    """
    The documents of a YAML file, a list object taken apart.

    Raises:
        OSError: the file cannot be read.
        ValueError: a document is no object.
        yaml.YAMLError: it is no YAML.
    """
    if path == "-":
        loaded = list(yaml.safe_load_all(sys.stdin))
    else:
        with open(path, encoding="utf-8") as file:
            loaded = list(yaml.safe_load_all(file))
    documents: list[dict[str, Any]] = []
    for document in loaded:
        if document is not None and not isinstance(document, dict):
            raise ValueError(f"{path}: a document is no object but of the type {type(document).__name__}")
        if document:
            documents += document.get("items") or [] if document.get("kind") == "List" else [document]
    return [_unshared(document) for document in documents]


def _unshared(value: Any) -> Any:
    """A copy in which nothing is there twice: two templates that are one by a YAML anchor are two pods to us."""
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    return [_unshared(each) for each in value] if isinstance(value, list) else value


def _print(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], *, as_diff: bool) -> None:
    new = yaml.safe_dump_all(after, sort_keys=False, width=120)
    if not as_diff:
        print(new, end="")
        return
    old = yaml.safe_dump_all(before, sort_keys=False, width=120)
    print("".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "before", "after")), end="")


if __name__ == "__main__":
    sys.exit(main())
