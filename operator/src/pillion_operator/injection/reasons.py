"""
The whole of: the reasons to inject a pod, leave it alone or refuse it, each with a code and a sentence.

Called from: the injection, which puts a reason in each decision; events, metrics and logs, which show the same one.
Must never: hold anything about one pod; the decision's details do.
"""

from enum import StrEnum


class Reason(StrEnum):
    """A reason. Its value is the code in events (`reason`), metrics (label `reason`), logs and the documentation."""

    sentence: str
    """The meaning, for a person."""

    def __new__(cls, code: str, sentence: str) -> "Reason":
        member = str.__new__(cls, code)
        member._value_ = code
        member.sentence = sentence
        return member

    INJECTED = "Injected", "The sidecar was injected."
    NOT_OPTED_IN = "NotOptedIn", "The pod has no annotation pillion.dev/policy, so Pillion leaves it alone."
    OPTED_OUT = "OptedOut", 'The pod opted out with the annotation pillion.dev/inject: "false".'
    MIRROR_POD = "MirrorPod", "The pod mirrors a static pod of its node, which no webhook can change."
    POLICY_SUSPENDED = "PolicySuspended", "The policy is suspended; set spec.suspend to false to have pods injected."
    POLICY_MISSING = (
        "PolicyMissing",
        "No CheckpointPolicy of that name is in the pod's namespace; create it; the pod's controller then tries again.",
    )
    POLICY_INVALID = "PolicyInvalid", "The CheckpointPolicy is invalid; its condition Ready says why."
    BAD_ANNOTATION = "BadAnnotation", "An annotation of the pod has a value that is not allowed."
    JOB_UNCLEAR = (
        "JobUnclear",
        "The training that the pod belongs to is ambiguous; set the annotation pillion.dev/job-id.",
    )
    BAD_SIDECAR_CONTAINER = (
        "BadSidecarContainer",
        "The pod declares a container pillion-sidecar with fields that are not allowed.",
    )
    RESERVED_NAME = "ReservedName", "The pod uses a name or a path that is reserved for injection."
    UNSUPPORTED_POD = "UnsupportedPod", "The pod cannot run a sidecar."
    INTERNAL_ERROR = "InternalError", "Injection failed because of an internal error; please report it."
