"""
The whole of: the AdmissionReview: reading one, and encoding a decision as its response.

Called from: `server`, with what came and what was decided.
Must never: wait, read a clock, or raise for a decision. `BadReview` is for what is no question about a pod.
Source: Kubernetes documentation, "Dynamic Admission Control"; k8s.io/api/admission/v1.
"""

import base64
import json
from dataclasses import dataclass
from typing import Any, Final

from pillion_operator.injection import decide, pods, shape
from pillion_operator.injection.pods import Json
from pillion_operator.injection.reasons import Reason

API_VERSION: Final = "admission.k8s.io/v1"
DENIED: Final = 403
"""HTTP status of a refused pod. The pod's controller retries with growing pauses."""
_MAX_MESSAGE: Final = 4000
"""Maximum characters of a refusal; an invalid policy may have a hundred problems."""
_MAX_WARNING: Final = 256
"""Maximum characters of a warning. The API server truncates warnings that are too long in total; kubectl shows one a line."""
_NOT_WORTH_A_WARNING: Final = frozenset({Reason.NOT_OPTED_IN, Reason.OPTED_OUT, Reason.MIRROR_POD})
"""Reasons that the pod's author chose, and that need no warning."""


class BadReview(Exception):
    """The body is not an AdmissionReview of the registered version; the text names the problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The request in a review."""

    uid: str
    namespace: str
    pod: Json | None
    """The pod as it would be made. None: it is not about the making of a pod, and nothing is to be done."""
    is_dry_run: bool


def read(body: bytes) -> Question:
    """
    Read a review.

    Raises:
        BadReview: the body is not a review.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as err:
        raise BadReview(f"not JSON: {err}") from err
    if not isinstance(document, dict) or document.get("kind") != "AdmissionReview":
        raise BadReview("not an AdmissionReview")
    if document.get("apiVersion") != API_VERSION:
        raise BadReview(f"apiVersion is {document.get('apiVersion')!r}; allowed: {API_VERSION}")
    request = document.get("request")
    if not isinstance(request, dict) or not isinstance(request.get("uid"), str):
        raise BadReview("request.uid is missing")
    kind = request.get("kind") or {}
    if not isinstance(kind, dict):
        raise BadReview("request.kind is no object")
    is_made = request.get("operation") == "CREATE" and not request.get("subResource")
    is_pod = is_made and (kind.get("group"), kind.get("version"), kind.get("kind")) == ("", "v1", "Pod")
    pod, namespace = request.get("object"), request.get("namespace")
    if isinstance(pod, dict) and isinstance(pod.get("metadata"), dict):
        # managedFields are half of many a pod. Injection does not use them, and dropping them saves copying them.
        pod["metadata"].pop("managedFields", None)
    if is_pod and not isinstance(pod, dict):
        raise BadReview("request.object is missing")
    return Question(
        uid=request["uid"],
        namespace=namespace if isinstance(namespace, str) else "",
        pod=pod if is_pod else None,
        is_dry_run=bool(request.get("dryRun")),
    )


def answer(question: Question, decision: decide.Decision | None) -> bytes:
    """
    The AdmissionReview that answers a question.

    Args:
        question: the request.
        decision: about its pod. None: there is no pod, and what there is stays as it is.
    """
    response: Json = {"uid": question.uid, "allowed": not isinstance(decision, decide.Deny)}
    if decision is not None:
        response["auditAnnotations"] = {"decision": name(decision), "reason": decision.reason.value}
    if isinstance(decision, decide.Deny):
        text = f"pillion: {decision.reason}: {decide.message(decision)}"
        response["status"] = {"code": DENIED, "reason": "Forbidden", "message": _clip(text, _MAX_MESSAGE)}
    elif isinstance(decision, decide.Skip) and decision.reason not in _NOT_WORTH_A_WARNING:
        response["warnings"] = [
            _clip(f"pillion: {decision.reason}: the pod starts without a sidecar. {each}", _MAX_WARNING)
            for each in (decision.reason.sentence, *decision.details)
        ]
    elif isinstance(decision, decide.Inject) and decision.patch:
        patch = json.dumps(decision.patch, separators=(",", ":")).encode()
        response |= {"patchType": "JSONPatch", "patch": base64.b64encode(patch).decode()}
    if isinstance(decision, decide.Inject) and decision.warnings:
        response["warnings"] = [_clip(f"pillion: {each}", _MAX_WARNING) for each in decision.warnings]
    document = {"apiVersion": API_VERSION, "kind": "AdmissionReview", "response": response}
    return json.dumps(document, separators=(",", ":")).encode()


def name(decision: decide.Decision) -> str:
    """A decision's kind as metrics and logs have it: inject, skip or deny."""
    match decision:
        case decide.Inject():
            return "inject"
        case decide.Skip():
            return "skip"
        case decide.Deny():
            return "deny"


def about(question: Question) -> Json:
    """
    The object that an Event about this pod is on: the pod's controller, as the pod itself is not made yet.

    A pod of nobody is named by its own name, or by what its name will begin with.
    """
    # An object without a pod's metadata has no name to report.
    pod = question.pod if question.pod is not None and not shape.problem(question.pod, ("metadata",)) else {}
    owner: Any = pods.controller(pod)
    if owner:
        named = {key: str(owner.get(key) or "") for key in ("apiVersion", "kind", "name", "uid")}
    else:
        metadata = pod.get("metadata") or {}
        own = str(metadata.get("name") or metadata.get("generateName") or "pod")
        named = {"apiVersion": "v1", "kind": "Pod", "name": own, "uid": str(metadata.get("uid") or "")}
    return named | {"namespace": question.namespace}


def _clip(text: str, most: int) -> str:
    # A line break would end the HTTP header that carries a warning.
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
