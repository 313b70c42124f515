"""
The policy of this sidecar's session: read when it begins, changed by the controller while it goes on.

Called from: `supervisor.sessions` (reads it), the supervisor (what the controller and the coordinator's sidecar send).
What a change may touch is decided by `supervisor.effective_policy`, which is pure.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any, Final

from pillion.wire import events, policy
from pillion_sidecar import settings
from pillion_sidecar.supervisor import effective_policy, signals
from pillion_sidecar.supervisor.effective_policy import EffectivePolicy
from pillion_sidecar.supervisor.root_access import RootAccess
from pillion_sidecar.supervisor.trainers import Trainers

_log = logging.getLogger(__name__)

POLICY_REPEAT_S: Final = 60.0
"""How often a policy that changed is told again, to pods and ranks that missed it: their sidecar or executor was being replaced."""


class SessionPolicy:
    """See the module."""

    def __init__(self, own_settings: settings.Settings, root: RootAccess, trainers: Trainers) -> None:
        self._settings, self._root, self._trainers = own_settings, root, trainers
        self._in_force = EffectivePolicy()
        self._started_with: policy.Policy | None = None
        """The policy of the environment, or of the hello; without what the controller sent since."""
        self._sent_s = -math.inf
        self._sent_to = ""
        self._bad_generation = -1

    async def read(self, source: Mapping[str, object] | str) -> policy.Policy:
        """
        The policy of a document, or of a file.

        Blocks: a file is read beside the loop, within root_access.ROOT_TIMEOUT_S.

        Raises:
            SettingsError: it is none.
            SidecarError: it is a file, and the storage that has it hangs.
        """
        if isinstance(source, str) and settings.is_policy_file(source):
            return await self._root.look_at(source, lambda: settings.read_policy(source))
        return settings.read_policy(source)

    async def begin(self, source: Mapping[str, object] | str) -> None:
        """A session starts with the policy of `source`. Blocks and raises as `read`."""
        self._started_with = await self.read(source)

    @property
    def generation(self) -> int:
        """Of the CheckpointPolicy in force; 0: as the sidecar was started."""
        return self._in_force.generation

    def now(self) -> policy.Policy:
        """
        The policy in force.

        Raises:
            SettingsError: none was read yet, and the one in the settings is none.
        """
        return self._in_force.over(self._require())

    def _require(self) -> policy.Policy:
        if self._started_with is None:
            self._started_with = settings.read_policy(self._settings.policy)
        return self._started_with

    def propose(self, spec: Mapping[str, Any], generation: int) -> None:
        """
        The controller has sent the CheckpointPolicy as it is now: a change goes to every pod, and is sent again to who may have missed it.

        Never raises: a policy that cannot be used is logged, once for each generation.
        """
        try:
            proposed = policy.parse(spec, embedded=True)
        except policy.PolicyError as err:
            if generation != self._bad_generation:
                self._bad_generation = generation
                _log.error("generation %d of the policy cannot be used: %s", generation, err)
            return
        now = self.now()
        started_with = self._require()
        later = self._in_force.later(proposed, started_with)
        if later:
            _log.warning(
                "the policy's %s changed: a running pod keeps its own until it is replaced", ", ".join(sorted(later))
            )
        differs = effective_policy.document(proposed) != effective_policy.document(now)
        session = self._trainers.pod.identity.session if self._trainers.pod is not None else ""
        overdue = time.monotonic() - self._sent_s >= POLICY_REPEAT_S or session != self._sent_to
        if differs or generation != self._in_force.generation or (self._in_force.changed and overdue):
            self._sent_s, self._sent_to = time.monotonic(), session
            document = effective_policy.document(proposed)
            self._trainers.signal(signals.PolicySent(generation=generation, policy=document))

    def take(self, sent: signals.PolicySent) -> None:
        """
        The coordinator's sidecar has sent the policy for all pods: it holds from here on, and the trainers of this pod learn of it.

        Raises:
            PolicyError: the policy is none of this release.
        """
        taken, generation = policy.parse(sent.policy, embedded=True), sent.generation
        started_with = self._require()
        if self._in_force.take(taken, generation, started_with):
            _log.info("generation %d of the policy is in force", generation)
        if self._trainers.pod is not None:
            self._trainers.pod.policy = self._in_force.over(started_with)
        if self._in_force.changed:
            document = effective_policy.for_trainers(effective_policy.document(taken))
            self._trainers.broadcast(events.PolicyChanged(policy=document))
