"""
The whole of: what a page of the guide shows as code, so that a test runs what a reader reads.

Called from: tests/distributed/test_wheels.py.
Must never: change a character of it.
"""

import re
from pathlib import Path
from typing import Final

GUIDE: Final = Path(__file__).parents[2] / "docs" / "guide"


def blocks(page: str, section: int) -> list[str]:
    """
    The code blocks of the numbered section `## <section>. ...` of a page, without their fences, in order.

    Raises:
        AssertionError: the page has no such section.
    """
    parts = re.split(r"(?m)^## (?=\d+\. )", (GUIDE / page).read_text())
    found = [part for part in parts if part.startswith(f"{section}. ")]
    assert len(found) == 1, f"{page} has {len(found)} sections of the number {section}"
    return re.findall(r"^```\w*\n(.*?)^```", found[0], flags=re.MULTILINE | re.DOTALL)
