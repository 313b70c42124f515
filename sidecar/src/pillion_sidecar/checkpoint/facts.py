"""
What retention knows of each committed checkpoint: its generation, size, time and metrics, read once from its manifest.

Called from: `checkpoint.retention`, `executor.save.dcp_writer`, `cli.pruning`.

A step that is saved again has other facts: `Known.forget` is called at each commit of the session, and `Known.forget_all` at each load, which
may finish interrupted commits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pillion.wire import manifest, names
from pillion_sidecar.checkpoint import catalog, commit, milestones
from pillion_sidecar.storage import generation, reading
from pillion_sidecar.storage.folder import Folder


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one committed checkpoint."""

    generation: str | None = None
    """None: another program wrote it."""
    size_bytes: int | None = None
    """Bytes of its data. None: not known, as another program wrote it. It counts for no quota."""
    created_ns: int | None = None
    """Wall clock time of the commit. None: not known. It is never too old."""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Known:
    """What the retention of one session has seen of its root."""

    steps: set[int] = field(default_factory=set)
    """Steps that were seen committed."""
    facts: dict[int, Facts] = field(default_factory=dict)
    """Facts of some of them."""
    over_quota: str = ""
    """Why the checkpoints have more bytes than the policy allows. Empty: they have not."""

    def read(self, root: Folder, steps: Iterable[int]) -> dict[int, Facts]:
        """
        Return the facts of committed steps. Reads the manifests of those that are not known yet.

        Raises:
            LoadError: the storage does not answer.
        """
        wanted = list(steps)
        for step in wanted:
            if step not in self.facts:
                self.facts[step] = _read(root, step)
        return {step: self.facts[step] for step in wanted}

    def forget(self, *steps: int) -> None:
        """Forget steps that are removed, or saved again."""
        self.steps.difference_update(steps)
        for step in steps:
            self.facts.pop(step, None)

    def forget_all(self) -> None:
        self.steps.clear()
        self.facts.clear()


def _read(root: Folder, step: int) -> Facts:
    folder = catalog.step_folder(root, step)
    try:
        read = manifest.decode_manifest(reading.retried(folder, lambda: commit.read_manifest(folder)))
    except (FileNotFoundError, manifest.ManifestError):
        noted = milestones.written(root, step)
        if noted is None:
            return Facts()
        # A named writer left no manifest. It writes to directories only, where a listing costs no requests.
        marker = folder.entry(names.COMMIT_MARKER)
        return Facts(noted[0], catalog.size_bytes(folder), None if marker is None else marker.modified_ns)
    return Facts(read.generation, read.size_bytes, read.created_ns, read.remarks.metrics)


def orders(known: Mapping[int, Facts]) -> dict[int, generation.Order]:
    """Return the order of each step's commit, as `catalog.orders`. Pure."""
    return catalog.ordered(
        {
            step: None if each.generation is None else generation.order_of(each.generation)
            for step, each in known.items()
        }
    )


def ages_s(known: Mapping[int, Facts], newest: int) -> dict[int, float]:
    """Return the age of each step at the commit of `newest`, seconds. Steps whose time is not known are left out. Pure."""
    now_ns = known[newest].created_ns if newest in known else None
    if now_ns is None:
        return {}
    return {step: (now_ns - each.created_ns) / 1e9 for step, each in known.items() if each.created_ns is not None}


def sizes(known: Mapping[int, Facts]) -> dict[int, int]:
    """Return the size of each step that has one, bytes. Pure."""
    return {step: each.size_bytes for step, each in known.items() if each.size_bytes is not None}


def values(known: Mapping[int, Facts], metric: str | None) -> dict[int, float]:
    """Return the value of a metric of each step that has one. Pure."""
    if metric is None:
        return {}
    return {step: each.metrics[metric] for step, each in known.items() if metric in each.metrics}
