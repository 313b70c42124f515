"""
The arena of one pod under one session: segments, slot table, and who the ranks are. Called from: the supervisor.

Everything here is quick and synchronous, except growing a segment, which the supervisor runs in a thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import reprlib
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pillion.wire import arena, control, messages, names, policy
from pillion_sidecar import affinity, settings
from pillion_sidecar.arena import memory_limit
from pillion_sidecar.arena import segment as segment_module
from pillion_sidecar.arena.growth import SPARE_BYTES, Growth
from pillion_sidecar.arena.segment import Segment
from pillion_sidecar.arena.slots import Leftover, Phase, Save, SlotTable
from pillion_sidecar.session.record import Record
from pillion_sidecar.storage import folders

_log = logging.getLogger(__name__)

STRIDE_STEP_BYTES: Final = 2 * 1024**2
"""Slots begin at multiples of a huge page, should the tmpfs use them."""
DEFAULT_LIMIT_SHARE: Final = 0.5
"""Without staging.sizeLimit the arena may take this share of its tmpfs: the kernel's own default for a tmpfs is half of memory."""
ADDRESS_SPACE_BYTES: Final = 2**45
"""For all slots of a pod: a quarter of what a process has (47 bits), as each slot may need the whole limit."""

EPOCH_MOST: Final = 2**32 - 1
"""Later than any: a slot's header has 32 bits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who this pod's ranks are, from the first hello of a session."""

    session: str
    run_id: str
    attempt: int
    world_size: int
    pods: tuple[tuple[int, ...], ...]
    local_ranks: tuple[int, ...]
    placement: str = ""
    """Which pod has which ranks, as a digest; empty: the client does not say."""
    root: str
    store_mode: str | None
    store: tuple[str, int] | None

    def moved_from(self, before: Identity) -> bool:
        """Whether some rank of the job, in this pod or another, is not where it was: every pod that was there before says the same."""
        ours = (self.placement, self.world_size, self.pods, self.local_ranks)
        return ours != (before.placement, before.world_size, before.pods, before.local_ranks)

    @classmethod
    def from_hello(cls, hello: control.Hello, *, root: str) -> Identity:
        """
        Raises:
            BadFrame: the hello contradicts itself.
        """
        local = next((pod for pod in hello.pods if hello.rank in pod), None)
        if local is None:
            raise messages.BadFrame(f"hello: rank {hello.rank} is in none of the pods {reprlib.repr(hello.pods)}")
        ranks = sorted(rank for pod in hello.pods for rank in pod)
        # The length first: a list of as many as the hello says may not fit into memory.
        if len(ranks) != hello.world_size or ranks != list(range(hello.world_size)):
            raise messages.BadFrame(
                f"hello: the pods {reprlib.repr(hello.pods)} do not hold the ranks 0 to {hello.world_size - 1} once each"
            )
        if len(hello.session) != 32 or not set(hello.session) <= set("0123456789abcdef"):
            raise messages.BadFrame("hello: the session must be 32 hex digits")
        if hello.placement and (len(hello.placement) != 32 or not set(hello.placement) <= set("0123456789abcdef")):
            raise messages.BadFrame("hello: the placement must be 32 hex digits")
        return cls(
            session=hello.session,
            run_id=hello.run_id,
            attempt=hello.attempt,
            world_size=hello.world_size,
            pods=hello.pods,
            local_ranks=local,
            placement=hello.placement,
            root=root,
            store_mode=hello.store_mode,
            store=hello.store,
        )


@dataclass(frozen=True, slots=True)
class Stranger:
    """A whole snapshot of another world, left where it is until its slot is needed: trainers that start again find it again."""

    step: int
    world_size: int
    order: tuple[int, int]


class PodArena:
    """
    The arena of the pod.

    Args:
        shared: the trainers may be another user than this process (an injected sidecar).

    Owns: the segment files of its local ranks; `remove` unlinks them.
    """

    def __init__(
        self, runtime_dir: str, identity: Identity, session_policy: policy.Policy, *, shared: bool = False
    ) -> None:
        self.runtime_dir = runtime_dir
        self._mode = segment_module.SHARED if shared else segment_module.PRIVATE
        self.identity = identity
        self.policy = session_policy
        stats = os.statvfs(runtime_dir)
        tmpfs_bytes = stats.f_blocks * stats.f_frsize
        self.limit_bytes = session_policy.staging.size_limit_bytes or int(tmpfs_bytes * DEFAULT_LIMIT_SHARE)
        said = (
            "staging.sizeLimit"
            if session_policy.staging.size_limit_bytes
            else "half of its tmpfs (staging.sizeLimit is not set)"
        )
        self.bounds = {said: self.limit_bytes, "the tmpfs that it is on": tmpfs_bytes}
        """What the arena may take, in bytes, by what says so."""
        self.rooms: dict[int, int] = {}
        """Rank -> the most bytes that it has asked for a slot."""
        self.segments: dict[int, Segment] = {}
        self.near: dict[int, int] = {}
        """rank -> process of its trainer, which its memory is to be near to."""
        alone = len(identity.pods) == 1
        self.table = SlotTable(
            session_policy.staging.slots, identity.local_ranks, session_policy.staging.overlap, alone=alone
        )
        try:
            for index, rank in enumerate(identity.local_ranks):
                path = os.path.join(runtime_dir, names.segment_file(index))
                stride = stride_bytes(
                    self.limit_bytes, num_slots=len(identity.local_ranks) * session_policy.staging.slots
                )
                self.segments[rank] = self._adopt_or_create(path, session_policy.staging.slots, stride)
        except BaseException:
            self.close()
            raise
        self._growth = Growth(self.segments, self.limit_bytes)
        container = memory_limit.tightest()
        if container is not None:
            self.bounds["the memory limit of the sidecar's container"] = container.limit_bytes - SPARE_BYTES
        if (
            session_policy.staging.size_limit_bytes is not None
            and container is not None
            and container.limit_bytes < self.limit_bytes
        ):
            _log.warning(
                "staging.sizeLimit is %d bytes, and the memory limit of this container (%s) %d: the arena can have no more than that",
                self.limit_bytes,
                container.path,
                container.limit_bytes,
            )
        self._remove_strangers()
        self.order: tuple[int, int] | None = None
        """(generation, epoch) of what is saved now; None until the executor has opened the session."""
        self.strangers: dict[int, Stranger] = {}
        """Slot -> a whole snapshot that these ranks cannot load."""
        self.adopted = self._adopt_saves()

    def _adopt_or_create(self, path: str, num_slots: int, stride_bytes: int) -> Segment:
        try:
            segment = Segment.attach(path)
        except FileNotFoundError:
            pass
        except (ValueError, OSError) as err:
            _log.warning("the segment %s cannot be adopted: %s", path, err)
        else:
            if (segment.header.num_slots, segment.header.stride_bytes) == (num_slots, stride_bytes):
                return segment
            segment.close()
        return Segment.create(path, num_slots=num_slots, stride_bytes=stride_bytes, mode=self._mode)

    def _remove_strangers(self) -> None:
        """Segments of local ranks that this session does not have (a smaller world): they would hold memory for nobody."""
        own = {os.path.basename(segment.path) for segment in self.segments.values()}
        for name in os.listdir(self.runtime_dir):
            if name.startswith("segment-") and name not in own:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.runtime_dir, name))

    def _adopt_saves(self) -> list[Save]:
        """Whole snapshots found in the arena, oldest first; torn slots are freed."""
        leftovers = []
        ranks = self.identity.local_ranks
        for slot in range(self.policy.staging.slots):
            headers: dict[int, arena.SlotHeader] = {}
            for rank in ranks:
                with contextlib.suppress(ValueError):
                    headers[rank] = self.segments[rank].read_header(slot)
            first = headers.get(ranks[0])
            stranger = next((each for each in headers.values() if self._is_strange(each)), None)
            if stranger is not None:
                # Left as it is until its slot is needed: trainers that start again find it again.
                self.strangers[slot] = Stranger(
                    stranger.step, stranger.world_size, (stranger.generation, stranger.epoch)
                )
                continue
            whole = first is not None and all(
                rank in headers
                and headers[rank].state in (arena.SlotState.SEALED, arena.SlotState.PERSISTING)
                and headers[rank].step == first.step
                and headers[rank].rank == rank
                and headers[rank].world_size == self.identity.world_size
                and headers[rank].session == first.session
                for rank in ranks
            )
            if not whole or first is None:
                for rank in ranks:
                    self.segments[rank].reset(slot)
                continue
            for rank in ranks:
                self.segments[rank].write_state(slot, arena.SlotState.SEALED)
            persisted = all(arena.Flag.PERSISTED in headers[rank].flags for rank in ranks)
            snapshot = any(arena.Flag.SNAPSHOT in headers[rank].flags for rank in ranks)
            # Of trainers that are gone, the other pods may hold other steps: the load agrees on one, and a rescue persists that.
            alone, same = len(self.identity.pods) == 1, first.session.hex() == self.identity.session
            concluded = any(arena.Flag.CONCLUDED in headers[rank].flags for rank in ranks)
            leftover = Leftover(
                step=first.step,
                slot=slot,
                snapshot=snapshot,
                is_owed=not persisted and not snapshot if alone else same and not concluded,
                persisted=persisted,
                concluded=concluded,
                set_aside=any(arena.Flag.SET_ASIDE in headers[rank].flags for rank in ranks),
                inherited=not same,
                born=(first.generation, first.epoch) if first.generation else None,
                # The wall clock may have jumped since; the arena does not outlive the boot.
                sealed_ns=time.time_ns() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - first.sealed_ns),
            )
            leftovers.append((first.sealed_ns, leftover))
        return self.table.adopt(each for _, each in sorted(leftovers, key=lambda entry: entry[0]))

    def _is_strange(self, header: arena.SlotHeader) -> bool:
        """Whether all ranks of another world had sealed a snapshot, of which this is one part, and it is in memory only."""
        sealed = header.state in (arena.SlotState.SEALED, arena.SlotState.PERSISTING)
        # Digests are taken once every rank of the pod has sealed.
        complete = header.digests_for == header.sequence != 0
        stored = arena.Flag.PERSISTED in header.flags
        return sealed and complete and not stored and header.world_size != self.identity.world_size

    # --- slots -----------------------------------------------------------------------------------------------------

    def grow(self, rank: int, slot: int, room_bytes: int) -> int:
        """
        Give a rank's slot at least `room_bytes`; its capacity. Runs in a thread.

        Raises:
            ArenaExhausted: over the policy's limit for the pod, or the container's; or the tmpfs is full.
            SidecarError: the executor grows a slot for a load, and does not end.
        """
        with affinity.beside(self.near.get(rank, 0)):
            return self._growth.grow(rank, slot, room_bytes)

    def date(self, order: tuple[int, int]) -> None:
        """
        From now on saves are of this (generation, epoch). Those that were claimed before anybody could know it are of its session too;
        what an earlier session left without a date is newer than all that was committed before this one.
        """
        self.order = order
        self.table.date_all(order, inherited=(order[0] - 1, EPOCH_MOST))

    def set_aside(self, loaded: tuple[tuple[int, int], int]) -> None:
        """A checkpoint was loaded, given as (order, step): newer snapshots are of a branch that was left."""
        for save in self.table.set_aside(loaded):
            at_work = save.phase is Phase.PERSISTING
            self.mark(save, arena.SlotState.PERSISTING if at_work else arena.SlotState.SEALED)

    def begin_fill(self, rank: int, slot: int, *, persist: bool) -> None:
        """Mark a rank's slot as being filled, under a new sequence."""
        segment = self.segments[rank]
        self.strangers.pop(slot, None)
        generation, epoch = self.order or (0, 0)
        try:
            before = segment.read_header(slot)
        except ValueError:
            before = arena.SlotHeader(state=arena.SlotState.FREE)
        if before.state is arena.SlotState.FILLING:
            before = dataclasses.replace(before, layout_digest=bytes(16), framed_digest=bytes(16))
        segment.write_header(
            slot,
            dataclasses.replace(
                before,
                state=arena.SlotState.FILLING,
                flags=arena.Flag.NONE if persist else arena.Flag.SNAPSHOT,
                sequence=before.sequence + 1,
                digests_for=0,
                generation=generation,
                epoch=epoch,
            ),
        )

    def reset(self, slot: int) -> None:
        self.strangers.pop(slot, None)
        for segment in self.segments.values():
            segment.reset(slot)

    def heard(self, step: int, *, persisted: bool) -> None:
        """
        Every pod holds `step` whole, as a load from memory or a rescue has shown; `persisted`: and it is committed. A pod that was
        stopped before it could hear the one or the other would keep an older snapshot for its peers, and have no slot for the next.
        """
        save = self.table.heard(step, persisted=persisted)
        if save is not None:
            self.mark(save, arena.SlotState.SEALED, persisted=persisted, concluded=True)

    def mark(self, save: Save, state: arena.SlotState, *, persisted: bool = False, concluded: bool = False) -> None:
        """Write a save's state into its slots, for whoever finds the arena after us."""
        for segment in self.segments.values():
            header = segment.read_header(save.slot)
            if header.step != save.step:
                continue
            flags = header.flags
            flags |= arena.Flag.PERSISTED if persisted else arena.Flag.NONE
            flags |= arena.Flag.CONCLUDED if concluded else arena.Flag.NONE
            flags = flags & ~arena.Flag.SET_ASIDE | (arena.Flag.SET_ASIDE if save.set_aside else arena.Flag.NONE)
            generation, epoch = save.born or (header.generation, header.epoch)
            changed = dataclasses.replace(header, state=state, flags=flags, generation=generation, epoch=epoch)
            segment.write_header(save.slot, changed)

    def session_document(self, own_settings: settings.Settings) -> dict[str, Any]:
        """What the executor needs to open this session."""
        identity = self.identity
        store: Mapping[str, Any] | None = None
        if identity.store_mode is not None:
            host, port = identity.store or (os.environ.get("PILLION_POD_IP", "127.0.0.1"), 0)
            store = {"mode": identity.store_mode, "host": host, "port": port}
        return {
            "session": identity.session,
            "name": name_of(own_settings, identity),
            "owner": owner_of(own_settings),
            "owner_silent_s": own_settings.owner_silent_s,
            "run_id": identity.run_id,
            "world_size": identity.world_size,
            "pods": identity.pods,
            "local_ranks": identity.local_ranks,
            "root": identity.root,
            "store": store,
            "segments": {str(rank): segment.path for rank, segment in self.segments.items()},
            "limit_bytes": self.limit_bytes,
            "policy": policy.dump(self.policy),
            "peer_timeout_s": own_settings.peer_timeout_s,
            "persist_timeout_s": own_settings.persist_timeout_s,
            "storage_timeout_s": own_settings.storage_timeout_s,
            "store_timeout_s": own_settings.store_timeout_s,
            "write_threads": own_settings.write_threads,
        }

    def record(self) -> Record:
        """What a successor of this sidecar needs to find this session again."""
        identity = self.identity
        hello = {
            "session": identity.session,
            "run_id": identity.run_id,
            "attempt": identity.attempt,
            "rank": identity.local_ranks[0],
            "world_size": identity.world_size,
            "pods": [list(pod) for pod in identity.pods],
            "placement": identity.placement,
            "store_mode": identity.store_mode,
            "store": list(identity.store) if identity.store else None,
        }
        return Record(
            session=identity.session,
            hello=hello,
            policy=policy.dump(self.policy),
            root=identity.root,
        )

    def close(self) -> None:
        for segment in self.segments.values():
            segment.close()

    def remove(self) -> None:
        """Unlink the arena: everything in it is on storage, or was given up."""
        self.close()
        for segment in self.segments.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(segment.path)


def name_of(own_settings: settings.Settings, identity: Identity) -> str:
    """Who trains here, for people: job and pod; without a cluster the host and the run."""
    if own_settings.pod_name:
        return f"{owner_of(own_settings) or identity.run_id} (pod {own_settings.pod_namespace}/{own_settings.pod_name})"
    return f"run {identity.run_id!r} on {socket.gethostname()} (sidecar's pid {os.getpid()})"


def owner_of(own_settings: settings.Settings) -> str:
    """The object that the pod belongs to: kind, name and, where it is known, UID; empty without a cluster."""
    uid = f"({own_settings.owner_uid})" if own_settings.owner_uid else ""
    return " ".join(each for each in (own_settings.job_kind, own_settings.job_name, uid) if each)


def stride_bytes(limit_bytes: int, *, num_slots: int) -> int:
    """The range of addresses of one slot: room for the whole limit, as long as all slots of the pod have it."""
    wanted = -(-limit_bytes // STRIDE_STEP_BYTES) * STRIDE_STEP_BYTES + STRIDE_STEP_BYTES
    return min(wanted, ADDRESS_SPACE_BYTES // num_slots // STRIDE_STEP_BYTES * STRIDE_STEP_BYTES)


def check_root(root: str) -> list[str]:
    """
    Problems of a root, told before the first save needs it: not writable, or without an atomic rename.
    """
    # At random: in containers every pod's process has the same number, and all of them look at once.
    probe = os.path.join(root, names.INTERNAL_DIR, f"probe-{secrets.token_hex(8)}")
    try:
        folders.make(os.path.dirname(probe))
        with open(probe, "wb") as file:
            file.write(b"pillion")
        os.rename(probe, f"{probe}.renamed")
        os.unlink(f"{probe}.renamed")
    except OSError as err:
        return [
            f"the root {root} cannot be used: {err.strerror} ({err.filename}); a writable directory with rename is needed"
        ]
    return []
