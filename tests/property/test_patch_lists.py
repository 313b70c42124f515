"""
The whole of: the JSON Patch between any two lists, and what a pod may cost the webhook.

Called from: pytest.
Must never: look at how a difference is found.
"""

from typing import Any, Final

from hypothesis import given, settings
from hypothesis import strategies as st

from pillion_operator.injection import annotations, patch
from support import json_patch

entries: Final = st.lists(
    st.one_of(
        st.builds(lambda name, value: {"name": name, "value": value}, st.sampled_from("ABC"), st.integers(0, 1)),
        st.builds(lambda path: {"mountPath": path}, st.sampled_from("AB")),
        st.sampled_from(["x", 1, None]),
    ),
    max_size=7,
)
MANY: Final = 20_000
"""Variables of one name: what a pod of the largest size that the API server takes has room for."""


@settings(max_examples=300, deadline=None)
@given(before=entries, after=entries)
def test_the_patch_makes_one_list_of_the_other_by_single_entries(before: list[Any], after: list[Any]) -> None:
    """Also where a name comes several times, or entries change their places."""
    operations = patch.diff({"env": before}, {"env": after})
    assert json_patch.apply({"env": before}, operations) == {"env": after}
    assert all(operation["path"] != "/env" for operation in operations)


def test_a_pod_with_very_many_variables_of_one_name_costs_one_pass() -> None:
    """With a comparison of each with each this test would take an hour."""
    before = {"env": [{"name": "A", "value": "1"}] * MANY}
    after = {"env": [{"name": "B"}, *before["env"], {"name": "B"}]}
    assert len(patch.diff(before, after)) == 2
    assert len(patch.diff(after, before)) == 2


def test_unknown_annotations_are_told_up_to_a_number() -> None:
    """Each that is told is compared with all that there are, in the webhook's only thread."""
    noted = {f"{annotations.PREFIX}unknown-{number}": "" for number in range(MANY)}
    _, problems = annotations.parse(noted)
    assert len(problems) < 100
    assert "more unknown annotations" in problems[-1]
