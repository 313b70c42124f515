"""
The whole of: our flattening of state dicts against torch's own, for any nesting.

Called from: pytest.
Must never: copy torch's rule; it is asked.
"""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from pillion import flatten
from pillion.errors import UsageError

leaves = st.builds(lambda n: torch.zeros(n), st.integers(0, 3)) | st.none() | st.integers() | st.text(max_size=3)
keys = st.text("abc.", min_size=1, max_size=3) | st.integers(0, 3)
trees = st.recursive(
    leaves,
    lambda child: (
        st.lists(child, max_size=3) | st.dictionaries(keys, child, max_size=3) | st.lists(child, max_size=2).map(tuple)
    ),
    max_leaves=12,
)


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def everything(value: object) -> list[object]:
    """All that lies in a nested state, containers left out."""
    if isinstance(value, dict):
        return [leaf for child in value.values() for leaf in everything(child)]
    if isinstance(value, (list, tuple)):
        return [leaf for child in value for leaf in everything(child)]
    return [value]


@given(state=st.dictionaries(st.text("abc", min_size=1, max_size=2), trees, max_size=4))
def test_names_and_leaves_are_torchs(state: dict[str, Any]) -> None:
    """The same FQNs name the same objects as in torch, and each can be put back; what torch refuses or drops we refuse."""
    try:
        ours, paths = flatten.flatten(state, is_tensor)
    except UsageError:
        # Two leaves of one name: torch raises too, for all that it does not drop.
        return
    theirs, mapping = flatten_state_dict(state)
    assert ours.keys() == theirs.keys()
    for fqn, leaf in ours.items():
        assert leaf is theirs[fqn] or leaf == theirs[fqn]
    for fqn, path in paths.items():
        assert tuple(map(str, path)) == tuple(map(str, mapping[fqn]))
        marker = object()
        try:
            flatten.assign(state, path, marker)
        except UsageError:
            continue
        assert [leaf for leaf in everything(state) if leaf is marker] == [marker]
        flatten.assign(state, path, ours[fqn])
        again, _ = flatten.flatten(state, is_tensor)
        assert again.keys() == ours.keys()
