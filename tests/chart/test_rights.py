"""
The whole of: that the chart grants each account what the operator uses, as `uses` lists it, and nothing more.

Called from: pytest. That the API server sees it the same way is tests/cluster/test_rights.py.
Must never: take a right for used because it is granted.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from chart.uses import PILLION, SELF_ONLY, USED, USES
from chart.variants import CERT_MANAGER, PROVIDED, VARIANTS
from pillion_operator.cluster import paths
from support import helm
from support.release import CHART, NAMESPACE, ROOT

SOURCE: Final = ROOT / "operator" / "src" / "pillion_operator"
PLUMBING: Final = ("cluster/client.py", "cluster/reflector.py")
"""How it is asked, not what for."""
VERBS: Final = {
    "get": {"get"},
    "list": {"list"},
    "pages": {"list"},
    "create": {"create"},
    "replace": {"update"},
    "delete": {"delete"},
    "patch": {"patch"},
    "watch": {"watch"},
}
"""By method of the client: what it needs a right to."""
CLIENTS: Final = {"_client", "_api", "api"}
"""What a client is called in the source."""
FOR_PEOPLE: Final = {"pillion-edit", "pillion-view"}
WRITTEN_PATH: Final = re.compile(r"/apis?/[a-z]")
Right = tuple[str, str, str]


def granted(values: dict[str, Any]) -> dict[str, set[Right]]:
    """By account: what the bindings give it."""
    objects = helm.render(values)
    rights: dict[str, set[Right]] = {}
    for binding in helm.of_kind(objects, "ClusterRoleBinding", "RoleBinding"):
        role = helm.one(objects, binding["roleRef"]["kind"], binding["roleRef"]["name"])
        for subject in binding["subjects"]:
            assert (subject["kind"], subject["namespace"]) == ("ServiceAccount", NAMESPACE)
            rights.setdefault(subject["name"], set()).update(_rights(role))
    return rights


def test_what_is_granted_is_what_is_used() -> None:
    """With certificates of its own, each account has the rights in the table, and no other."""
    assert granted({}) == USED


@pytest.mark.parametrize("values", [CERT_MANAGER, PROVIDED], ids=["CertManager", "Provided"])
def test_less_is_granted_where_others_make_the_certificate(values: dict[str, Any]) -> None:
    """Then the controller can write no Secret, and cannot touch the webhook configuration."""
    assert granted(values) == USED | {"pillion-controller": USED["pillion-controller"] - SELF_ONLY}


def test_every_account_of_a_pod_has_its_own() -> None:
    """Each pod runs under the account of its name, which the chart makes."""
    objects = helm.render({})
    pods = {
        each["metadata"]["name"]: each["spec"].get("template", each)["spec"]["serviceAccountName"]
        for each in helm.of_kind(objects, "Deployment", "Pod")
    }
    assert pods == {name: name for name in USED}
    assert {each["metadata"]["name"] for each in helm.of_kind(objects, "ServiceAccount")} == USED.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rule_has_a_wildcard(variant: str) -> None:
    """No rule of any role is for all groups, resources or verbs, and none gives rights away."""
    for role in helm.of_kind(helm.render(VARIANTS[variant]), "ClusterRole", "Role"):
        words = {word for rule in role["rules"] for each in rule.values() for word in each}
        assert not {word for word in words if "*" in word}, role["metadata"]["name"]
        assert not words & {"escalate", "bind", "impersonate"}, role["metadata"]["name"]


def test_secrets_and_configurations_are_granted_by_name() -> None:
    """Whatever the chart can name it names: Secrets, Lease, EndpointSlice and webhook configuration, but for making them."""
    named = {"secrets", "leases", "endpointslices", "mutatingwebhookconfigurations"}
    for role in helm.of_kind(helm.render({}), "ClusterRole", "Role"):
        for rule in role["rules"]:
            if named & set(rule["resources"]):
                assert rule.get("resourceNames") or rule["verbs"] == ["create"], (role["metadata"]["name"], rule)


def test_the_webhook_cannot_read_the_authoritys_key() -> None:
    """The webhook's account reads one Secret, and that is the certificate's."""
    rules = helm.one(helm.render({}), "Role", "pillion-webhook")["rules"]
    assert [each["resourceNames"] for each in rules if "secrets" in each["resources"]] == [["pillion-tls"]]


def test_people_get_rights_to_our_kinds_only() -> None:
    """The roles that are aggregated to view and edit are about policies and Checkpoint objects, and viewing changes nothing."""
    roles = {each["metadata"]["name"]: each for each in helm.of_kind(helm.render({}), "ClusterRole")}
    bound = {each["roleRef"]["name"] for each in helm.of_kind(helm.render({}), "ClusterRoleBinding")}
    assert roles.keys() - bound == FOR_PEOPLE
    for name in FOR_PEOPLE:
        assert {right[:2] for right in _rights(roles[name])} == {
            (PILLION, "checkpointpolicies"),
            (PILLION, "checkpoints"),
        }
    assert {verb for *_, verb in _rights(roles["pillion-view"])} == {"get", "list", "watch"}


@pytest.mark.parametrize(
    "path", [*sorted((CHART / "templates" / "rbac").glob("*.yaml")), CHART / "templates" / "tests" / "admission.yaml"]
)
def test_every_rule_says_why_it_is_there(path: Path) -> None:
    """Right above each rule there is a comment."""
    lines = path.read_text().splitlines()
    rules = [number for number, line in enumerate(lines) if line.startswith("- apiGroups:")]
    assert rules
    bare = [number + 1 for number in rules if not re.match(r"# \S", lines[number - 1])]
    assert bare == []


@pytest.mark.parametrize("module", sorted({each.module for each in USES} - {"helm test"}))
def test_a_module_asks_for_what_the_table_says(module: str) -> None:
    """The calls of the client in a module need exactly the verbs that the table has for it."""
    declared = {verb for each in USES if each.module == module for verb in each.verbs}
    assert _asked(_tree(SOURCE / module)) == declared


def test_no_module_asks_for_what_the_table_does_not_have() -> None:
    """A module that the table does not name makes no request."""
    known = {*(each.module for each in USES), *PLUMBING}
    asking = {name for path in SOURCE.rglob("*.py") if (name := _name(path)) not in known and _asked(_tree(path))}
    assert asking == set()


def test_paths_of_the_api_are_spelled_in_one_module() -> None:
    """A path that is written out elsewhere would change in one place and not in the other."""
    spelling = {
        _name(path)
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and WRITTEN_PATH.match(node.value)
    }
    assert spelling - {"cluster/paths.py"} == set()


def test_every_path_of_the_api_is_of_a_resource_in_the_table() -> None:
    """Whatever resource of the API a module names or writes out as a path, the accounts of that part have a right to it."""
    found = {_name(path): set(_paths(_tree(path))) for path in SOURCE.rglob("*.py")}
    named = {
        (account, resource)
        for module, paths in found.items()
        for path in paths
        if (resource := _resource(path)) is not None
        for account in _accounts(module)
    }
    used = {(account, right[:2]) for account, rights in USED.items() for right in rights}
    assert sorted(named - used) == []
    # And the other way round, so that this test cannot pass because it found no paths. Status is a part of what has it.
    assert {right for _, right in used if "/" not in right[1]} == {resource for _, resource in named}


def _rights(role: helm.Json) -> set[Right]:
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def _name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def _accounts(module: str) -> set[str]:
    """Whose processes run a module."""
    accounts = {each.account for each in USES if each.module == module}
    return accounts or {"pillion-webhook" if module.startswith("webhook/") else "pillion-controller"}


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _asked(tree: ast.Module) -> set[str]:
    """The verbs that a module's calls need."""
    verbs: set[str] = set()
    for node in ast.walk(tree):
        # kopf's decorator stands for a list and a watch too.
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called.split(".")[-1] == "Reflector" or called == "kopf.on.event":
            verbs |= {"list", "watch"}
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value).split(".")[-1] in CLIENTS:
            verbs |= VERBS.get(node.func.attr, set())
            # An apply makes what is not there, and for that the API server wants the right to create.
            if any("PatchKind.APPLY" in ast.unparse(each.value) for each in node.keywords):
                verbs.add("create")
    return verbs


def _paths(tree: ast.Module) -> Iterator[str]:
    """The paths of the API that a module uses: those of `paths` by name, and whatever is written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "paths" and node.attr.isupper():
            resource: paths.Resource = getattr(paths, node.attr)
            yield resource.everywhere
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and WRITTEN_PATH.match(node.value):
            yield node.value


def _resource(path: str) -> tuple[str, str] | None:
    """Group and resource; None: the path ends before the resource, and is a part of others."""
    head, *words = path.strip("/").split("/")
    group = words.pop(0) if head == "apis" else ""
    _version, *words = words
    if words[:1] == ["namespaces"]:
        words = words[2:]
    return (group, words[0]) if words else None
