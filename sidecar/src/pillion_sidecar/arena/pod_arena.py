"""
The arena of one pod in one session: its segments, its slot table, and the identity of its ranks.

Called from: the supervisor. All calls are quick and synchronous, except growing a segment, which the supervisor runs in a thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import reprlib
import socket
import time
from dataclasses import dataclass
from typing import Final

from pillion.wire import arena, control, messages, names, policy
from pillion_sidecar import affinity, channel, settings
from pillion_sidecar.arena import memory_limit
from pillion_sidecar.arena import segment as segment_module
from pillion_sidecar.arena.growth import SPARE_BYTES, Growth
from pillion_sidecar.arena.segment import Segment
from pillion_sidecar.arena.slots import Leftover, Save, SaveState, SlotTable
from pillion_sidecar.session.record import Record
from pillion_sidecar.session.state import State

_log = logging.getLogger(__name__)

STRIDE_STEP_BYTES: Final = 2 * 1024**2
"""Alignment of slots: a huge page, in case the tmpfs uses them."""
DEFAULT_LIMIT_SHARE: Final = 0.5
"""Share of its tmpfs that the arena may take without staging.sizeLimit. (The kernel's default size of a tmpfs is half of memory.)"""
ADDRESS_SPACE_BYTES: Final = 2**45
"""Addresses for all slots of a pod: a quarter of a process's addresses (47 bits). Each slot may need the whole limit."""

MAX_EPOCH: Final = 2**32 - 1
"""Largest epoch. A slot's header has 32 bits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The session, the ranks of the job and of this pod, and the root, as the first hello of the session names them."""

    session: str
    run_id: str
    attempt: int
    world_size: int
    pods: tuple[tuple[int, ...], ...]
    local_ranks: tuple[int, ...]
    placement: str = ""
    """Digest of which pod has which ranks. Empty: a client that does not send it."""
    root: str
    store_mode: control.MeetingStore | None
    store: tuple[str, int] | None

    def moved_from(self, before: Identity) -> bool:
        """Whether a rank of the job is in another pod than before. All pods that were there before get the same answer."""
        placement = (self.placement, self.world_size, self.pods, self.local_ranks)
        return placement != (before.placement, before.world_size, before.pods, before.local_ranks)

    @classmethod
    def from_hello(cls, hello: control.Hello, *, root: str) -> Identity:
        """
        Return the identity in a hello.

        Raises:
            BadFrame: the hello contradicts itself.
        """
        local = next((pod for pod in hello.pods if hello.rank in pod), None)
        if local is None:
            raise messages.BadFrame(f"hello: rank {hello.rank} is in none of the pods {reprlib.repr(hello.pods)}")
        ranks = sorted(rank for pod in hello.pods for rank in pod)
        # The length is compared first, because a list of `world_size` numbers might not fit into memory.
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


class PodArena:
    """
    The arena of the pod. See the module.

    Args:
        runtime_dir: directory of the segment files.
        identity: the session and its ranks.
        session_policy: the policy in force.
        shared: whether the trainers may be another user than this process (an injected sidecar).

    Owns: the segment files of its local ranks, until `remove`.

    Raises:
        ArenaExhausted: the tmpfs has no room for an empty segment.
        SidecarError: a limit of this process forbids a segment of this length.
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
        limit_name = (
            "staging.sizeLimit"
            if session_policy.staging.size_limit_bytes
            else "half of its tmpfs (staging.sizeLimit is not set)"
        )
        self.bounds = {limit_name: self.limit_bytes, "the tmpfs that it is on": tmpfs_bytes}
        """Origin of a limit, as users know it -> maximum bytes of the arena."""
        self.rooms: dict[int, int] = {}
        """Rank -> largest room for a slot that it has requested, bytes."""
        self.segments: dict[int, Segment] = {}
        self.near: dict[int, int] = {}
        """Rank -> process id of its trainer. The rank's memory should be on that process's node."""
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
        """(generation, epoch) of the saves that begin now. None until the executor has opened the session."""
        self.strangers: dict[int, channel.Stranger] = {}
        """Slot -> a whole snapshot of another world, which these ranks cannot load."""
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
        """Unlink segments of local ranks that this session does not have (a smaller world), to free their memory."""
        own = {os.path.basename(segment.path) for segment in self.segments.values()}
        for name in os.listdir(self.runtime_dir):
            if name.startswith("segment-") and name not in own:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.runtime_dir, name))

    def _adopt_saves(self) -> list[Save]:
        """Add the whole snapshots in the arena to the slot table, and return them, oldest first. Free torn slots."""
        leftovers = []
        ranks = self.identity.local_ranks
        for slot in range(self.policy.staging.slots):
            headers: dict[int, arena.SlotHeader] = {}
            for rank in ranks:
                with contextlib.suppress(ValueError):
                    headers[rank] = self.segments[rank].read_header(slot)
            first = headers.get(ranks[0])
            stranger = next((header for header in headers.values() if self._is_strange(header)), None)
            if stranger is not None:
                # Kept until its slot is needed. A later start of trainers in that world can adopt it.
                self.strangers[slot] = channel.Stranger(
                    step=stranger.step,
                    world_size=stranger.world_size,
                    order=(stranger.generation, stranger.epoch),
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
            # With several pods, snapshots of dead trainers need no write now: the load agrees on one of them, and a rescue persists it.
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
                # By the clock since the boot, as the wall clock may have jumped. The arena never outlives the boot.
                sealed_ns=time.time_ns() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - first.sealed_ns),
            )
            leftovers.append((first.sealed_ns, leftover))
        return self.table.adopt(leftover for _, leftover in sorted(leftovers, key=lambda entry: entry[0]))

    def _is_strange(self, header: arena.SlotHeader) -> bool:
        """Whether the slot is part of a complete snapshot of another world that is in memory only."""
        sealed = header.state in (arena.SlotState.SEALED, arena.SlotState.PERSISTING)
        # The digests are computed after every rank of the pod has sealed.
        complete = header.digests_for == header.sequence != 0
        stored = arena.Flag.PERSISTED in header.flags
        return sealed and complete and not stored and header.world_size != self.identity.world_size

    # --- slots -----------------------------------------------------------------------------------------------------

    def grow(self, rank: int, slot: int, room_bytes: int) -> int:
        """
        Grow a rank's slot to at least `room_bytes`. Return its capacity, bytes. Called from: a thread.

        Blocks: see `Growth.grow`.

        Raises:
            ArenaExhausted: the limit of the policy or of the container is reached, or the tmpfs is full.
            SidecarError: the executor, which grows a slot for a load, did not end its turn in time.
        """
        with affinity.beside(self.near.get(rank, 0)):
            return self._growth.grow(rank, slot, room_bytes)

    def date(self, order: tuple[int, int]) -> None:
        """
        Set the (generation, epoch) of the saves of this session, including those claimed before it was known.

        A save of an earlier session without a generation counts as newer than all checkpoints committed before this session.
        """
        self.order = order
        self.table.date_all(order, inherited=(order[0] - 1, MAX_EPOCH))

    def set_aside(self, loaded: tuple[tuple[int, int], int]) -> None:
        """Mark snapshots newer than the loaded checkpoint as set aside. `loaded`: its (generation, epoch), and its step."""
        for save in self.table.set_aside(loaded):
            at_work = save.state is SaveState.PERSISTING
            self.mark(save, arena.SlotState.PERSISTING if at_work else arena.SlotState.SEALED)

    def begin_fill(self, rank: int, slot: int, *, persist: bool) -> None:
        """Mark a rank's slot as being filled, with a new sequence number."""
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

    def held_by_all(self, step: int, *, persisted: bool) -> None:
        """
        Record that every pod has `step`, as a load from memory or a rescue has shown.

        Otherwise a pod that was restarted before it learned this would keep an older snapshot for its peers, and run out of slots.

        Args:
            step: the step of the snapshot.
            persisted: whether it is also committed on storage.
        """
        save = self.table.held_by_all(step, persisted=persisted)
        if save is not None:
            self.mark(save, arena.SlotState.SEALED, persisted=persisted, concluded=True)

    def mark(self, save: Save, state: arena.SlotState, *, persisted: bool = False, concluded: bool = False) -> None:
        """Write a save's state into its slots, for a later sidecar that adopts the arena."""
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

    def opening(self, own_settings: settings.Settings, record: Record, state: State) -> channel.Open:
        """What the executor needs to open this session, of which an executor before it may have brought about what `record` says."""
        identity = self.identity
        store: channel.StoreAt | None = None
        if identity.store_mode is not None:
            host, port = identity.store or (os.environ.get("PILLION_POD_IP", "127.0.0.1"), 0)
            store = channel.StoreAt(kind=identity.store_mode, host=host, port=port)
        return channel.Open(
            session=identity.session,
            name=name_of(own_settings, identity),
            owner=owner_of(own_settings),
            owner_silent_s=own_settings.owner_silent_s,
            run_id=identity.run_id,
            world_size=identity.world_size,
            pods=identity.pods,
            local_ranks=identity.local_ranks,
            root=identity.root,
            storage_ca=own_settings.storage_ca,
            store=store,
            local=copies_of(own_settings, self.policy, identity.root),
            segments={rank: segment.path for rank, segment in self.segments.items()},
            limit_bytes=self.limit_bytes,
            policy=policy.dump(self.policy),
            peer_timeout_s=own_settings.peer_timeout_s,
            persist_timeout_s=own_settings.persist_timeout_s,
            storage_timeout_s=own_settings.storage_timeout_s,
            store_timeout_s=own_settings.store_timeout_s,
            write_threads=own_settings.write_threads,
            state=state,
            before=record.before,
            generation=record.generation,
            signals=record.signals,
            counts=record.counts,
        )

    def record(self) -> Record:
        """Return the session record, from which a successor of this sidecar continues the session."""
        identity = self.identity
        hello = control.Hello(
            session=identity.session,
            run_id=identity.run_id,
            attempt=identity.attempt,
            rank=identity.local_ranks[0],
            world_size=identity.world_size,
            pods=identity.pods,
            placement=identity.placement,
            store_mode=identity.store_mode,
            store=identity.store,
        )
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
        """Close and unlink the segments. The caller needs none of their saves any more."""
        self.close()
        for segment in self.segments.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(segment.path)


def copies_of(own_settings: settings.Settings, session_policy: policy.Policy, root: str) -> str:
    """Return the directory on the node's disk for the copies of a root's saves; empty: there is none."""
    local = session_policy.storage.local
    directory = own_settings.local_dir or (local.path if local is not None and local.path is not None else "")
    if not directory or not root or session_policy.storage.writer is not None:
        return ""
    # All jobs of a node may share the directory: a hostPath.
    return os.path.join(directory, hashlib.blake2b(root.encode(), digest_size=12).hexdigest())


def name_of(own_settings: settings.Settings, identity: Identity) -> str:
    """Return the name of this training for people: job and pod. Without a cluster: run and host."""
    if own_settings.pod_name:
        return f"{owner_of(own_settings) or identity.run_id} (pod {own_settings.pod_namespace}/{own_settings.pod_name})"
    return f"run {identity.run_id!r} on {socket.gethostname()} (sidecar's pid {os.getpid()})"


def owner_of(own_settings: settings.Settings) -> str:
    """Return kind, name and UID (if known) of the object that owns the pod. Empty without a cluster."""
    uid = f"({own_settings.owner_uid})" if own_settings.owner_uid else ""
    return " ".join(word for word in (own_settings.job_kind, own_settings.job_name, uid) if word)


def stride_bytes(limit_bytes: int, *, num_slots: int) -> int:
    """Return the address range of one slot, bytes: the whole limit, or less if ADDRESS_SPACE_BYTES is too small for all slots."""
    whole_limit = -(-limit_bytes // STRIDE_STEP_BYTES) * STRIDE_STEP_BYTES + STRIDE_STEP_BYTES
    return min(whole_limit, ADDRESS_SPACE_BYTES // num_slots // STRIDE_STEP_BYTES * STRIDE_STEP_BYTES)
