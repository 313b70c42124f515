"""
`pillion report`: one page about a run, from what it left under its root. Called from: `cli.main`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import time
from typing import Any, Final

from pillion.wire import names
from pillion_sidecar.cli import facts, listing, output, page, places
from pillion_sidecar.cli.exits import Exit, not_found, wrong_usage
from pillion_sidecar.run import account
from pillion_sidecar.run.account import Account

STANDARD_OUTPUT: Final = "-"
ENDINGS: Final = (".html", ".json")


def run(arguments: argparse.Namespace) -> Exit:
    """Write the page of a run, or its numbers. FOUND: nothing of a run is there."""
    text = arguments.root or os.environ.get(names.ENV_ROOT, "")
    if not text:
        raise wrong_usage(f"no run: name a directory or a URL, or set {names.ENV_ROOT}")
    out: str = arguments.output
    if out != STANDARD_OUTPUT and not out.endswith(ENDINGS):
        raise wrong_usage(
            f"-o {out}: the name of a file that ends with {' or '.join(ENDINGS)} is allowed, or {STANDARD_OUTPUT}"
        )
    options, ca_file = places.storage_options(arguments, os.environ)
    root = places.root_of(places.open_place(text, options, ca_file))
    found = facts.gather(root, time.time_ns())
    if not found.journal.attempts and not found.steps:
        raise not_found(f"{text} holds no checkpoints, and no journal of a run")
    counted = account.of(found.journal)
    if out.endswith(".json"):
        written = json.dumps(document(found, counted), indent=2) + "\n"
    else:
        written = page.render(found, counted)
    if out == STANDARD_OUTPUT:
        output.show(written)
    else:
        _write(out, written)
        output.say(f"wrote {out}")
    return Exit.WELL


def _write(path: str, text: str) -> None:
    """Write a file whole, or leave what is there. Raises: OSError."""
    beside = f"{path}.{secrets.token_hex(4)}"
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, path)
    except OSError:
        if os.path.exists(beside):
            os.unlink(beside)
        raise


def document(found: facts.Facts, counted: Account) -> dict[str, Any]:
    """Return the numbers of the page as JSON has them: times in RFC 3339, durations in seconds, sizes in bytes. Pure."""
    kinds = {f"{kind}Seconds": round(getattr(counted, f"{kind}_s"), 3) for kind in (*page.KINDS, "wall")}
    return {
        "root": found.root,
        "time": output.timestamp(found.now_ns),
        "state": found.state,
        "goodput": round(counted.goodput, 4) if counted.attempts else None,
        **kinds,
        "attempts": counted.attempts,
        "restarts": [
            {
                "attempt": each.number,
                "began": output.timestamp(each.began_ns),
                "step": each.step,
                "tier": each.tier or None,
                "downSeconds": round(each.down_s, 3),
                "restoringSeconds": round(each.restoring_s, 3),
                "lostSeconds": None if each.lost_s is None else round(each.lost_s, 3),
                "lostSteps": each.lost_steps,
            }
            for each in counted.restarts
        ],
        "saves": [
            {
                "step": each.step,
                "attempt": each.number,
                "began": output.timestamp(each.began_ns),
                "cause": each.cause,
                "sizeBytes": each.bytes,
                "stallSeconds": each.stall_s,
                "queueSeconds": each.queued_s,
                "persistSeconds": each.persist_s,
                "commitSeconds": each.commit_s,
                "lagSeconds": round(page.lag_s(each), 3),
            }
            for each in found.journal.saves
            if each.committed_ns
        ],
        "recoveryPoints": [listing.document(each) for each in found.steps],
        "journal": dataclasses.asdict(found.journal),
        "missing": list(found.missing),
    }
