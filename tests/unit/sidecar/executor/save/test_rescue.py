"""
The whole of: how the pods of a job agree on a rescue, and that none is left to wait for one by itself.

Called from: pytest.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pillion.errors import BarrierTimeout
from pillion_sidecar import channel
from pillion_sidecar.executor.exchange import storage
from pillion_sidecar.executor.save import rescue
from pillion_sidecar.executor.session import Context
from pillion_sidecar.storage.local import LocalFolder
from support import contexts
from support.deadlines import Deadline

PODS = ((0, 1), (2, 3))


def context(root: Path, first_rank: int, *, bound_s: float = Deadline.REPLY.s) -> Context:
    """A pod that meets the other one on storage."""
    between = storage.StorageExchange(LocalFolder(str(root)), contexts.SESSION, PODS, first_rank)
    return contexts.of_pod(
        root,
        between,
        pods=PODS,
        first_rank=first_rank,
        peer_timeout_s=bound_s / rescue.PEERS_SHARE,
        persist_timeout_s=bound_s,
    )


def ours(
    held: list[int], calls: list[str], persisted: Sequence[int] = (), born: Mapping[int, channel.Order] | None = None
) -> channel.Rescue:
    return channel.Rescue(held=tuple(held), persisted=tuple(persisted), calls=tuple(calls), born=born or {})


def agree(of: Context, held: list[int], calls: list[str], persisted: Sequence[int] = ()) -> channel.Agreed:
    return rescue.agree(of, ours(held, calls, persisted))


def test_a_pod_hears_which_of_its_snapshots_are_committed(tmp_path: Path) -> None:
    """One whose sidecar was stopped before it knew would keep the snapshot before for its peers, and have no slot for the next save."""
    pods = [context(tmp_path, 0), context(tmp_path, 2)]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(agree, pods, [[18, 20], [18, 20]], [["a"], ["a"]], [[], [10, 20]]))
    assert found == [channel.Agreed(step=None, persisted=(20,), calls=("a",))] * 2


def test_one_rescue_answers_what_any_pod_was_called_by(tmp_path: Path) -> None:
    """Two pods whose trainers die at once call each other: each has heard its own call, and none waits for a second rescue."""
    pods = [context(tmp_path, 0), context(tmp_path, 2)]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(agree, pods, [[5, 6, 7], [5, 6]], [["b"], ["a", "c"]]))
    assert found == [channel.Agreed(step=6, persisted=(), calls=("a", "b", "c"))] * 2
    assert [pod.rescues for pod in pods] == [1, 1]


def test_one_step_of_two_branches_is_not_one_snapshot(tmp_path: Path) -> None:
    """After a rollback one pod has saved step 3 again and the other one died before it: they persist what both hold of one branch."""
    born: list[Mapping[int, channel.Order]] = [{2: (1, 0), 3: (1, 1)}, {2: (1, 0), 3: (1, 0)}]
    pods = [context(tmp_path, 0), context(tmp_path, 2)]

    def both(of: Context, own: Mapping[int, channel.Order]) -> channel.Agreed:
        return rescue.agree(of, ours([2, 3], ["a"], born=own))

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(both, pods, born))
    assert found == [channel.Agreed(step=2, persisted=(), calls=("a",))] * 2


def test_a_pod_that_does_not_come_is_named_at_the_bound(tmp_path: Path) -> None:
    """Nothing can be persisted without it."""
    pod = context(tmp_path, 0, bound_s=0.05)
    with pytest.raises(BarrierTimeout) as caught:
        agree(pod, [5], ["a"])
    assert list(caught.value.missing) == [2, 3]


def one_too_late(folder: Path) -> list[Context]:
    """Two pods after a rescue that the second one was missing from; it has come since, and found so."""
    pods = [context(folder, 0, bound_s=0.05), context(folder, 2, bound_s=0.05)]
    for pod in pods:
        with pytest.raises(BarrierTimeout) as caught:
            agree(pod, [5], ["a"])
        assert list(caught.value.missing) == [2, 3]
        pod.peer_timeout_s = Deadline.REPLY.s / rescue.PEERS_SHARE
    return pods


def test_a_pod_that_came_too_late_meets_the_others_in_the_next_rescue(tmp_path: Path) -> None:
    """It learns that it was missed, at once, and not from what is left of that rescue what the next one decides."""
    pods = one_too_late(tmp_path)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(agree, pods, [[5, 6], [5]], [["b"], ["b"]]))
    assert found == [channel.Agreed(step=5, persisted=(), calls=("b",))] * 2
    assert [pod.rescues for pod in pods] == [2, 2]


def test_keys_of_a_rescue_go_when_every_pod_has_left_it(tmp_path: Path) -> None:
    """Also those of one that a pod was missing from: it has read them when it comes to a later one."""
    pods = one_too_late(tmp_path)
    for _ in range(2):
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(agree, pods, [[5], [5]], [["b"], ["b"]]))
    (folder,) = (tmp_path / ".pillion" / storage.MEETINGS).iterdir()
    assert {path.name.split(".")[1] for path in folder.iterdir() if path.name != storage.OPEN} == {"2"}
