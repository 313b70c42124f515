"""
The whole of: pods as Hypothesis draws them, with everything in them that injection looks at, and some that it must not lose.

Called from: the injection's property tests.
Must never: draw an empty list or map where the API server leaves the field out; the two are one to it.
"""

from typing import Any, Final

from hypothesis import strategies as st

_NAMES: Final = ("trainer", "main", "logger", "istio-proxy", "second")
_amounts = st.fixed_dictionaries(
    {},
    optional={
        "cpu": st.sampled_from(["2", "500m", "1.5"]),
        "memory": st.sampled_from(["8Gi", "8192Mi", "1G"]),
        "nvidia.com/gpu": st.sampled_from(["1", "8"]),
        "ephemeral-storage": st.just("10Gi"),
    },
).filter(bool)
_resources = st.fixed_dictionaries({}, optional={"limits": _amounts, "requests": _amounts}).filter(bool)
_env_entry = st.one_of(
    st.builds(
        lambda name, value: {"name": name, "value": value},
        st.sampled_from(["PYTHONPATH", "MASTER_ADDR", "RANK", "A"]),
        st.text(alphabet="/ab:$()~", min_size=1, max_size=6),
    ),
    st.sampled_from(["PYTHONPATH", "NODE"]).map(
        lambda name: {"name": name, "valueFrom": {"configMapKeyRef": {"name": "paths", "key": "k"}}}
    ),
)
_mount = st.sampled_from(["/data", "/dev/shm", "/a/b"]).map(lambda path: {"name": "data", "mountPath": path})
_security = st.fixed_dictionaries(
    {}, optional={"runAsUser": st.sampled_from([0, 1000]), "runAsGroup": st.sampled_from([0, 1000])}
).filter(bool)


def _lists_of(entries: st.SearchStrategy[Any], key: str) -> st.SearchStrategy[list[Any]]:
    return st.lists(entries, min_size=1, max_size=4, unique_by=lambda entry: entry[key])


def _containers(names: tuple[str, ...], most: int) -> st.SearchStrategy[list[dict[str, Any]]]:
    container = st.fixed_dictionaries(
        {"name": st.sampled_from(names), "image": st.just("example/any:1")},
        optional={
            "env": _lists_of(_env_entry, "name"),
            "envFrom": st.just([{"configMapRef": {"name": "paths"}}]),
            "volumeMounts": _lists_of(_mount, "mountPath"),
            "resources": _resources,
            "securityContext": _security,
            "command": st.just(["torchrun", "train.py"]),
            "aFieldOfTomorrow": st.just({"x": [1, None]}),
        },
    )
    return st.lists(container, min_size=1, max_size=most, unique_by=lambda each: str(each["name"]))


_init_container = st.one_of(
    st.sampled_from(["fetch", "istio-init"]).map(lambda name: {"name": name, "image": "example/any:1"}),
    st.sampled_from(["istio-proxy", "linkerd-proxy", "gke-gcsfuse-sidecar"]).map(
        lambda name: {"name": name, "image": "example/any:1", "restartPolicy": "Always"}
    ),
    st.fixed_dictionaries(
        {"name": st.just("pillion-sidecar")},
        optional={
            "image": st.just("example/pillion-sidecar:2"),
            "restartPolicy": st.just("Always"),
            "env": st.just([{"name": "AWS_REGION", "value": "here"}]),
            "envFrom": st.just([{"secretRef": {"name": "own"}}]),
            "resources": st.just({"limits": {"memory": "512Mi"}, "requests": {"memory": "256Mi"}}),
            "securityContext": _security,
        },
    ),
)
_annotations = st.fixed_dictionaries(
    {"pillion.dev/policy": st.just("llm")},
    optional={
        "pillion.dev/client": st.sampled_from(["Injected", "Installed"]),
        "pillion.dev/sidecar-cpu-limit": st.just("3"),
        "pillion.dev/staging-size-limit": st.just("1Gi"),
        "pillion.dev/job-id": st.just("run.7"),
        "kubectl.kubernetes.io/default-container": st.sampled_from(_NAMES),
        "else/where~x": st.just("y"),
        "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes": st.sampled_from(["data", "data,shm"]),
    },
)
_labels = st.fixed_dictionaries(
    {}, optional={"jobset.sigs.k8s.io/jobset-name": st.just("set"), "app": st.just("x")}
).filter(bool)
_spec = st.fixed_dictionaries(
    {"containers": _containers(_NAMES, 3)},
    optional={
        "initContainers": _lists_of(_init_container, "name"),
        "volumes": _lists_of(st.sampled_from(["data", "shm"]).map(lambda name: {"name": name, "emptyDir": {}}), "name"),
        "terminationGracePeriodSeconds": st.integers(0, 3600),
        "hostNetwork": st.just(True),
        "resources": _resources,
        "securityContext": _security,
        "restartPolicy": st.sampled_from(["Never", "OnFailure", "Always"]),
        "aFieldOfTomorrow": st.just([{"name": "x"}, 1, None]),
    },
)
pods = st.fixed_dictionaries(
    {
        "apiVersion": st.just("v1"),
        "kind": st.just("Pod"),
        "metadata": st.fixed_dictionaries(
            {"name": st.just("train"), "annotations": _annotations},
            optional={"labels": _labels, "creationTimestamp": st.none()},
        ),
        "spec": _spec,
    }
)
"""Pods that have opted in, and that the policy of the tests allows."""
