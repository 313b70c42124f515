"""
The order of the data in a fit of several processes: samplers that Lightning wraps, and the generators that they draw from.

Called from: `pillion.lightning`. Needs no Lightning to be imported.

Lightning replaces the sampler of a loader for several processes. It knows torch's samplers by their class. That of a shuffling
`StatefulDataLoader` has another class, so Lightning wraps it, and each epoch begins with a draw from the wrapped sampler's own generator.
Neither the loader's state nor Lightning's checkpoint has that generator.
Source: lightning 2.6.6, fabric/utilities/distributed.py; torchdata 0.11.0, stateful_dataloader/sampler.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


class Shuffles:
    """What the wrapped samplers of a fit drew from when their epoch began, and the way to let them draw it once more."""

    def __init__(self) -> None:
        self._wrapped: list[_Wrapped] = []

    def follow(self, loaders: Iterable[Any]) -> None:
        """
        Note from now on what each wrapped sampler of the loaders draws from.

        Args:
            loaders: as Lightning has prepared them, before it makes their iterators.
        """
        self._wrapped = [_Wrapped.of(wrapper) for loader in loaders for wrapper in _wrappers(loader)]

    def state(self) -> list[torch.Tensor | None]:
        """Return, for each wrapped sampler, the state of its generator before the draw of this epoch. None: it has not drawn."""
        return [each.begun for each in self._wrapped]

    def repeat(self, states: Sequence[torch.Tensor | None]) -> None:
        """Let every draw give the order of the epoch that these states began, until `go_on`. A loader draws several times when it loads."""
        for each, state in zip(self._wrapped, states, strict=False):
            each.repeated = state

    def go_on(self) -> None:
        """Let the next draws give new orders."""
        for each in self._wrapped:
            each.repeated = None


class _Wrapped:
    """A sampler below Lightning's wrapper. Takes the place of the wrapper's `reset`, which draws the order of an epoch."""

    def __init__(self, wrapper: Any) -> None:
        self._generator: torch.Generator = wrapper._sampler.generator
        self._draw = wrapper.reset
        self.begun: torch.Tensor | None = None
        self.repeated: torch.Tensor | None = None
        wrapper.reset = self.draw

    @classmethod
    def of(cls, wrapper: Any) -> _Wrapped:
        """Return what follows the wrapper, which may be followed already."""
        follower = getattr(wrapper.reset, "__self__", None)
        return follower if isinstance(follower, cls) else cls(wrapper)

    def draw(self) -> None:
        if self.repeated is not None:
            self._generator.set_state(self.repeated)
        self.begun = self._generator.get_state()
        self._draw()


def generators(loaders: Iterable[Any]) -> list[torch.Generator]:
    """Return the generators that the loaders and their samplers draw from, other than torch's own."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        owners = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
        for owner in (*owners, *(each._sampler for each in _wrappers(loader))):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def _wrappers(loader: Any) -> list[Any]:
    """Return what stands between a sampler of Lightning's for several processes and the loader's own one, where that has a generator."""
    batches = getattr(loader, "batch_sampler", None)
    found = {}
    for sampler in (getattr(loader, "sampler", None), getattr(batches, "sampler", None)):
        between = getattr(sampler, "dataset", None)
        own = getattr(between, "_sampler", None)
        if callable(getattr(between, "reset", None)) and isinstance(getattr(own, "generator", None), torch.Generator):
            found[id(between)] = between
    return list(found.values())
