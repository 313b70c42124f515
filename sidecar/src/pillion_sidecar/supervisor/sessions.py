"""
The sessions of this sidecar: opens one at a trainer's hello, adopts one from an earlier sidecar, and replaces one by the next.

Called from: the supervisor. `supervisor.trainers` has the arena of the current session. Only this module begins and ends a session.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from pillion.errors import PillionError, SettingsError
from pillion.wire import control
from pillion_sidecar.arena.pod_arena import Identity, PodArena, name_of
from pillion_sidecar.checkpoint import ownership
from pillion_sidecar.session import record as record_module
from pillion_sidecar.settings import Settings
from pillion_sidecar.storage.folder import Folder
from pillion_sidecar.supervisor.executor_client import ExecutorClient
from pillion_sidecar.supervisor.persister import Persister
from pillion_sidecar.supervisor.root_access import ROOT_TIMEOUT_S, RootAccess
from pillion_sidecar.supervisor.server import TrainerConnection
from pillion_sidecar.supervisor.session_policy import SessionPolicy
from pillion_sidecar.supervisor.trainers import Trainers

_log = logging.getLogger(__name__)

SETTLE_SHARE: Final = 1 / 4
"""Fraction of peer_timeout_s for finishing old saves of several pods, when the same pods start a new session."""
MOVED_SHARE: Final = 3 / 4
"""Fraction of peer_timeout_s for finishing old saves, when ranks have moved to other pods (drain.timeoutSeconds if that is shorter). The new
pods wait for this pod in their first load, up to peer_timeout_s, so this is less."""


class Sessions:
    """Begins and ends the sessions of this sidecar. See the module."""

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
        """Continue the session of an earlier sidecar, if there is one. Its saves in the arena are persisted, even without trainers."""
        record = record_module.read(self._settings.runtime_dir)
        if record is None:
            return
        try:
            injected, recorded = self._settings.policy, record.policy
            source = (recorded or injected) if self._settings.embedded else (injected or recorded)
            await self._policy.begin(source)
            identity = Identity.from_hello(record.hello, root=record.root)
            pod = PodArena(
                self._settings.runtime_dir,
                identity,
                self._policy.current(),
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
        Return the arena of the session that a hello names. If it is not the current session, it replaces that session.

        Blocks: for reads of the root, each up to root_access.ROOT_TIMEOUT_S, and until the saves that the new session needs are on storage.

        Raises:
            UsageError: another training uses the sidecar or the root. Names both.
            SettingsError: the policy is invalid, or the root cannot be used.
            SidecarError: the storage hangs, or the arena cannot be created.
        """
        trainers = self._trainers
        if trainers.pod is not None and trainers.pod.identity.session == hello.session:
            return trainers.pod
        if trainers.clients:
            raise trainers.taken(client)
        root = self._settings.root or hello.root
        # In a pod, the injected policy applies. Without a cluster, the trainer's argument takes precedence over its environment variable.
        of_hello: Any = hello.policy
        source = (of_hello or self._settings.policy) if self._settings.embedded else (self._settings.policy or of_hello)
        await self._policy.begin(source)
        folder = self._root.open(root, self._policy.current()) if root else None
        problems = await self._root.look_at(root, folder.check) if folder is not None else []
        if problems:
            raise SettingsError(problems)
        identity = Identity.from_hello(hello, root=root)
        dead = await self._look_for_owner(folder, identity) if folder is not None and len(identity.pods) == 1 else ""
        if trainers.pod is not None:
            await self._finish(trainers.pod, identity)
            # Ended first, because creating the next arena may fail.
            trainers.end_session()
        pod = PodArena(self._settings.runtime_dir, identity, self._policy.current(), shared=not self._settings.embedded)
        trainers.begin_session(pod)
        self._executor_client.session(pod, succeeds=dead)
        self._persister.wake()
        return pod

    async def _look_for_owner(self, root: Folder, identity: Identity) -> str:
        """
        Check that no other living training owns the root. Return the dead session that owned it, empty if there is none.

        Only for a job of one pod. In a job of several pods, the coordinator's executor checks it, because only the coordinator knows whether
        the owner is an older attempt of this job.

        Raises:
            UsageError: another training owns the root. Names both.
        """
        own = self._settings

        def look() -> str:
            served = {identity.session, *self._executor_client.served()}
            generation = ownership.wait_until_free(
                root, name=name_of(own, identity), served=served, silent_s=own.owner_silent_s
            )
            owner = ownership.read(root, generation)
            return owner.session if owner is not None else ""

        silent_s = ownership.rhythm(root, own.owner_silent_s).silent_s
        return await self._root.look_at(str(root), look, ROOT_TIMEOUT_S + silent_s + ownership.MAX_DRAIN_S)

    async def _finish(self, before: PodArena, successor: Identity) -> None:
        """
        Finish the saves of the previous session, so that the load of the next one finds the newest snapshot.

        A job of one pod waits until they are on storage. Several pods with the same ranks as before load from memory. They wait only briefly,
        because other pods may already serve the next session; the snapshot is persisted after the load. If ranks have moved to other pods,
        they can load their snapshots only from storage. The wait is bounded, because a lost pod never writes its part.
        """
        if len(before.identity.pods) == 1:
            await self._persister.quiet(self._settings.persist_timeout_s, uploads=False)
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
