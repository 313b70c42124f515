"""
Opaque leaves, which only the trainer can read: how they are pickled, unpickled, and put into the user's own objects.

Called from: `pillion.saving` (pickled) and `pillion.loading` (unpickled, fill), on the training thread. Only the trainer unpickles these
bytes, because unpickling runs constructors.
"""

from __future__ import annotations

import io
from typing import Any, cast

import torch

from pillion import modes, primitives
from pillion.errors import IncompatibleCheckpoint, StagingError, UnsupportedLeaf


class Pickler:
    """
    Makes archives of opaque leaves. It keeps the last archive of each primitive, as most primitives are hyperparameters that rarely change.

    Memory: about 1.5 KiB for each primitive leaf of the last state dict. Not thread-safe; one per Saver.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[type, object, bytes]] = {}

    @modes.off()
    def pickled(self, leaves: dict[str, object]) -> list[bytes]:
        """
        Return the archive of each leaf, in the order of `leaves`.

        Raises:
            UnsupportedLeaf: a leaf cannot be pickled.
        """
        before, kept = self._kept, {}
        archives = []
        for fqn, leaf in leaves.items():
            if not primitives.is_primitive(leaf):
                archives.append(pickled(leaf, fqn))
                continue
            # Floats are compared by hex(): -0.0 == 0.0 and nan != nan would give the wrong bytes.
            key = leaf.hex() if isinstance(leaf, float) else leaf
            entry = before.get(fqn)
            if entry is None or entry[1] != key or entry[0] is not type(leaf):
                entry = (type(leaf), key, primitives.archive(leaf) or pickled(leaf, fqn))
            kept[fqn] = entry
            archives.append(entry[2])
        self._kept = kept
        return archives


@modes.off()
def pickled(leaf: object, fqn: str) -> bytes:
    """
    Return a `torch.save` archive of any Python object, as stock DCP writes it.

    Raises:
        UnsupportedLeaf: the object cannot be pickled.
        StagingError: out of memory.
    """
    buffer = io.BytesIO()
    try:
        torch.save(leaf, buffer)
    except MemoryError as err:
        raise StagingError(f"out of memory while pickling {fqn!r} of type {type(leaf).__name__}") from err
    except Exception as err:  # torch.save raises whatever the object's __reduce__ raises
        why = f"it cannot be pickled ({str(err) or type(err).__name__})"
        raise UnsupportedLeaf(fqn=fqn, type_name=type(leaf).__name__, why=why) from err
    return buffer.getvalue()


def estimated_bytes(leaf: object) -> int:
    """Estimate the bytes of an opaque leaf without pickling it. The arena is reserved with slack."""
    return 2048 if leaf is None or isinstance(leaf, (int, float, str, bool)) else 16384


@modes.off()
def unpickled(data: bytes, fqn: str) -> object:
    """
    Return the object of an opaque leaf. Only the trainer calls this, because unpickling runs constructors.

    Raises:
        IncompatibleCheckpoint: the object's class cannot be imported or built here.
    """
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except Exception as err:  # unpickling runs arbitrary constructors
        raise IncompatibleCheckpoint(f"cannot restore {fqn!r}: {type(err).__name__}: {err}", fqns=[fqn]) from err


# --- filling the user's own tensors -----------------------------------------------------------------------------------


@modes.off()
def fill(target: object, loaded: object) -> bool:
    """
    Copy the values of a loaded tensor into the user's tensor, which stays the same object.

    For opaque tensors: sparse, quantized, and subclasses. A subclass that names its inner tensors (`__tensor_flatten__`) is filled bit
    for bit through them. Any other subclass is filled by `copy_`, if its attributes are equal.

    Returns:
        Whether `target` was filled. False: one of the two is not a tensor, their type, shape, dtype or subclass attributes differ, or
        the copy fails. Then the caller replaces `target` by `loaded`.
    """
    if not isinstance(target, torch.Tensor) or not isinstance(loaded, torch.Tensor):
        return False
    # Inference tensors can be changed in inference mode only; ordinary ones in both.
    with torch.inference_mode():
        try:
            pairs = _pairs(target, loaded)
            if pairs is None:
                return False
            for own, value in pairs:
                own.copy_(value)
        except Exception:  # copy_ of a foreign subclass runs foreign code; what is half filled is replaced
            return False
    return True


def _pairs(target: torch.Tensor, loaded: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """Return the pairs to copy between: the two tensors, or their inner tensors. None if they do not match. Changes nothing."""
    if type(target) is not type(loaded) or target.dtype != loaded.dtype or target.layout != loaded.layout:
        return None
    if target.is_nested != loaded.is_nested or (not target.is_nested and target.shape != loaded.shape):
        return None
    if type(target) in (torch.Tensor, torch.nn.Parameter):
        return [(target, loaded)]
    own, stored = cast("Any", target), cast("Any", loaded)
    if not hasattr(own, "__tensor_flatten__"):
        # The subclass keeps its state in attributes, which copy_ does not change.
        return [(target, loaded)] if _equal(vars(own), vars(stored)) else None
    names, context = own.__tensor_flatten__()
    stored_names, stored_context = stored.__tensor_flatten__()
    if list(names) != list(stored_names) or not _equal(context, stored_context):
        return None
    pairs = []
    for name in names:
        one, other = getattr(own, name), getattr(stored, name)
        if one is None and other is None:
            continue
        inner = _pairs(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else None
        if inner is None:
            return None
        pairs += inner
    return pairs


def _equal(one: Any, other: Any) -> bool:
    """Whether two contexts of `__tensor_flatten__` are equal; tensors in them are compared by value."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other.to(one.device))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
