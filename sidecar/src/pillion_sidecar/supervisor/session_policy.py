"""
The policy of this sidecar's session: reads it when the session begins, and takes over the controller's changes.

Called from: `supervisor.sessions` (reading), the supervisor (policies that the controller or the coordinator's sidecar sends).
`supervisor.effective_policy`, which is pure, decides which fields a change may touch.
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
"""Interval at which a changed policy is sent again, for pods and ranks that missed it while their sidecar or executor was replaced."""


class SessionPolicy:
    """The policy of the current session. See the module."""

    def __init__(self, own_settings: settings.Settings, root: RootAccess, trainers: Trainers) -> None:
        self._settings, self._root, self._trainers = own_settings, root, trainers
        self._in_force = EffectivePolicy()
        self._started_with: policy.Policy | None = None
        """The policy of the environment or of the hello, without later changes."""
        self._sent_s = -math.inf
        self._sent_to = ""
        self._bad_generation = -1
        self._auto_steps: int | None = None

    async def read(self, source: Mapping[str, object] | str) -> policy.Policy:
        """
        Return the policy of a document, or of the file with this path.

        Blocks: for a file up to root_access.ROOT_TIMEOUT_S, in another thread than the event loop's.

        Raises:
            SettingsError: the source is not a valid policy.
            SidecarError: the storage with the file hangs.
        """
        if isinstance(source, str) and settings.is_policy_file(source):
            return await self._root.look_at(source, lambda: settings.read_policy(source))
        return settings.read_policy(source)

    async def begin(self, source: Mapping[str, object] | str) -> None:
        """Start a session with the policy of `source`. Blocks and raises as `read`."""
        self._started_with = await self.read(source)

    @property
    def policy_generation(self) -> int:
        """Generation of the CheckpointPolicy in force. 0: the policy of the start."""
        return self._in_force.policy_generation

    def current(self) -> policy.Policy:
        """
        Return the policy in force.

        Raises:
            SettingsError: no session has begun, and the policy in the settings is invalid.
        """
        return self._in_force.current(self._require())

    def _require(self) -> policy.Policy:
        if self._started_with is None:
            self._started_with = settings.read_policy(self._settings.policy)
        return self._started_with

    def propose(self, spec: Mapping[str, Any], generation: int) -> None:
        """
        Send the CheckpointPolicy that the controller has sent to every pod, if it is new or some pods may have missed it.

        Never raises: an invalid policy is logged, once for each generation.
        """
        try:
            proposed = policy.parse(spec, embedded=True)
        except policy.PolicyError as err:
            if generation != self._bad_generation:
                self._bad_generation = generation
                _log.error("generation %d of the policy cannot be used: %s", generation, err)
            return
        current = self.current()
        started_with = self._require()
        deferred = self._in_force.deferred_fields(proposed, started_with)
        if deferred:
            _log.warning(
                "the policy's %s changed: a running pod keeps its own until it is replaced", ", ".join(sorted(deferred))
            )
        differs = effective_policy.document(proposed) != effective_policy.document(current)
        session = self._trainers.pod.identity.session if self._trainers.pod is not None else ""
        overdue = time.monotonic() - self._sent_s >= POLICY_REPEAT_S or session != self._sent_to
        if differs or generation != self._in_force.policy_generation or (self._in_force.changed and overdue):
            self._sent_s, self._sent_to = time.monotonic(), session
            document = effective_policy.document(proposed)
            self._trainers.signal(signals.PolicySent(policy_generation=generation, policy=document))

    def apply(self, sent: signals.PolicySent) -> None:
        """
        Put a policy that the coordinator's sidecar has sent in force, and send it to the trainers of this pod.

        Raises:
            PolicyError: this release cannot read the policy.
        """
        changed, generation = policy.parse(sent.policy, embedded=True), sent.policy_generation
        started_with = self._require()
        if self._in_force.apply(changed, generation, started_with):
            _log.info("generation %d of the policy is in force", generation)
        if self._trainers.pod is not None:
            self._trainers.pod.policy = self._in_force.current(started_with)
        if self._in_force.changed:
            self._trainers.broadcast(self._changed(changed))

    def pace(self, auto_steps: int | None) -> None:
        """
        Let rank 0 announce the automatic period, if its trainer is connected. Announced again, it finds ranks that missed it.

        Args:
            auto_steps: the period in steps. None: there is none yet.
        """
        self._auto_steps = auto_steps
        decider = self._trainers.clients.get(0)
        if decider is not None:
            decider.send(self._changed(self.current()))

    def _changed(self, changed: policy.Policy) -> events.PolicyChanged:
        document = effective_policy.document(changed)
        return events.PolicyChanged(policy=effective_policy.for_trainers(document, self._auto_steps))
