"""
The whole of: that docs/reference/annotations.md tells what the code does.

Called from: pytest.
Must never: judge the words; only that each name is there, and no other.
"""

import re
from pathlib import Path
from typing import Final

from pillion_operator import __main__
from pillion_operator.controller import checkpoints
from pillion_operator.injection import annotations, reasons, sidecar_spec, storage_spec

PAGE: Final = (Path(__file__).parents[4] / "docs" / "reference" / "annotations.md").read_text()


def test_the_page_names_each_annotation_and_no_other() -> None:
    """What can be written on a pod or a Checkpoint is on the page, and what is on the page can be written."""
    named = set(re.findall(r"pillion\.dev/[a-z-]+", PAGE))
    assert named == {*annotations.KNOWN, annotations.INJECTED, checkpoints.PIN}


def test_the_page_has_each_reason_with_its_sentence() -> None:
    """The table of reasons is the code's."""
    table = PAGE.split("## Reasons")[1]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, flags=re.MULTILINE))
    assert rows == {reason.value: reason.sentence for reason in reasons.Reason}


def test_the_page_names_what_a_trainer_gets() -> None:
    """Each variable and each path that a trainer container sees, and each exit status, is on the page."""
    assert all(f"`{name}`" in PAGE for name in (*sidecar_spec.TRAINER_ENV, sidecar_spec.PYTHONPATH))
    assert all(f"`{path}" in PAGE for path in (*sidecar_spec.TRAINER_MOUNTS, storage_spec.DIR))
    statuses = {int(number) for number in re.findall(r"\b(\d+) when", PAGE)}
    assert statuses == {each.value for each in __main__.Exit if each is not __main__.Exit.USAGE}
