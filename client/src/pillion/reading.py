"""
Reading a checkpoint without a state dict to fill: the sidecar says what the checkpoint holds, and this module makes tensors for it.

Called from: `Checkpointer.read` (all ranks). Changes nothing in the run: neither which checkpoint is the newest, nor what the next save is.

    question: what is there below the prefixes? -> the layout of whole tensors
    one load for each part of it, so that the arena holds a part and never the whole state
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, Final

from pillion import leaves as leaves_module
from pillion import loading
from pillion import opaque as opaque_module
from pillion.errors import CorruptCheckpoint, LoadError, NoCheckpoint
from pillion.session import Session
from pillion.wire import layout as layout_module
from pillion.wire import load_messages
from pillion.wire.load_messages import Tier

PART_BYTES: Final = 256 * 1024**2
"""Bytes of tensors that one load brings. A slot of every rank grows to this size at most, or to that of the largest tensor."""

_log = logging.getLogger(__name__)


def read(session: Session, step: int | None, *, prefixes: Sequence[str], path: str | None) -> dict[str, Any]:
    """
    Return what a checkpoint holds, as a nested dict of CPU tensors and values.

    Args:
        session: this rank's session.
        step: a committed step. None lets the sidecars choose.
        prefixes: dotted names; only what is below them is read. Empty: all.
        path: directory of a checkpoint, or the root of a run. None: the job's root and memory.

    Ranks: all, with the same arguments.

    Blocks: as `loading.load`, once for each part.

    Raises:
        LoadError: `NoCheckpoint`, `CorruptCheckpoint`, `IncompatibleCheckpoint`.
        SidecarUnavailable: as `loading.load`.
    """
    refused: dict[str, str] = {}
    while True:
        answer = _content(session, step, prefixes, path, refused)
        content = layout_module.decode((answer.content or "").encode())
        try:
            return nested(content.paths, _leaves(session, answer, content))
        except CorruptCheckpoint as err:
            where = f"{answer.tier}:{answer.step}"
            if step is not None or where in refused:
                raise
            refused = {**answer.refused, where: "; ".join(err.reasons.values()) or str(err)}
            _log.warning("pillion: the read begins again with an older checkpoint: %s", err)


def _content(
    session: Session, step: int | None, prefixes: Sequence[str], path: str | None, refused: Mapping[str, str]
) -> load_messages.Loaded:
    """Return the checkpoint that is read, and its content."""
    request = load_messages.Load(
        find=True,
        whole=True,
        step=step,
        path=path,
        below=path is not None,
        prefixes=tuple(prefixes),
        refused=refused,
        layout=loading.EMPTY_LAYOUT.encoded.decode(),
    )
    answer = loading.ask(session, request)
    if answer.step is None:
        which = "" if step is None else f" of step {step}"
        raise NoCheckpoint(f"there is no checkpoint{which} to read; find() tells before")
    if answer.content is None:
        raise LoadError("the sidecar's release cannot read without a state dict: update its image")
    loading.check_source(answer, path)
    for where, why in answer.refused.items():
        _log.warning("pillion: skipped the corrupt checkpoint %s: %s", where, why)
    for where, why in answer.passed_over.items():
        _log.warning("pillion: the newer snapshot %s in memory was not read: %s", where, why)
    return answer


def _leaves(session: Session, answer: load_messages.Loaded, content: layout_module.Layout) -> dict[str, object]:
    """Return FQN -> tensor or value, of all that the content names."""
    values: dict[str, object] = {}
    for part in parts(content):
        wanted = leaves_module.Leaves(
            part, [leaves_module.empty(item) for item in part.items], [None] * len(part.opaque)
        )
        request = load_messages.Load(
            whole=True,
            step=answer.step if answer.tier is Tier.ARENA else None,
            path=answer.path if answer.tier is Tier.STORAGE else None,
            below=answer.tier is Tier.STORAGE,
            layout=part.encoded.decode(),
        )
        filled = loading.retry(session, lambda wanted=wanted, request=request: loading.fill(session, wanted, request))  # type: ignore[misc] # defaults
        if filled.answer.step is None:
            raise LoadError(f"step {answer.step} is not there any more: it was removed during the read")
        values |= {item.fqn: tensor for item, tensor in zip(part.items, wanted.tensors, strict=True)}
        values |= {fqn: opaque_module.unpickled(data, fqn) for fqn, data in filled.opaque.items()}
    return values


def parts(content: layout_module.Layout) -> Iterator[layout_module.Layout]:
    """Yield the layouts of loads that together bring the content. The last one has the opaque leaves. Pure."""
    items: list[layout_module.Item] = []
    size_bytes = 0
    for item in content.items:
        if items and size_bytes + item.payload_bytes > PART_BYTES:
            yield _part(content, items, ())
            items, size_bytes = [], 0
        items.append(item)
        size_bytes += item.payload_bytes
    if items or content.opaque:
        yield _part(content, items, content.opaque)


def _part(
    content: layout_module.Layout, items: Sequence[layout_module.Item], opaque: tuple[str, ...]
) -> layout_module.Layout:
    names = [*(item.fqn for item in items), *opaque]
    return layout_module.Layout(tuple(items), opaque, {fqn: content.paths[fqn] for fqn in names})


def nested(paths: Mapping[str, tuple[str | int, ...]], values: Mapping[str, object]) -> dict[str, Any]:
    """
    Return the values in nested dicts and lists. Pure.

    Args:
        paths: FQN -> the keys on the way to the value. An int is an index of a list.
        values: FQN -> value.

    Returns:
        The dict. A list of which some values are missing is a dict by index. A value whose path leads through another value (of another rank)
        lies at the top under its FQN.
    """
    top: dict[str | int, Any] = {}
    leaves = set(paths.values())
    for fqn, path in paths.items():
        if any(path[:depth] in leaves for depth in range(1, len(path))):
            top[fqn] = values[fqn]
            continue
        container = top
        for key in path[:-1]:
            container = container.setdefault(key, {})
        container[path[-1]] = values[fqn]
    # The values are told from the containers made here by their paths, as a value may be a dict.
    return {str(key): _listed(value, (key,), leaves) for key, value in top.items()}


def _listed(value: Any, path: tuple[str | int, ...], leaves: Set[tuple[str | int, ...]]) -> Any:
    """Return a container with a list in place of each dict whose keys are the indexes of a list."""
    if path in leaves or not isinstance(value, dict):
        return value
    children = {key: _listed(child, (*path, key), leaves) for key, child in value.items()}
    if children and set(children) == set(range(len(children))):
        return [children[index] for index in range(len(children))]
    return children
