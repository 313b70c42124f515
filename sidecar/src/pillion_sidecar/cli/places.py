"""
The places that a person names on the command line: a root, or one checkpoint, in a directory or a bucket.

    checkpoints/run-1                  a root
    s3://bucket/run-1/step-200         a step of a root
    checkpoints/final                  a folder that is a checkpoint by itself, such as one of `pillion.dcp.save`

Called from: every command of `cli`. Reads storage only to find out what a place is.
"""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pillion.errors import SettingsError
from pillion.wire import names, policy
from pillion.wire.object_store import ObjectStore
from pillion_sidecar import settings
from pillion_sidecar.checkpoint import catalog, commit
from pillion_sidecar.cli.exits import not_found, wrong_usage
from pillion_sidecar.storage import opening
from pillion_sidecar.storage.folder import Folder

LATEST: Final = "latest"
"""What a person writes for the step that a load would take."""


@dataclass(frozen=True, slots=True)
class Place:
    """What an argument names."""

    text: str
    """The argument, for messages."""
    root: Folder | None
    """The root; None: the folder is a checkpoint by itself."""
    step: int | None
    """The step that the argument itself names; None: it names no step."""
    alone: Folder | None = None
    """The checkpoint that the argument names by itself."""


def open_place(text: str, options: ObjectStore | None, ca_file: str = "") -> Place:
    """
    Return the place that an argument names.

    Raises:
        Ended: there is no such directory, or nothing under such a prefix.
        SettingsError: this kind of URL is not known, or it does not have an option.
        OSError: the storage does not answer.
    """
    stripped = text.rstrip("/") or text
    above, _, last = stripped.rpartition("/")
    step = names.parse_step_directory(last)
    if step is not None:
        return Place(
            text,
            opening.open_folder(above or (stripped[:1] if stripped.startswith("/") else "."), options, ca_file=ca_file),
            step,
        )
    folder = opening.open_folder(stripped, options, ca_file=ca_file)
    if folder.path is not None and not os.path.isdir(folder.path):
        why = "is a file" if os.path.exists(folder.path) else "does not exist"
        raise not_found(f"{text} {why}: name a directory of checkpoints, or a URL such as s3://bucket/run-1")
    if commit.is_committed(folder):
        return Place(text, None, None, alone=folder)
    if folder.path is None and not folder.folders() and not folder.files():
        raise not_found(f"{text} has no objects: name the URL of a root, such as s3://bucket/run-1")
    return Place(text, folder, None)


def open_new(text: str, options: ObjectStore | None, ca_file: str = "") -> tuple[Folder, int | None]:
    """Return the root that an argument names, which need not exist yet, and the step if it names one. No I/O. Raises: SettingsError."""
    stripped = text.rstrip("/") or text
    above, _, last = stripped.rpartition("/")
    step = names.parse_step_directory(last)
    if step is not None:
        stripped = above or (stripped[:1] if stripped.startswith("/") else ".")
    return opening.open_folder(stripped, options, ca_file=ca_file), step


def root_of(place: Place) -> Folder:
    """Return the root of a place. Raises: Ended: the place is a checkpoint by itself, and has none."""
    if place.root is None:
        raise wrong_usage(
            f"{place.text} is one checkpoint: this command needs a root, a folder with folders such as step-200"
        )
    return place.root


def checkpoint_of(place: Place, wanted: str | None) -> tuple[Folder, int | None]:
    """
    Return the folder of one committed checkpoint, and its step.

    Args:
        wanted: a step's number, or LATEST, or None for LATEST.

    Raises:
        Ended: the root has no such committed step. Names those that it has.
        OSError: the storage does not answer.
    """
    if place.alone is not None:
        if wanted is not None:
            raise wrong_usage(f"{place.text} is one checkpoint: leave the step {wanted!r} out, or name its root")
        return place.alone, None
    root = root_of(place)
    if place.step is not None:
        if wanted is not None:
            raise wrong_usage(f"{place.text} names a step already: leave the step {wanted!r} out")
        step = place.step
    elif wanted is None or wanted == LATEST:
        newest = catalog.newest(root)
        if newest is None:
            raise not_found(f"{root} holds no committed checkpoint")
        step = newest[0]
    else:
        step = step_number(wanted)
    folder = catalog.step_folder(root, step)
    if not commit.is_committed(folder):
        raise not_found(f"{root} holds no committed checkpoint of step {step}; it has {_shown_steps(root)}")
    return folder, step


SHOWN_STEPS: Final = 12
"""Maximum of steps that a message lists, the largest ones."""


def _shown_steps(root: Folder) -> str:
    steps = sorted(step for step, committed in catalog.steps(root).items() if committed)
    more = f"{len(steps) - SHOWN_STEPS} smaller ones, " if len(steps) > SHOWN_STEPS else ""
    return more + ", ".join(map(str, steps[-SHOWN_STEPS:])) if steps else "none"


def step_number(text: str) -> int:
    """Return the step that an argument names, as a number or as a folder's name. Raises: Ended: it is neither."""
    step = names.parse_step_directory(text if text.startswith(names.STEP_PREFIX) else names.STEP_PREFIX + text)
    if step is None:
        raise wrong_usage(f"step {text!r}: a whole number such as 200, or {LATEST} is allowed")
    return step


def storage_options(
    arguments: argparse.Namespace, environ: Mapping[str, str], prefix: str = ""
) -> tuple[ObjectStore | None, str]:
    """
    Return the options of a bucket, and the file with more certificates, from the flags and the environment.

    A flag takes precedence over the policy of --policy or $PILLION_POLICY.

    Args:
        prefix: "to_" for the flags of a command's second place.

    Raises:
        SettingsError: the policy cannot be read, or an option is invalid. The text has the policy's words.
    """
    source = getattr(arguments, f"{prefix}policy") or arguments.policy or environ.get(names.ENV_POLICY) or None
    section: dict[str, Any] = {}
    for flag, field in (
        ("endpoint", "endpoint"),
        ("region", "region"),
        ("parallelism", "parallelism"),
        ("requester_pays", "requesterPays"),
    ):
        value = getattr(arguments, prefix + flag, None)
        value = getattr(arguments, flag, None) if value is None else value
        if value is not None:
            section[field] = value
    given = settings.read_policy(source)
    existing = given.storage.object_store
    base = policy.dump_section(existing) if existing is not None else {}
    if base or section:
        try:
            parsed = policy.parse({"storage": {"objectStore": {**base, **section}}}, embedded=True)
        except policy.PolicyError as err:
            raise SettingsError([str(problem) for problem in err.problems]) from err
        existing = parsed.storage.object_store
    return existing, arguments.ca_file or environ.get(names.ENV_STORAGE_CA, "")


def explain(error: OSError) -> str:
    """Return the text of an error of storage, with the file or URL."""
    reason = error.strerror or (errno.errorcode.get(error.errno or 0, "") and str(error)) or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason
