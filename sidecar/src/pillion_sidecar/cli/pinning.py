"""
`pillion pin` and `pillion unpin`: keep a step from retention, or let it go. Called from: `cli.main`.
"""

from __future__ import annotations

import argparse
import os

from pillion_sidecar.checkpoint import pins
from pillion_sidecar.cli import output, places
from pillion_sidecar.cli.exits import Exit, not_found, wrong_usage


def pin(arguments: argparse.Namespace) -> Exit:
    """Pin a committed step."""
    options, ca_file = places.storage_options(arguments, os.environ)
    place = places.open_place(arguments.root, options, ca_file)
    root = places.root_of(place)
    _, step = places.checkpoint_of(place, arguments.step)
    assert step is not None  # the place has a root
    try:
        made = pins.pin(root, step, reason=arguments.reason)
    except FileNotFoundError as err:
        raise not_found(str(err)) from err
    output.show(f"step {step} of {root} {'is pinned' if made else 'was pinned already'}\n")
    return Exit.WELL


def unpin(arguments: argparse.Namespace) -> Exit:
    """Remove a person's pin of a step. FOUND: there was none."""
    options, ca_file = places.storage_options(arguments, os.environ)
    place = places.open_place(arguments.root, options, ca_file)
    root = places.root_of(place)
    if (place.step is None) == (arguments.step is None):
        raise wrong_usage("name the step once: unpin ROOT STEP, or unpin ROOT/step-N")
    step = place.step if place.step is not None else places.step_number(arguments.step)
    removed = pins.unpin(root, step)
    others = pins.pinned(root).get(step, ())
    kept = f"; it is still pinned by {', '.join(others)}, and only they can remove that" if others else ""
    if not removed:
        raise not_found(f"step {step} of {root} is not pinned with `pillion pin`{kept}")
    output.show(f"step {step} of {root} is not pinned any more{kept}\n")
    return Exit.WELL
