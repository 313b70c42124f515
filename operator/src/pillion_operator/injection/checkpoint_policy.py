"""
The whole of: a CheckpointPolicy object as the injection needs it: the spec, and what identifies its version.

Called from: every reader of policies, from the API server or from a file.
Must never: raise for a policy that cannot be used; that is a decision about pods, and the controller's condition.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pillion.wire import policy


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPolicy:
    """A CheckpointPolicy object."""

    name: str
    """Empty: a bare spec from a file, which goes with any name."""
    uid: str = ""
    generation: int = 0
    spec: policy.Policy | None
    """None: the policy is invalid; `problems` lists why."""
    problems: tuple[str, ...] = ()
    failure_policy: policy.FailurePolicy | None = None
    """Its `failurePolicy`, even where the rest is invalid. None: not an allowed value."""
    claim_modes: tuple[str, ...] = ()
    """Access modes of the claim that the spec names. Empty: not known."""


def from_object(document: Mapping[str, Any]) -> CheckpointPolicy:
    """A CheckpointPolicy from an object as the API server gives it, or from a bare spec."""
    metadata = document.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    spec, problems = None, tuple[str, ...]()
    try:
        spec = policy.parse(document, embedded=False)
    except policy.PolicyError as err:
        problems = tuple(str(problem) for problem in err.problems)
    failure_policy = spec.failure_policy if spec else None
    if spec is None:
        with contextlib.suppress(ValueError, AttributeError):
            failure_policy = policy.FailurePolicy(document.get("spec", document).get("failurePolicy"))
    return CheckpointPolicy(
        name=str(metadata.get("name") or ""),
        uid=str(metadata.get("uid") or ""),
        generation=metadata.get("generation") or 0,
        spec=spec,
        problems=problems,
        failure_policy=failure_policy,
        claim_modes=_claim_modes(document, spec),
    )


def _claim_modes(document: Mapping[str, Any], spec: policy.Policy | None) -> tuple[str, ...]:
    """Access modes from the status, where the controller has read the claim that the spec names now."""
    wanted = spec.storage.persistent_volume_claim if spec else None
    status = document.get("status")
    claim = status.get("claim") if isinstance(status, Mapping) else None
    if wanted is None or not isinstance(claim, Mapping) or claim.get("name") != wanted.claim_name:
        return ()
    modes = claim.get("accessModes")
    return tuple(str(each) for each in modes) if isinstance(modes, list) else ()
