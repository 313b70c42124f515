"""
The whole of: laying parts into a pod, and taking them out again.

Called from: `decide`, and `pillion-operator inject --remove`. `insert` on a pod that has the parts brings them up to date and leaves
everything in place, with the fields that other webhooks added to the injected containers; `remove` is the inverse.

Must never: touch what it did not add; reorder a list; change its arguments. A list that becomes empty is removed:
an empty list and none are the same to the API server.
"""

from collections.abc import Collection, Iterable
from typing import Any, Final

from pillion_operator.injection import annotations, pods, quantities, sidecar_spec, status
from pillion_operator.injection.pods import Json
from pillion_operator.injection.sidecar_spec import Parts

DEFAULT_GRACE_S: Final = 30
"""Source: Kubernetes API reference, PodSpec, terminationGracePeriodSeconds."""
_MESH_PROXIES: Final = ("istio-proxy", "linkerd-proxy")
_EVICTABLE: Final = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"
"""Annotation that lists volumes on a node's disk, separated by commas, which the cluster autoscaler may lose with the node."""
_OWN_CONTAINERS: Final = (sidecar_spec.SIDECAR, sidecar_spec.CLIENT)


def remove(pod: Json) -> Json:
    """A copy of the pod without what `insert` put into it."""
    return without(pod, status.read(pod))


def without(pod: Json, injected: status.Status | None) -> Json:
    """
    As `remove`, for a pod whose status was read.

    Args:
        pod: with what `insert` put into it, or without.
        injected: `status.read(pod)`. None: nothing is taken out.
    """
    bare = pods.copied(pod)
    if injected is None:
        return bare
    spec = bare["spec"]
    before = injected.before
    declared = [before.declared] if before.declared else []
    _set(spec, "initContainers", _merge(spec.get("initContainers"), declared, "name", _OWN_CONTAINERS))
    _set(spec, "volumes", _merge(spec.get("volumes"), [], "name", sidecar_spec.VOLUMES))
    for container in spec.get("containers") or []:
        _strip(container, before.python_path.get(container.get("name", "")))
    if spec.get("terminationGracePeriodSeconds") == before.grace_set_s:
        _set(spec, "terminationGracePeriodSeconds", before.grace_s)
    if spec.get("resources") == before.resources_set:
        _set(spec, "resources", pods.copied(before.resources))
    metadata = bare["metadata"]
    for key, name in (("annotations", annotations.STATUS), ("labels", annotations.INJECTED)):
        kept = {each: value for each, value in (metadata.get(key) or {}).items() if each != name}
        if text := kept.pop(_EVICTABLE, "") if key == "annotations" else "":
            others = [each for each in text.split(",") if each not in sidecar_spec.VOLUMES]
            kept |= {_EVICTABLE: ",".join(others)} if others else {}
        _set(metadata, key, kept)
    return bare


def insert(pod: Json, bare: Json, parts: Parts) -> tuple[Json, status.Before]:
    """The pod with the parts in it, without the annotation; and what `remove` needs. `bare` is `remove(pod)`."""
    done = pods.copied(pod)
    spec: Json = done["spec"]
    declared = pods.named(pods.init_containers(bare), sidecar_spec.SIDECAR)
    spec["initContainers"] = _insert_own(spec.get("initContainers") or [], parts)
    spec["volumes"] = _merge(spec.get("volumes"), parts.volumes, "name", sidecar_spec.VOLUMES)
    python_path: dict[str, str] = {}
    for container, untouched in zip(spec["containers"], pods.containers(bare), strict=True):
        if container["name"] in parts.trainers:
            literal = _lay_into_trainer(container, untouched, parts)
            if literal is not None:
                python_path[container["name"]] = literal
        else:
            _strip(container, None)
    grace_s = pods.spec(bare).get("terminationGracePeriodSeconds")
    spec["terminationGracePeriodSeconds"] = (DEFAULT_GRACE_S if grace_s is None else grace_s) + parts.drain_s
    resources = pods.spec(bare).get("resources")
    _set(spec, "resources", _raised(resources, parts.sidecar["resources"]))
    return done, status.Before(
        grace_s=grace_s,
        grace_set_s=spec["terminationGracePeriodSeconds"],
        resources=pods.copied(resources),
        resources_set=pods.copied(spec.get("resources")),
        python_path=python_path,
        declared=pods.copied(declared),
    )


def mark(pod: Json, record: status.Status, parts: Parts) -> None:
    """Write status annotation and label into a pod that `insert` made, and that none of its volumes on disk keeps a node alive."""
    metadata = pod["metadata"]
    before = metadata.get("annotations") or {}
    others = [each for each in before.get(_EVICTABLE, "").split(",") if each and each not in sidecar_spec.VOLUMES]
    on_disk = [
        each["name"] for each in parts.volumes if each.get("emptyDir", {"medium": "Memory"}).get("medium") is None
    ]
    metadata["annotations"] = before | {
        _EVICTABLE: ",".join([*others, *on_disk]),
        annotations.STATUS: status.dump(record),
    }
    metadata["labels"] = (metadata.get("labels") or {}) | {annotations.INJECTED: "true"}


def _insert_own(init_containers: list[Json], parts: Parts) -> list[Json]:
    """
    The init containers with the injected ones among them.

    Injected containers that exist stay in place. Otherwise the sidecar goes in front of the first init container that ends, so that it reads the
    last checkpoint while that one runs, and behind the native sidecars there: one of them may serve its volume (a FUSE driver's),
    and one its network (a mesh's proxy, which it stands behind wherever that is). The client goes right behind the sidecar.
    """
    result = [each for each in init_containers if parts.client or each.get("name") != sidecar_spec.CLIENT]
    where = {each.get("name"): index for index, each in enumerate(result)}
    if (at := where.get(sidecar_spec.SIDECAR)) is not None:
        result[at] = _keep_additions(result[at], parts.sidecar)
    else:
        proxies = [
            where[name] for name in _MESH_PROXIES if name in where and pods.is_native_sidecar(result[where[name]])
        ]
        ending = [index for index, each in enumerate(result) if not pods.is_native_sidecar(each)]
        at = max([min(ending, default=len(result)), *(each + 1 for each in proxies)])
        result.insert(at, pods.copied(parts.sidecar))
    if parts.client:
        where = {each.get("name"): index for index, each in enumerate(result)}
        if (at_client := where.get(sidecar_spec.CLIENT)) is not None:
            result[at_client] = _keep_additions(result[at_client], parts.client)
        else:
            result.insert(at + 1, pods.copied(parts.client))
    return result


def _keep_additions(current: Json, injected: Json) -> Json:
    """Return the injected container with the keys, variables and mounts that the pod's author or another webhook has added."""
    result = pods.copied(current)
    result.update(pods.copied(injected))
    for key, by in (("env", "name"), ("volumeMounts", "mountPath")):
        _set(result, key, _merge(current.get(key), injected.get(key) or [], by, ()))
    sources = current.get("envFrom") or []
    _set(result, "envFrom", [*sources, *(each for each in injected.get("envFrom") or [] if each not in sources)])
    if "livenessProbe" not in injected:
        result.pop("livenessProbe", None)
    return result


def _lay_into_trainer(container: Json, bare: Json, parts: Parts) -> str | None:
    """Lay environment and mounts into a trainer container; the literal PYTHONPATH that it had, or None."""
    wanted_env = list(parts.trainer_env)
    env = _merge(container.get("env"), wanted_env, "name", sidecar_spec.TRAINER_ENV)
    literal = None
    if parts.client:
        had = [each for each in bare.get("env") or [] if each.get("name") == sidecar_spec.PYTHONPATH]
        last = had[-1] if had else None
        if last is not None and "valueFrom" not in last:
            literal = last.get("value", "")
            entry = {"name": sidecar_spec.PYTHONPATH, "value": _behind(literal)}
        else:
            # The kubelet expands a variable that an earlier entry, or an envFrom, has set.
            is_set = last is not None or bool(bare.get("envFrom"))
            entry = {"name": sidecar_spec.PYTHONPATH, "value": _behind("$(PYTHONPATH)" if is_set else "")}
        literals = [
            n for n, each in enumerate(env) if each.get("name") == sidecar_spec.PYTHONPATH and "valueFrom" not in each
        ]
        own = [n for n in literals if _is_behind(env[n].get("value") or "")]
        if at := own or (literals if literal is not None else []):
            env[at[-1]] = entry
        else:
            env.append(entry)
    _set(container, "env", env)
    mounts = _merge(container.get("volumeMounts"), parts.trainer_mounts, "mountPath", sidecar_spec.TRAINER_MOUNTS)
    _set(container, "volumeMounts", mounts)
    return literal


def _strip(container: Json, python_path: str | None) -> None:
    """Take environment and mounts out of a container; `python_path` is the literal that it had."""
    env = []
    for each in _merge(container.get("env"), [], "name", sidecar_spec.TRAINER_ENV):
        is_ours = each.get("name") == sidecar_spec.PYTHONPATH and _is_behind(each.get("value") or "")
        if is_ours and python_path is not None:
            # The API server leaves an empty value out.
            env.append({"name": sidecar_spec.PYTHONPATH} | ({"value": python_path} if python_path else {}))
        elif not is_ours:
            env.append(each)
    _set(container, "env", env)
    mounts = [each for each in container.get("volumeMounts") or [] if each.get("name") not in sidecar_spec.VOLUMES]
    _set(container, "volumeMounts", mounts)


def _raised(resources: Json | None, of_sidecar: Json) -> Json | None:
    """
    The pod's own resources with room for the sidecar: what its author measured stays the trainer's.

    Source: KEP-2837, pod-level resources: the requests of the containers must fit in them.
    """
    raised = pods.copied(resources)
    for part, amounts in (raised or {}).items():
        for name in ("cpu", "memory"):
            more = of_sidecar[part].get(name) or of_sidecar["requests"][name] if part in of_sidecar else None
            total = quantities.add(name, amounts[name], more) if more and name in (amounts or {}) else None
            if total is not None:
                amounts[name] = total
    return raised


def _behind(python_path: str) -> str:
    return f"{python_path}:{sidecar_spec.CLIENT_DIR}" if python_path else sidecar_spec.CLIENT_DIR


def _is_behind(python_path: str) -> bool:
    return python_path == sidecar_spec.CLIENT_DIR or python_path.endswith(f":{sidecar_spec.CLIENT_DIR}")


def _merge(current: Iterable[Json] | None, entries: Iterable[Json], key: str, own_names: Collection[str]) -> list[Json]:
    """
    Return `current` with `entries`: each in the place of the entry with the same `key`, or else at the end.

    Other entries of `current` whose names are in `own_names` are dropped.
    """
    missing = {each[key]: each for each in entries}
    result = []
    for each in current or []:
        name: Any = each.get(key)
        if name in missing:
            result.append(pods.copied(missing.pop(name)))
        elif name not in own_names:
            result.append(pods.copied(each))
    return result + [pods.copied(each) for each in missing.values()]


def _set(into: Json, key: str, value: Any) -> None:
    """Set a field, or take it away for what means the same as its absence."""
    if value in (None, [], {}):
        into.pop(key, None)
    else:
        into[key] = value
