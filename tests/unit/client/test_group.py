"""
The whole of: who the ranks are, from the entry of each rank: pods, local ranks, the job's store, the mode of the store.

Called from: pytest.
Must never: open a process group; every rank computes the same from the same entries.
"""

import importlib.util
import itertools

import pytest

from pillion import embedded, group, store_mode
from pillion.errors import SettingsError


def entries(pods: str, store: object = ("10.0.0.1", 29500), problem: str = "") -> list[dict[str, object]]:
    """What the ranks of these pods say, one letter a rank."""
    return [
        {"pod": pod, "session": f"{rank:032x}", "run": "r", "attempt": "2", "store": store, "problem": problem}
        for rank, pod in enumerate(pods)
    ]


def test_pods_and_local_ranks_follow_from_what_the_ranks_said() -> None:
    """Ranks of a pod need not be neighbours; each rank finds itself, and all agree on session and store of rank 0."""
    members = [group._group(rank, entries("abab")) for rank in range(4)]
    assert {each.pods for each in members} == {((0, 2), (1, 3))}
    assert [each.local_rank for each in members] == [0, 0, 1, 1]
    assert {each.session for each in members} == {f"{0:032x}"}
    assert {(each.store.host, each.store.port) for each in members if each.store} == {("10.0.0.1", 29500)}
    assert {each.attempt for each in members} == {2}


def test_the_placement_tells_which_pod_has_which_ranks() -> None:
    """The same for every rank and in every attempt; another one where two pods of equal size have changed places."""
    (placement,) = {group._group(rank, entries("abab")).placement for rank in range(4)}
    again = [entry | {"session": "f" * 32, "attempt": "3"} for entry in entries("abab")]
    assert group._group(0, again).placement == placement
    others = {group._group(0, entries(pods)).placement for pods in ("baba", "abac", "aabb", "ab", "ababc")}
    assert len(others | {placement}) == 6


@pytest.mark.parametrize("port", ["", "0", "65536", "-1", "29500x", "29 500"])
def test_a_malformed_port_is_named_with_what_is_allowed(port: str) -> None:
    """An invalid MASTER_PORT is a ValueError with its value. A missing MASTER_ADDR is reported first."""
    with pytest.raises(ValueError, match="MASTER_PORT") as caught:
        group.store_address({"MASTER_ADDR": "host", "MASTER_PORT": port})
    assert repr(port) in str(caught.value)
    with pytest.raises(ValueError, match="MASTER_ADDR is not set"):
        group.store_address({"MASTER_PORT": port})


def test_an_address_is_taken_as_it_stands() -> None:
    """Names and IPv6 addresses are the store's business."""
    assert group.store_address({"MASTER_ADDR": "fd00::1", "MASTER_PORT": "29500"}) == group.StoreAddress(
        "fd00::1", 29500
    )


def test_the_mode_of_the_store_is_what_the_table_says() -> None:
    """Every row of the table in `pillion.store_mode`."""
    modes: dict[tuple[str | None, str, bool, str], str | None] = {}
    for asked, pods, has_store, policy in itertools.product(
        (None, "1", "0", "true"), ("aa", "ab"), (True, False), ("Prefix", "Own")
    ):
        members = group._group(0, entries(pods, ("h", 1) if has_store else None, "MASTER_ADDR is not set"))
        environ = {} if asked is None else {"DCP_USE_PREFIX_STORE": asked}
        try:
            modes[asked, pods, has_store, policy] = store_mode.choose(members, environ, policy_store=policy)
        except SettingsError as err:
            assert "MASTER_ADDR" in str(err)
            modes[asked, pods, has_store, policy] = "error"
    for (asked, pods, has_store, policy), mode in modes.items():
        if asked == "1":
            wanted = "error" if not has_store else None if pods == "aa" else "prefix"
        elif pods == "aa":
            wanted = None
        elif asked is not None:
            wanted = "own"
        else:
            wanted = "prefix" if policy == "Prefix" and has_store else "own"
        assert mode == wanted, (asked, pods, has_store, policy)


def test_ranks_that_share_memory_share_a_runtime_directory() -> None:
    """The same pod identity gives the same directory, whatever torchrun calls the node; another pod or root another one."""
    first = embedded.runtime_directory("/checkpoints", {"GROUP_RANK": "0"})
    assert embedded.runtime_directory("/checkpoints", {"GROUP_RANK": "1"}) == first
    assert embedded.runtime_directory("/checkpoints", {"PILLION_POD": "x"}) != first
    assert embedded.runtime_directory("/other", {}) != first
    assert embedded.runtime_directory("/checkpoints", {"PILLION_RUNTIME_DIR": "/pillion"}) == "/pillion"


@pytest.mark.parametrize(
    ("roots", "said"),
    [
        (["/a", "/a", "/b", "/a"], "'/a' on ranks 0, 1, 3; '/b' on ranks 2"),
        (["/a", ""], "no root on ranks 1"),
        ([""], "no root: call"),
        ([f"/{rank}" for rank in range(20)], "'/3' on ranks 3"),
        (["/a", *["/b"] * 20], "'/b' on ranks 1, 2, 3, 4, 5, 6, 7, 8 and 12 more"),
    ],
)
def test_a_root_that_differs_from_rank_to_rank_is_reported_by_rank(roots: list[str], said: str) -> None:
    """Every rank sees the same list, and raises the same, before anything is started."""
    with pytest.raises(SettingsError) as raised:
        group._check_roots(roots)
    assert said in str(raised.value)


def test_one_root_on_all_ranks_is_well_and_so_is_none_to_agree_on() -> None:
    """pillion.dcp has a path for each save instead."""
    group._check_roots(["/a"] * 3)
    group._check_roots([None] * 3)


def test_several_ranks_without_numpy_are_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pip install torch` does not bring it, and torch's own error ("Numpy is not available") comes from within the first collective."""
    group.require_numpy()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numpy" else object())
    with pytest.raises(SettingsError, match="pip install numpy"):
        group.require_numpy()
