"""
The whole of: what an injected pod promises to its cluster and to its trainer, claim by claim.

Called from: pytest.
Must never: repeat the golden records; each test looks at one promise, in every pod of them.
"""

from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from pillion.wire import names, policy
from pillion_operator.injection import apply, checkpoint_policy, decide, sidecar_spec, storage_spec
from pillion_operator.settings import Settings

SETTINGS: Final = Settings(sidecar_image="example/pillion-sidecar:1", home_url="https://home", liveness="Exec")
GOLDEN: Final = Path(__file__).parents[3] / "golden" / "injection"
CASES: Final = sorted(path.parent for path in GOLDEN.glob("*/patch.json"))
SPEC: Final[dict[str, Any]] = {
    "trigger": {"periodSteps": 10},
    "staging": {"sizeLimit": "8Gi"},
    "storage": {"persistentVolumeClaim": {"claimName": "checkpoints"}},
}


def inject(pod: dict[str, Any], spec: dict[str, Any] = SPEC, settings: Settings = SETTINGS) -> dict[str, Any]:
    made = decide.inject(pod, checkpoint_policy.from_object(spec), settings)
    assert isinstance(made, decide.Inject), decide.message(made)
    return made.pod


def a_pod(*containers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    listed = list(containers) or [{"name": "trainer", "image": "example/train:1"}]
    metadata = {"name": "train", "annotations": {"pillion.dev/policy": "llm"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": listed} | spec}


def own_containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in pod["spec"]["initContainers"] if each["name"] in ("pillion-sidecar", "pillion-client")]


def sidecar_of(pod: dict[str, Any]) -> dict[str, Any]:
    return next(each for each in own_containers(pod) if each["name"] == "pillion-sidecar")


@pytest.fixture(params=CASES, ids=[case.name for case in CASES])
def any_pod(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each pod of the golden records, injected."""
    case: Path = request.param
    pod = yaml.safe_load((case / "pod.yaml").read_text())
    found = checkpoint_policy.from_object(yaml.safe_load((case / "policy.yaml").read_text()))
    made = decide.inject(pod, found, Settings(sidecar_image="example/pillion-sidecar:1.0", home_url="https://home"))
    assert isinstance(made, decide.Inject), decide.message(made)
    return made.pod


def test_the_sidecar_is_native_and_nothing_waits_for_it(any_pod: dict[str, Any]) -> None:
    """The sidecar outlives the init phase, and no probe of it can keep the trainer from starting or from its DNS name."""
    sidecar = sidecar_of(any_pod)
    assert sidecar["restartPolicy"] == "Always"
    assert not {"startupProbe", "readinessProbe", "ports"} & sidecar.keys()
    assert sidecar["lifecycle"]["preStop"]["exec"]["command"] == ["pillion-sidecar", "notify"]


def test_our_containers_keep_to_the_restricted_profile(any_pod: dict[str, Any]) -> None:
    """Source: Kubernetes documentation, "Pod Security Standards", Restricted; each rule that a container can break."""
    asked_for_root = sidecar_of(any_pod)["securityContext"]["runAsUser"] == 0
    for container in own_containers(any_pod):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"]["drop"] == ["ALL"]
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert context["readOnlyRootFilesystem"] is True
        if asked_for_root and container["name"] == "pillion-sidecar":
            # Root may write where another user has written before; the baseline profile allows that much.
            assert context["capabilities"]["add"] == ["DAC_OVERRIDE"]
        else:
            assert context["capabilities"].keys() == {"drop"}
            assert context["runAsNonRoot"] is True
            assert context["runAsUser"] != 0
    kinds = {key for volume in any_pod["spec"]["volumes"] for key in volume if volume["name"].startswith("pillion-")}
    assert kinds <= {"name", "emptyDir", "persistentVolumeClaim", "projected", "configMap"}


def test_our_containers_say_what_they_take_and_take_no_gpu(any_pod: dict[str, Any]) -> None:
    """Requests and a memory limit are always there, as a namespace with a quota asks, and cpu and memory are all there is."""
    for container in own_containers(any_pod):
        resources = container["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys() <= {"cpu", "memory", "ephemeral-storage"}
        assert {"memory"} <= resources["limits"].keys() <= {"cpu", "memory", "ephemeral-storage"}


def test_storage_and_token_are_the_sidecars_alone(any_pod: dict[str, Any]) -> None:
    """No container but the sidecar mounts the storage or the token, and the trainers mount the arena at the same path."""
    spec = any_pod["spec"]
    holders: dict[str, set[str]] = {}
    for container in [*spec["containers"], *spec["initContainers"]]:
        for mount in container.get("volumeMounts", []):
            holders.setdefault(mount["name"], set()).add(container["name"])
    storage = holders.keys() & set(storage_spec.VOLUMES)
    assert all(holders[each] == {"pillion-sidecar"} for each in ("pillion-token", "pillion-tmp", *storage))
    status = yaml.safe_load(any_pod["metadata"]["annotations"]["pillion.dev/status"])
    assert holders["pillion-arena"] == {"pillion-sidecar", *status["containers"]}
    for container in spec["containers"]:
        if container["name"] in status["containers"]:
            env = {entry["name"]: entry.get("value") for entry in container["env"]}
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert mounts[env["PILLION_RUNTIME_DIR"]]["name"] == "pillion-arena"
            assert all(mount.get("readOnly") for path, mount in mounts.items() if path == sidecar_spec.CLIENT_DIR)


def test_no_container_of_ours_has_the_pods_api_token(any_pod: dict[str, Any]) -> None:
    """Where the API server would mount it there is an empty volume, in each container that injection adds."""
    volumes = {volume["name"]: volume for volume in any_pod["spec"]["volumes"]}
    for container in own_containers(any_pod):
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        mount = mounts["/var/run/secrets/kubernetes.io/serviceaccount"]
        assert mount["readOnly"]
        assert volumes[mount["name"]].keys() == {"name", "emptyDir"}


def test_every_own_volume_is_mounted_and_every_own_mount_has_its_volume(any_pod: dict[str, Any]) -> None:
    """Nothing that injection mounts is missing, and nothing that it declares lies idle."""
    spec = any_pod["spec"]
    volumes = {volume["name"] for volume in spec["volumes"] if volume["name"].startswith("pillion-")}
    containers = [*spec["containers"], *spec["initContainers"]]
    mounted = {mount["name"] for container in containers for mount in container.get("volumeMounts", [])}
    assert volumes == {name for name in mounted if name.startswith("pillion-")}


def test_the_arena_is_charged_to_the_sidecar_with_its_headroom() -> None:
    """Request and limit hold the whole file system of the arena, which is larger than the policy's limit, and bounded."""
    pod = inject(a_pod())
    arena = next(volume for volume in pod["spec"]["volumes"] if volume["name"] == "pillion-arena")["emptyDir"]
    size_bytes = policy.quantity_bytes(arena["sizeLimit"])
    assert arena["medium"] == "Memory"
    assert 8 * 2**30 + sidecar_spec.MIN_HEADROOM_BYTES <= size_bytes <= 8 * 2**30 * 1.03
    resources = sidecar_of(pod)["resources"]
    assert policy.quantity_bytes(resources["requests"]["memory"]) == size_bytes + 2**30
    assert policy.quantity_bytes(resources["limits"]["memory"]) == size_bytes + 2**30


def test_a_workload_that_pays_is_charged_nothing_by_us() -> None:
    """With memoryAccounting: Workload the sidecar asks for its own memory only."""
    staging = {"sizeLimit": "8Gi", "memoryAccounting": "Workload"}
    resources = sidecar_of(inject(a_pod(), SPEC | {"staging": staging}))["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"] == "1Gi"


def test_a_guaranteed_pod_stays_guaranteed() -> None:
    """Where each container's requests are its limits, however they are spelled, so are those of our two."""
    amounts = {"limits": {"cpu": "2", "memory": "4Gi"}, "requests": {"cpu": "2000m", "memory": "4096Mi"}}
    pod = inject(a_pod({"name": "trainer", "image": "example/train:1", "resources": amounts}))
    for container in own_containers(pod):
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["resources"]["limits"].keys() == {"cpu", "memory"}


@pytest.mark.parametrize(
    ("limits", "expected"),
    [({"cpu": "8"}, "2"), ({"cpu": "1"}, "1"), ({"cpu": "100m"}, "500m"), ({"memory": "8Gi"}, None)],
)
def test_a_cpu_limit_comes_only_where_the_others_have_one(limits: dict[str, str], expected: str | None) -> None:
    """A quota on CPU limits is met, and a namespace's largest limit, as far as the others tell it; else the drain is not throttled."""
    pod = inject(a_pod({"name": "trainer", "image": "example/train:1", "resources": {"limits": limits}}))
    assert sidecar_of(pod)["resources"]["limits"].get("cpu") == expected


def test_the_client_takes_what_the_sidecar_takes_without_the_arena() -> None:
    """What a namespace demands of each container at least, a policy can give to both."""
    amounts = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "3Gi"}}
    client = own_containers(inject(a_pod(), SPEC | {"sidecar": {"resources": amounts}}))[1]
    assert client["resources"] == amounts


DISK: Final = "ephemeral-storage"


@pytest.mark.parametrize("part", ["requests", "limits"])
def test_local_storage_is_said_where_the_pod_says_it(part: str) -> None:
    """The kubelet takes the sum of such limits for the pod's, so that a limit of the sidecar alone would be the trainer's."""
    said = {"name": "trainer", "image": "example/train:1", "resources": {part: {DISK: "10Gi"}}}
    for container in own_containers(inject(a_pod(said))):
        assert container["resources"][part][DISK] == "384Mi"
    for container in own_containers(inject(a_pod())):
        assert not {DISK} & {*container["resources"]["limits"], *container["resources"]["requests"]}


def declared(**container: Any) -> dict[str, Any]:
    return {"initContainers": [{"name": "pillion-sidecar", "image": "example/pillion-sidecar:1", **container}]}


def test_defaults_of_a_limit_range_are_not_the_pods_word() -> None:
    """What the API server has filled in and marked is dropped, and what the author has written stays."""
    amounts = {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"cpu": "1", "memory": "512Mi"}}
    pod = a_pod(**declared(resources=amounts))
    set_by = "cpu, memory request for init container pillion-sidecar; cpu limit for init container pillion-sidecar"
    pod["metadata"]["annotations"]["kubernetes.io/limit-ranger"] = f"LimitRanger plugin set: {set_by}"
    spec = SPEC | {"sidecar": {"resources": {"requests": {"cpu": "500m"}, "limits": {"memory": "1Gi"}}}}
    resources = sidecar_of(inject(pod, spec))["resources"]
    assert resources["requests"]["cpu"] == "500m"
    arena_bytes = policy.quantity_bytes(resources["limits"]["memory"]) - 512 * 2**20
    assert arena_bytes >= 8 * 2**30
    assert "cpu" not in resources["limits"]


@pytest.mark.parametrize(
    ("in_pod", "of_trainer", "of_policy", "own", "expected"),
    [
        ({}, {}, {}, {}, (65532, 65532)),
        ({"runAsUser": 1000}, {}, {}, {}, (1000, 65532)),
        ({"runAsUser": 1000, "runAsGroup": 5}, {"runAsUser": 2000}, {}, {}, (2000, 5)),
        ({"runAsUser": 0}, {}, {}, {}, (0, 0)),
        ({"runAsUser": 0}, {"runAsUser": 1000}, {}, {}, (1000, 65532)),
        ({"runAsUser": 1000}, {}, {"runAsUser": 0}, {}, (0, 0)),
        ({"runAsUser": 1000}, {}, {"runAsUser": 0, "runAsGroup": 7}, {"runAsUser": 3000}, (3000, 7)),
    ],
)
def test_the_sidecars_user_is_the_pods_word_the_policys_or_the_trainers(
    in_pod: dict[str, int],
    of_trainer: dict[str, int],
    of_policy: dict[str, int],
    own: dict[str, int],
    expected: tuple[int, int],
) -> None:
    """A root trainer has a root sidecar, which may write where it may; the container of the client is never root."""
    trainer = {"name": "trainer", "image": "example/train:1", "securityContext": of_trainer}
    extra = declared(securityContext=own) if own else {}
    pod = inject(a_pod(trainer, securityContext=in_pod, **extra), SPEC | {"sidecar": of_policy})
    context = sidecar_of(pod)["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["runAsNonRoot"]) == (*expected, expected[0] != 0)
    assert ("add" in context["capabilities"]) is (expected[0] == 0)
    client = next(each for each in own_containers(pod) if each["name"] == "pillion-client")["securityContext"]
    assert client["runAsUser"] != 0


@pytest.mark.parametrize(
    ("asked", "main", "expected"),
    [
        ({"helper": {"example.com/nic": "1"}}, None, ["helper"]),
        ({"helper": {"example.com/nic": "1"}}, "train", ["train"]),
        ({"helper": {"github.com/fuse": "1"}}, None, ["first"]),
        ({"helper": {"example.com/nic": "1"}, "train": {"nvidia.com/mig-1g.10gb": "1"}}, "first", ["train"]),
        ({"helper": {"hugepages-2Mi": "1Gi"}}, None, ["first"]),
    ],
)
def test_devices_tell_the_trainer(asked: dict[str, dict[str, str]], main: str | None, expected: list[str]) -> None:
    """An accelerator before the pod's own main container, and that before a device of which nobody knows what it is."""
    containers = [
        {"name": name, "image": "example/any:1", "resources": {"limits": asked.get(name, {})}}
        for name in ("first", "helper", "train")
    ]
    pod = a_pod(*containers)
    if main:
        pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"] = main
    status = yaml.safe_load(inject(pod)["metadata"]["annotations"]["pillion.dev/status"])
    assert status["containers"] == expected


def test_our_containers_have_the_trainers_selinux_labels() -> None:
    """Files in the arena have the labels of the process that made them."""
    options = {"level": "s0:c25,c20"}
    trainer = {"name": "trainer", "image": "example/train:1", "securityContext": {"seLinuxOptions": options}}
    for container in own_containers(inject(a_pod(trainer))):
        assert container["securityContext"]["seLinuxOptions"] == options


def test_variables_and_secrets_of_the_policy_are_the_sidecars_alone() -> None:
    """They come beside what the pod declares, whose own word for a variable wins; a second look changes nothing."""
    sidecar = {
        "env": [{"name": "REGION", "value": "policy"}, {"name": "EMPTY", "value": ""}],
        "envFrom": [{"secretRef": {"name": "s3"}}],
    }
    pod = a_pod(**declared(env=[{"name": "REGION", "value": "pod"}], envFrom=[{"configMapRef": {"name": "own"}}]))
    done = inject(pod, SPEC | {"sidecar": sidecar})
    container = sidecar_of(done)
    env = {each["name"]: each.get("value") for each in container["env"]}
    assert (env["REGION"], env["EMPTY"]) == ("pod", None)
    assert container["envFrom"] == [{"configMapRef": {"name": "own"}}, {"secretRef": {"name": "s3"}}]
    assert not any(each.get("envFrom") for each in done["spec"]["containers"])
    assert inject(done, SPEC | {"sidecar": sidecar}) == done
    assert apply.remove(done) == pod


def test_no_service_of_the_namespace_names_a_setting() -> None:
    """The kubelet sets NAME_PORT for a Service; each setting of such a name is written out, and so is not the kubelet's."""
    written = {each["name"] for each in sidecar_of(inject(a_pod()))["env"]}
    at_risk = {each for each in names.SET_BY_INJECTION if each.endswith(("_PORT", "_HOST"))}
    assert at_risk <= written


def test_volumes_on_disk_keep_no_node_alive() -> None:
    """The cluster autoscaler may lose each volume of injection with the node, and the pod's own word on its volumes stays."""
    pod = a_pod()
    key = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"
    pod["metadata"]["annotations"][key] = "scratch"
    done = inject(pod)
    on_disk = [
        each["name"]
        for each in done["spec"]["volumes"]
        if "emptyDir" in each and each["emptyDir"].get("medium") != "Memory"
    ]
    assert done["metadata"]["annotations"][key].split(",") == ["scratch", *on_disk]
    assert apply.remove(done) == pod


def test_resources_that_say_little_are_filled_up() -> None:
    """A policy with empty resources still gives requests and a limit."""
    resources = sidecar_of(inject(a_pod(), SPEC | {"sidecar": {"resources": {}}}))["resources"]
    assert resources["requests"].keys() == {"cpu", "memory"}
    assert resources["limits"].keys() == {"memory"}


@pytest.mark.parametrize(("grace", "expected"), [({}, 330), ({"terminationGracePeriodSeconds": 90}, 390)])
def test_the_grace_period_leaves_the_drain_its_time(grace: dict[str, int], expected: int) -> None:
    """What the trainer had to end in is kept, and the drain's time comes on top."""
    assert inject(a_pod(**grace))["spec"]["terminationGracePeriodSeconds"] == expected


def test_the_policy_reaches_the_sidecar_as_it_is() -> None:
    """The kubelet expands dollars in a variable, and the sidecar still reads the same policy, arguments and all."""
    writer = {"name": "mine:Writer", "arguments": {"path": "$(HOME)/$x$$", "n": [1, None]}}
    spec = SPEC | {"storage": SPEC["storage"] | {"writer": writer}}
    env = {entry["name"]: entry.get("value", "") for entry in sidecar_of(inject(a_pod(), spec))["env"]}
    text = env["PILLION_POLICY"]
    assert "$" not in text.replace("$$", "")
    given = policy.parse(yaml.safe_load(text.replace("$$", "$")), embedded=True)
    assert given == policy.parse(spec, embedded=False)


def test_without_a_home_there_is_no_token() -> None:
    """A sidecar that calls nobody gets no credentials at all."""
    pod = inject(a_pod(), settings=Settings(sidecar_image="example/pillion-sidecar:1"))
    assert not any(volume["name"] == "pillion-token" for volume in pod["spec"]["volumes"])
    assert not any(entry["name"] == "PILLION_HOME_URL" for entry in sidecar_of(pod)["env"])


def test_the_token_is_bound_to_its_audience() -> None:
    """The token is a projected one, for the operator's audience only, and it expires."""
    volumes = {volume["name"]: volume for volume in inject(a_pod())["spec"]["volumes"]}
    source = volumes["pillion-token"]["projected"]["sources"][0]["serviceAccountToken"]
    assert source == {"audience": "pillion.dev", "expirationSeconds": 3600, "path": "token"}


def test_a_liveness_probe_is_off_unless_asked_for_and_then_generous() -> None:
    """A sidecar is given minutes to answer before the kubelet starts it anew."""
    assert "livenessProbe" not in sidecar_of(inject(a_pod(), settings=Settings()))
    probe = sidecar_of(inject(a_pod()))["livenessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 300
    assert probe["exec"]["command"] == ["pillion-sidecar", "ping"]


def test_an_earlier_choice_of_trainers_is_kept() -> None:
    """A container that another webhook puts first after the first look does not become the trainer at the second."""
    pod = inject(a_pod())
    pod["spec"]["containers"].insert(0, {"name": "added", "image": "example/other:1"})
    again = inject(pod)
    assert "env" not in again["spec"]["containers"][0]
    assert again["spec"] == pod["spec"]


FROM_MAP: Final = {"name": "PYTHONPATH", "valueFrom": {"configMapKeyRef": {"name": "paths", "key": "python"}}}


def literal(value: str) -> dict[str, str]:
    return {"name": "PYTHONPATH", "value": value}


@pytest.mark.parametrize(
    ("had", "expected"),
    [
        ([], [literal("/pillion/client")]),
        ([literal("/a:/b")], [literal("/a:/b:/pillion/client")]),
        ([FROM_MAP], [FROM_MAP, literal("$(PYTHONPATH):/pillion/client")]),
        # The last entry of a name is the one that counts.
        ([literal("/a"), literal("/b")], [literal("/a"), literal("/b:/pillion/client")]),
        ([literal("/a"), FROM_MAP], [literal("/a"), FROM_MAP, literal("$(PYTHONPATH):/pillion/client")]),
        ([FROM_MAP, literal("/b")], [FROM_MAP, literal("/b:/pillion/client")]),
    ],
)
def test_the_client_goes_behind_the_path_that_the_trainer_has(
    had: list[dict[str, Any]], expected: list[dict[str, Any]]
) -> None:
    """Wherever PYTHONPATH comes from in the pod, its value stays in front, and comes back when the sidecar is taken out."""
    pod = a_pod({"name": "trainer", "image": "example/train:1"} | ({"env": had} if had else {}))
    done = inject(pod)
    env = done["spec"]["containers"][0]["env"]
    assert [entry for entry in env if entry["name"] == "PYTHONPATH"] == expected
    assert inject(done) == done
    assert apply.remove(done) == pod
