"""
What a script changes between a save and the next optimizer step, and so what its next saves may copy late.

Called from: `pillion.saving`, on the training thread, and on the thread of an overlapped save.

A script that did not ask for overlapped saves may change its weights right behind a save: it clips them, swaps averages in, renormalizes
an embedding. So the first save of a run copies everything before it returns, and the next step compares all bytes of what an optimizer
holds. Only tensors that were left alone are copied late by later saves.

    first save: copy all, take digests  -> ... -> step: compare      ->  later saves: copy late what was left alone
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch

from pillion import late, modes, overlap
from pillion import leaves as leaves_module

_log = logging.getLogger(__name__)

BLOCK_WORDS: Final = 4096
"""Words of 8 bytes under one sum of a digest. Sums of a whole tensor would not see two rows that change places."""


class Habits:
    """What is known of one script. Thread-safe."""

    def __init__(self) -> None:
        self._steppers = overlap.Steppers()
        self._lock = threading.Lock()
        self._changing: set[str] = set()
        """FQNs of tensors that were changed by something other than a step."""
        self._tried: set[str] = set()
        """FQNs of tensors that were left alone from a save to the next step."""
        self._trial: _Trial | None = None

    def choose(self, leaves: leaves_module.Leaves, *, forced: bool) -> late.Choice | None:
        """
        Return which tensors a save copies late. None: it copies all at once.

        Args:
            leaves: what is saved.
            forced: whether the script asked for it. Otherwise an optimizer's memory counts only if it has stepped since the last call:
                weights that another one has taken over do not wait.
        """
        items = leaves.layout.items
        recent = self._steppers.recent()
        if not forced and not (recent and late.pays(leaves.layout.tensors_bytes, len(items))):
            return None
        owned = self._steppers.stretches(None if forced else recent)
        places = [
            late.Place(item.fqn, tensor.nbytes, overlap.start_of(tensor))
            for item, tensor in zip(items, leaves.tensors, strict=True)
        ]
        with self._lock:
            return late.choose(places, owned, changing=self._changing, tried=None if forced else self._tried)

    def watch(self, leaves: leaves_module.Leaves, untried: Sequence[int]) -> None:
        """
        Begin to watch tensors, until the next step. `untried`: their indexes.

        Blocks: on the host as a sum of all their bytes. Not on a GPU.
        """
        if not untried:
            return
        names = [leaves.layout.items[index].fqn for index in untried]
        trial = _Trial(names, [leaves.tensors[index] for index in untried])
        with self._lock:
            self._trial = trial
        # Then nothing steps any more, and the tensors would stay in memory.
        for optimizer in self._steppers.alive():
            weakref.finalize(optimizer, _drop, weakref.ref(trial)).atexit = False

    def stepping(self, optimizer: torch.optim.Optimizer) -> None:
        """
        Take note of a step that begins, and of what changed before it. Never raises.

        Blocks: once after `watch`, for a sum of all bytes that it watches; on a GPU until that is done.
        """
        self._steppers.add(optimizer)
        trial = self._take_trial()
        if trial is None or overlap.capturing():
            return
        try:
            changed = trial.changed()
        except Exception as err:  # a boundary: an optimizer's step does not fail for it
            _log.warning("pillion: saves stay without overlap: %s: %s", type(err).__name__, err)
            return
        if changed is None:
            return
        with self._lock:
            self._tried.update(set(trial.names).difference(changed))
        if changed:
            self.changed(changed)
            _log.info(
                "pillion: the script changes these tensors between a save and the next step, so save() copies them before it returns: %s",
                ", ".join(sorted(changed)),
            )

    def changed(self, names: Iterable[str]) -> None:
        """Copy these tensors before `save` returns, from now on."""
        with self._lock:
            self._changing.update(names)

    def forget(self) -> None:
        """Watch nothing any more. Called from: a load, which changes weights itself, and the end."""
        self._take_trial()

    def _take_trial(self) -> _Trial | None:
        with self._lock:
            trial, self._trial = self._trial, None
        return trial


def _drop(trial: weakref.ref[_Trial]) -> None:
    found = trial()
    if found is not None:
        found.tensors = []


class _Trial:
    """
    Tensors with the digests and versions that they have now.

    Args:
        names: their FQNs.
        tensors: each fills a stretch of memory (`overlap.start_of`).
    """

    @modes.off()
    def __init__(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        self.names = names
        # `detach`: what `p.data = other` puts in place of a weight is not what was saved.
        self.tensors = [tensor.detach() for tensor in tensors]
        """Empty once an optimizer is gone."""
        self._versions = leaves_module.versions(self.tensors)
        self._digests = [digest(tensor) for tensor in self.tensors]

    @modes.off()
    def changed(self) -> set[str] | None:
        """Return the names of the tensors that have changed. None if they are gone."""
        tensors = self.tensors
        if not tensors:
            return None
        versions = leaves_module.versions(tensors)
        found = set()
        for index, name in enumerate(self.names):
            same = versions[index] == self._versions[index]
            if not same or not torch.equal(digest(tensors[index]), self._digests[index]):
                found.add(name)
        return found


def digest(tensor: torch.Tensor) -> Any:
    """
    Return sums of all bytes, one for each BLOCK_WORDS words, on the tensor's device.

    Each change of a single word changes a sum. Of changes of several words one in 2**64 does not, and none that only changes their order
    within a block.

    Args:
        tensor: its elements fill a stretch of memory.
    """
    words = overlap.as_words(tensor)
    whole = words.numel() // BLOCK_WORDS * BLOCK_WORDS
    sums = words[:whole].view(-1, BLOCK_WORDS).sum(1, dtype=torch.int64)
    return torch.cat([sums, words[whole:].sum(0, dtype=torch.int64).view(1)])
