"""
Leaves that several ranks have under one name, and whose values differ. Pure.

Called from: `executor.save.write` (within a pod, for every save: the digests are there), `executor.save.commit` (across pods, once a plan). Of replicas storage keeps the
lowest rank's, so that after a load from there all ranks have that one: random generators, positions of data loaders, averages that were never
reduced. Nothing else tells.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pillion.wire import layout

DIFFERING_MOST: Final = 256
"""Names that a manifest and a warning have at most."""
SAMPLED_MOST: Final = 256
"""Digests that a pod sends for the comparison with others: 20 KB, once a plan."""
SAMPLED_BYTES: Final = 64 * 1024
"""Tensors up to this size are compared across pods. What differs by its nature is small; weights differ together with these."""

Digested = tuple[layout.Layout, Sequence[str]]
"""A rank's layout, and the digests of its items and then of its opaque leaves."""


def within(ranks: Sequence[Digested]) -> list[str]:
    """Names whose bytes differ between these ranks, where they hold the same part of it."""
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
    return sorted(fqns)[:DIFFERING_MOST]


def sample(ranks: Iterable[Digested]) -> dict[str, str]:
    """Name -> digest, of what other pods are likely to have as well: opaque leaves first, then small tensors that are whole."""
    opaque: dict[str, str] = {}
    tensors: dict[str, str] = {}
    for rank_layout, digests in ranks:
        for item, digest in zip(rank_layout.items, digests, strict=False):
            if item.sizes == item.size and item.payload_bytes <= SAMPLED_BYTES:
                tensors.setdefault(item.fqn, digest)
        for fqn, digest in zip(rank_layout.opaque, digests[len(rank_layout.items) :], strict=True):
            opaque.setdefault(fqn, digest)
    return dict([*sorted(opaque.items()), *sorted(tensors.items())][:SAMPLED_MOST])


def across(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names that differ within a pod or between pods, from the result documents of all."""
    seen: dict[str, str] = {}
    fqns: set[str] = set()
    for result in results:
        fqns.update(str(fqn) for fqn in result.get("differing", ()))
        for fqn, digest in result.get("sample", {}).items():
            if seen.setdefault(str(fqn), str(digest)) != digest:
                fqns.add(str(fqn))
    return sorted(fqns)[:DIFFERING_MOST]
