"""
The comparison of replicas: finds leaves that several ranks hold under one name with different values. Pure.

Called from: `executor.save.write` (within a pod, for every save, as the digests are there) and `executor.save.commit` (between pods, once a plan).

Storage keeps the replica of the lowest rank. After a load from storage all ranks have that value. This matters for random generators, positions of
data loaders, and averages that were never reduced. No other check shows the difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pillion.wire import layout

MAX_DIFFERING: Final = 256
"""Maximum of names in a manifest or a warning."""
MAX_SAMPLED: Final = 256
"""Maximum of digests that a pod sends for the comparison with other pods: 20 KB, once a plan."""
SAMPLED_BYTES: Final = 64 * 1024
"""Maximum size of a tensor that is compared between pods. Leaves that differ by nature are small, and weights differ together with these."""

Digested = tuple[layout.Layout, Sequence[str]]
"""A rank's layout, and the digests of its items and then of its opaque leaves."""


def within(ranks: Sequence[Digested]) -> list[str]:
    """Return the names whose bytes differ between these ranks. Only equal parts of a leaf are compared."""
    if len(ranks) < 2:
        return []
    seen: dict[object, str] = {}
    fqns: set[str] = set()
    for rank_layout, digests in ranks:
        keys = itertools.chain(
            (item.key for item in rank_layout.items), ((fqn, None, None) for fqn in rank_layout.opaque)
        )
        for key, digest in zip(keys, digests, strict=True):
            if seen.setdefault(key, digest) != digest:
                fqns.add(key[0])
    return sorted(fqns)[:MAX_DIFFERING]


def sample(ranks: Iterable[Digested]) -> dict[str, str]:
    """Return name -> digest of leaves that other pods probably hold too: first opaque leaves, then small tensors that are whole."""
    opaque: dict[str, str] = {}
    tensors: dict[str, str] = {}
    for rank_layout, digests in ranks:
        for item, digest in zip(rank_layout.items, digests, strict=False):
            if item.sizes == item.size and item.payload_bytes <= SAMPLED_BYTES:
                tensors.setdefault(item.fqn, digest)
        for fqn, digest in zip(rank_layout.opaque, digests[len(rank_layout.items) :], strict=True):
            opaque.setdefault(fqn, digest)
    return dict([*sorted(opaque.items()), *sorted(tensors.items())][:MAX_SAMPLED])


def across(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names that differ within a pod or between pods. `results` are the result documents of all pods."""
    seen: dict[str, str] = {}
    fqns: set[str] = set()
    for result in results:
        fqns.update(str(fqn) for fqn in result.get("differing", ()))
        for fqn, digest in result.get("sample", {}).items():
            if seen.setdefault(str(fqn), str(digest)) != digest:
                fqns.add(str(fqn))
    return sorted(fqns)[:MAX_DIFFERING]
