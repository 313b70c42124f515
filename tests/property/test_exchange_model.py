"""
The whole of: the exchanges against a model that is obviously right, a dict of what was said, under any order of arrival.

Called from: pytest.
Must never: use a store that is no TCPStore, or a folder that is none: what they do with an order is what matters.
"""

import contextlib
import functools
import itertools
import shutil
import tempfile
from concurrent import futures
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from pillion.errors import BarrierTimeout
from pillion_sidecar.executor.exchange import protocol, tcpstore, torch_store
from pillion_sidecar.executor.exchange.storage import StorageExchange
from pillion_sidecar.storage.local import LocalFolder
from support.deadlines import Deadline

SOON_S: Final = 0.02
"""Bound of a wait for what is not there."""
PHASES: Final = ("save/0/1/plan", "save/0/1/0/result", "save/0/10/plan", "load/1/0/choice")
documents: Final = st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4) | st.none(), max_size=3)
_sessions: Final = itertools.count()


@functools.cache
def the_store() -> Any:
    """One store for all examples; each has a prefix of its own."""
    keep, view = tcpstore.host("127.0.0.1", "pillion/tests")
    view.close()
    return keep


def local(pods: list[list[int]], root: str) -> list[protocol.Exchange]:
    """All ranks in one pod."""
    return [protocol.LocalExchange(pods[0][0])]


def over_a_store(pods: list[list[int]], root: str) -> list[protocol.Exchange]:
    """Every pod's end over one real store."""
    # In this process, as a store of torch looks up the name of each client that connects, which may take seconds.
    view = torch_store.TorchStore(the_store(), f"pillion/tests/{next(_sessions)}")
    return [tcpstore.StoreExchange(view, None, pods, pod[0]) for pod in pods]


def over_storage(pods: list[list[int]], root: str) -> list[protocol.Exchange]:
    """Every pod's end over one folder."""
    session = f"{next(_sessions):032x}"
    return [StorageExchange(LocalFolder(root), session, pods, pod[0]) for pod in pods]


class Exchanges(RuleBasedStateMachine):
    """Pods that post, a coordinator that collects and publishes, all of them in any order and some of it twice."""

    kind = staticmethod(local)
    most_pods = 1

    @initialize(num_pods=st.integers(1, 4), per_pod=st.integers(1, 3))
    def begin(self, num_pods: int, per_pod: int) -> None:
        num_pods = min(num_pods, self.most_pods)
        # Ranks of a pod need not follow each other; rank 0 is in the coordinator's.
        self.pods = [list(range(first, num_pods * per_pod, num_pods)) for first in range(num_pods)]
        self.root = tempfile.mkdtemp(prefix="pillion-exchange-")
        self.ends = self.kind(self.pods, self.root)
        self.posted: dict[tuple[str, int], Any] = {}
        self.published: dict[str, Any] = {}

    @rule(phase=st.sampled_from(PHASES), document=documents, pod=st.integers(0, 3))
    def post(self, phase: str, document: dict[str, Any], pod: int) -> None:
        """A part; an executor's successor says it again, and the last word counts."""
        pod %= len(self.pods)
        self.ends[pod].post(phase, document)
        self.posted[phase, self.pods[pod][0]] = document

    @rule(phase=st.sampled_from(PHASES), document=documents)
    def publish(self, phase: str, document: dict[str, Any]) -> None:
        """The coordinator's decision."""
        self.ends[0].publish(phase, document)
        self.published[phase] = document

    @rule(phase=st.sampled_from(PHASES))
    def collect(self, phase: str) -> None:
        """Everybody's part, or exactly the ranks of those that said nothing."""
        missing = [rank for pod in self.pods if (phase, pod[0]) not in self.posted for rank in pod]
        if not missing:
            expected = {pod[0]: self.posted[phase, pod[0]] for pod in self.pods}
            assert self.ends[0].collect(phase, 5.0) == expected
            return
        with pytest.raises(BarrierTimeout) as caught:
            self.ends[0].collect(phase, SOON_S)
        # Within one pod there is nobody to wait for but the pod itself.
        assert set(caught.value.missing) <= set(missing)
        assert self.most_pods == 1 or sorted(caught.value.missing) == sorted(missing)

    @rule(phase=st.sampled_from(PHASES), pod=st.integers(0, 3))
    def receive(self, phase: str, pod: int) -> None:
        """The decision as it was published last, by any pod."""
        end = self.ends[pod % len(self.pods)]
        if phase in self.published:
            assert end.receive(phase, 5.0) == self.published[phase]
            return
        with pytest.raises(BarrierTimeout) as caught:
            end.receive(phase, SOON_S)
        assert caught.value.phase == phase
        assert {0} <= set(caught.value.missing) <= set(self.pods[0]), "it is the coordinator's pod that is missing"

    @rule(phases=st.lists(st.sampled_from(PHASES), max_size=2))
    def forget(self, phases: list[str]) -> None:
        """What every pod has left is gone, nothing else; forgetting twice does no harm."""
        self.ends[0].forget(phases)
        for phase in phases:
            self.published.pop(phase, None)
            self.posted = {key: document for key, document in self.posted.items() if key[0] != phase}

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root, ignore_errors=True)


class StoreExchanges(Exchanges):
    kind = staticmethod(over_a_store)
    most_pods = 4


class StorageExchanges(Exchanges):
    kind = staticmethod(over_storage)
    most_pods = 4


@given(order=st.permutations(range(4)))
@settings(max_examples=8, deadline=None)
def test_pods_that_arrive_in_any_order_end_with_the_same_decision(order: list[int]) -> None:
    """Each pod in a thread, with a connection of its own; the coordinator may come first, last or in between."""
    pods = [[rank] for rank in range(len(order))]
    prefix, port = f"pillion/tests/{next(_sessions)}", the_store().port

    def one(first: int) -> protocol.Document:
        with contextlib.closing(tcpstore.connect("127.0.0.1", port, prefix)) as client:
            end = tcpstore.StoreExchange(client, None, pods, first)
            for phase in PHASES:
                end.post(phase, {"from": first, "phase": phase})
                if first == 0:
                    end.publish(
                        phase, {str(pod): document for pod, document in end.collect(phase, Deadline.REPLY.s).items()}
                    )
                decision = end.receive(phase, Deadline.REPLY.s)
                assert decision == {str(pod[0]): {"from": pod[0], "phase": phase} for pod in pods}
            return decision

    with futures.ThreadPoolExecutor(len(order)) as pool:
        decisions = [future.result(Deadline.SETTLE.s) for future in [pool.submit(one, first) for first in order]]
    assert all(each == decisions[0] for each in decisions)


TestLocal = Exchanges.TestCase
TestLocal.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestStore = StoreExchanges.TestCase
TestStore.settings = settings(max_examples=10, stateful_step_count=15, deadline=None)
TestStorage = StorageExchanges.TestCase
TestStorage.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
