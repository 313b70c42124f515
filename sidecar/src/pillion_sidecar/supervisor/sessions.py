"""
Sessions of this sidecar: one is opened by a trainer's hello, taken over from a sidecar before this one, or followed by the next.

Called from: the supervisor. The current session's arena is held by `supervisor.trainers`; only this module begins and ends it.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from pillion.errors import PillionError, SettingsError
from pillion.wire import control
from pillion_sidecar.arena.pod_arena import Identity, PodArena, check_root, name_of
from pillion_sidecar.checkpoint import ownership
from pillion_sidecar.session import record as record_module
from pillion_sidecar.settings import Settings
from pillion_sidecar.supervisor.executor_client import ExecutorClient
from pillion_sidecar.supervisor.persister import Persister
from pillion_sidecar.supervisor.root_access import ROOT_TIMEOUT_S, RootAccess
from pillion_sidecar.supervisor.server import TrainerConnection
from pillion_sidecar.supervisor.session_policy import SessionPolicy
from pillion_sidecar.supervisor.trainers import Trainers

_log = logging.getLogger(__name__)

SETTLE_SHARE: Final = 1 / 4
"""Of the bound for peers: how long trainers that come back wait for what several pods were writing together."""
MOVED_SHARE: Final = 3 / 4
"""The same where a rank has moved to another pod, if the drain's bound is not shorter: the pods that are new wait for us in the load that
comes next, for all of the bound for peers."""


class Sessions:
    """See the module."""

    def __init__(
        self,
        own_settings: Settings,
        root: RootAccess,
        session_policy: SessionPolicy,
        trainers: Trainers,
        executor_client: ExecutorClient,
        persister: Persister,
    ) -> None:
        self._settings = own_settings
        self._root, self._policy = root, session_policy
        self._trainers, self._executor_client, self._persister = trainers, executor_client, persister

    async def adopt(self) -> None:
        """Go on with the session of a sidecar before this one: what it left in the arena is persisted, trainers or not."""
        record = record_module.read(self._settings.runtime_dir)
        if record is None:
            return
        try:
            given, kept = self._settings.policy, record.policy
            source = (kept or given) if self._settings.embedded else (given or kept)
            await self._policy.begin(source)
            identity = Identity.from_hello(control.Hello.from_document(record.hello), root=record.root)
            pod = PodArena(
                self._settings.runtime_dir,
                identity,
                self._policy.now(),
                shared=not self._settings.embedded,
            )
        except (OSError, ValueError, PillionError) as err:
            _log.warning("cannot continue session %s of an earlier sidecar: %s", record.session, err)
            return
        _log.warning(
            "continuing session %s of an earlier sidecar with %d snapshots in memory", record.session, len(pod.adopted)
        )
        self._trainers.adopt_session(pod, record.trainers)
        self._executor_client.session(pod, record)
        self._persister.wake()

    async def open(self, client: TrainerConnection, hello: control.Hello) -> PodArena:
        """
        The arena of the session that a hello names: the current one, or a new one in its place.

        Blocks: for looks at the root, each within root_access.ROOT_TIMEOUT_S, and until the session before has brought to storage what its
        successor needs.

        Raises:
            UsageError: another training has the sidecar, or the root; with both names.
            SettingsError: the policy or the root cannot be used.
            SidecarError: the storage, or this process's memory, does not allow it.
        """
        trainers = self._trainers
        if trainers.pod is not None and trainers.pod.identity.session == hello.session:
            return trainers.pod
        if trainers.clients:
            raise trainers.taken(client)
        root = self._settings.root or hello.root
        # In a pod the injected one holds. Without a cluster the variable is the trainer's own, and its argument wins over it.
        given: Any = hello.policy
        source = (given or self._settings.policy) if self._settings.embedded else (self._settings.policy or given)
        await self._policy.begin(source)
        problems = await self._root.look_at(root, lambda: check_root(root)) if root else []
        if problems:
            raise SettingsError(problems)
        identity = Identity.from_hello(hello, root=root)
        dead = await self._look_for_owner(root, identity) if root and len(identity.pods) == 1 else ""
        if trainers.pod is not None:
            await self._finish(trainers.pod, identity)
            # Before the next one is made, which may fail.
            trainers.end_session()
        pod = PodArena(self._settings.runtime_dir, identity, self._policy.now(), shared=not self._settings.embedded)
        trainers.begin_session(pod)
        self._executor_client.session(pod, succeeds=dead)
        self._persister.wake()
        return pod

    async def _look_for_owner(self, root: str, identity: Identity) -> str:
        """
        Tell the trainers at once when another training lives on their root; the session that owned it and does not live. Of several pods
        the coordinator's executor finds it out, as the others may know the owner for an older attempt of theirs.

        Raises:
            UsageError: with both names.
        """
        own = self._settings

        def look() -> str:
            served = {identity.session, *self._executor_client.served()}
            generation = ownership.wait_until_free(
                root, name=name_of(own, identity), served=served, silent_s=own.owner_silent_s
            )
            owner = ownership.read(root, generation)
            return owner.session if owner is not None else ""

        return await self._root.look_at(root, look, ROOT_TIMEOUT_S + own.owner_silent_s + ownership.DRAIN_MOST_S)

    async def _finish(self, before: PodArena, successor: Identity) -> None:
        """
        What the session before left comes first: the newest snapshot must be where its successor looks for it.

        Several pods that come back as they were look for it in memory, and what they were writing together may never end, as others
        have gone on: it is persisted after the load. Where a rank has moved to another pod, its snapshot can reach it through storage
        only; but a pod that is not there any more may be lost, and its part will never come.
        """
        if len(before.identity.pods) == 1:
            await self._persister.quiet(self._settings.persist_timeout_s)
        elif successor.moved_from(before.identity):
            bound_s = min(before.policy.drain.timeout_seconds, self._settings.peer_timeout_s * MOVED_SHARE)
            if not await self._persister.quiet(bound_s):
                _log.error(
                    "ranks have moved to other pods; older saves did not reach storage within %.0f s and are abandoned",
                    bound_s,
                )
        else:
            await self._persister.settled(self._settings.peer_timeout_s * SETTLE_SHARE)
        self._persister.forget_calls()
