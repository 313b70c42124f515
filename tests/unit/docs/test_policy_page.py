"""
The whole of: docs/reference/policy.md has the fields of the CRD, and says when a change of each takes effect.

Called from: pytest.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any, Final

from pillion_sidecar.supervisor import effective_policy


def _tool() -> Any:
    """The program, which is in no package."""
    path = Path(__file__).parents[3] / "tools" / "policy_reference.py"
    spec = importlib.util.spec_from_file_location("policy_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


policy_reference: Final = _tool()
PAGE: Final[str] = policy_reference.PAGE.read_text()


def test_the_tables_are_those_of_the_crd() -> None:
    """After a change in crds/: `python tools/policy_reference.py`."""
    assert policy_reference.rendered(PAGE) == PAGE


def test_the_page_says_of_each_field_when_a_change_takes_effect() -> None:
    """Running jobs take up the fields that the sidecar lists as live, and no other."""
    section = PAGE.partition("## When a change takes effect")[2].partition("\n## ")[0]
    rows = [set(re.findall(r"`(\w+)`", row)) for row in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)]
    live, at_restart, later, injection = rows
    assert live | at_restart == set(effective_policy.LIVE)
    assert later == set(effective_policy.DEFERRED)
    assert injection == {"failurePolicy"}
