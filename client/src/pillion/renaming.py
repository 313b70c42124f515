"""
Loading a checkpoint in which values have other names: which name a value has there.

Called from: `pillion.loading`. Pure. The mapping goes from the state dict to the checkpoint, because a load asks for each value of the state
dict. So two values may take one value of the checkpoint (weights, and their moving average), and what nobody asks for needs no entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pillion.errors import UsageError
from pillion.wire import layout as layout_module

Rename = Mapping[str, str] | Callable[[str], str]
"""Names of the state dict -> names in the checkpoint. A mapping's key and value may also be dotted prefixes of names."""

NAMES_SHOWN: Final = 20
"""Maximum names that the text of an error lists."""


def names_there(rename: Rename | None, own: Sequence[str]) -> dict[str, str]:
    """
    Return FQN in the state dict -> FQN in the checkpoint, for each value whose name differs.

    Raises:
        UsageError: an entry of the mapping names nothing in the state dict, or a new name is no text.
    """
    if rename is None:
        return {}
    # What a script gives is checked here.
    there: dict[str, Any] = _called(rename, own) if callable(rename) else _mapped(rename, own)
    odd = [(fqn, name) for fqn, name in there.items() if not isinstance(name, str) or not name]
    if odd:
        fqn, name = odd[0]
        raise UsageError(
            f"rename gives {fqn!r} the name {name!r}: a name is a text that is not empty (leave a value out of the state dict to"
            " keep it out of the load)"
        )
    return {fqn: name for fqn, name in there.items() if name != fqn}


def _called(rename: Callable[[str], Any], own: Sequence[str]) -> dict[str, Any]:
    return {fqn: rename(fqn) for fqn in own}


def _mapped(rename: Mapping[str, Any], own: Sequence[str]) -> dict[str, Any]:
    """Apply the longest prefix that has an entry."""
    used = set()
    there = {}
    for fqn in own:
        prefix: str | None = fqn
        while prefix is not None and prefix not in rename:
            prefix = prefix.rpartition(".")[0] or None
        if prefix is None:
            continue
        used.add(prefix)
        new = rename[prefix]
        there[fqn] = f"{new}{fqn[len(prefix) :]}" if isinstance(new, str) and new else new
    unused = [name for name in rename if name not in used]
    if unused:
        raise UsageError(
            f"rename has entries for names that the state dict does not have: {_shown(unused)}; it maps a name of the state dict to"
            f" the name in the checkpoint. The state dict has {_shown(own)}"
        )
    return there


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:NAMES_SHOWN])) + more


def renamed(layout: layout_module.Layout, there: Mapping[str, str]) -> layout_module.Layout:
    """Return the layout under the names of the checkpoint. Items and opaque leaves keep their places."""
    if not there:
        return layout
    items = tuple(dataclasses.replace(item, fqn=there.get(item.fqn, item.fqn)) for item in layout.items)
    opaque = tuple(there.get(fqn, fqn) for fqn in layout.opaque)
    return layout_module.Layout(items, opaque, {there.get(fqn, fqn): path for fqn, path in layout.paths.items()})


def own_names(names: Sequence[str], there: Mapping[str, str], own: Sequence[str]) -> list[str]:
    """Return the names in the state dict of values that have these names in the checkpoint."""
    if not there:
        return list(names)
    asked = set(names)
    return [fqn for fqn in own if there.get(fqn, fqn) in asked]


def explained(there: Mapping[str, str], fqns: Sequence[str]) -> str:
    """Return the end of an error's text that tells which of the checkpoint's names a rename has made. Empty: none of them."""
    asked = set(fqns)
    made = [f"{fqn!r} as {name!r}" for fqn, name in there.items() if name in asked]
    if not made:
        return ""
    more = f" and {len(made) - NAMES_SHOWN} more" if len(made) > NAMES_SHOWN else ""
    return f"; rename asks for {', '.join(made[:NAMES_SHOWN])}{more}"
