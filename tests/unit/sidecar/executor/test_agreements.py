"""
The whole of: what the pods remember of layouts and plans: the newest few, and never less than somebody looks for.

Called from: pytest.
"""

import dataclasses
import random
import types
from pathlib import Path
from typing import Any, cast

import pytest

from pillion.wire import layout, policy
from pillion.wire.save_messages import Destination
from pillion_sidecar import channel
from pillion_sidecar.checkpoint import commit
from pillion_sidecar.executor import plan as plan_module
from pillion_sidecar.executor.agreements import KEPT_PLANS, Agreements, layout_name, plan_name
from pillion_sidecar.executor.exchange import protocol
from pillion_sidecar.executor.save import persist
from pillion_sidecar.executor.session import Context
from pillion_sidecar.storage.local import LocalFolder
from support import contexts
from support.parts import write_part

PODS = 3
ROUNDS = 60


def alone(root: str) -> tuple[Context, protocol.LocalExchange]:
    """A session of one pod."""
    between = protocol.LocalExchange(0)
    return contexts.of_pod(root, between), between


def slot_image_of(of: layout.Layout) -> Any:
    """A rank's snapshot, as far as pods agree on it."""
    return types.SimpleNamespace(layout=of, opaque_lengths=(1,) * len(of.opaque))


def test_a_place_that_a_clock_ahead_has_written_to_is_not_shut(tmp_path: Path) -> None:
    """Without a root (`pillion.dcp`) generations are times: a save was fenced off for as long as another run's clock had been ahead."""
    context, _ = alone("")
    context.generation = 100
    folder = tmp_path / "latest"
    folder.mkdir()
    write_part(folder, 0, world_size=1, generation="5000-1")
    commit.finish(LocalFolder(str(folder)))
    request = channel.Persist(
        step=1,
        slot=0,
        persist=True,
        sequence=2,
        destination=Destination(path=str(folder)),
        retention=policy.Retention(),
    )
    persist._agree(context, request, "save/0/1", {0: slot_image_of(layout.Layout((), ("a",), {"a": ("a",)}))}, {})
    assert context.generation == 5001
    elsewhere = dataclasses.replace(request, step=2, destination=Destination(path=str(tmp_path / "new")))
    persist._agree(context, elsewhere, "save/0/2", {0: slot_image_of(layout.Layout((), ("a",), {"a": ("a",)}))}, {})
    assert context.generation == 5001, "it never goes back"


def test_a_layout_that_is_new_with_each_save_leaves_nothing_behind(tmp_path: Path) -> None:
    """A list of dicts that grows (a trainer's log history) made executor and store grow with each save, for as long as the session."""
    context, between = alone(str(tmp_path))
    sizes = []
    for step in range(1, 30):
        names = tuple(f"history.{number}" for number in range(step))
        found = layout.Layout((), names, {name: (name,) for name in names})
        request = cast("channel.Persist", types.SimpleNamespace(step=step, persist=step % 3 > 0, destination=None))
        plan = persist._agree(context, request, f"save/0/{step}", {0: slot_image_of(found)}, {})
        assert plan.plan_id == plan_module.plan_id({0: found.digest})
        sizes.append((len(between._published), len(between._posted), len(context.agreed.layouts)))
    published, posted, remembered = (max(each) for each in zip(*sizes, strict=True))
    assert (posted, remembered) == (1, KEPT_PLANS)
    assert published <= 2 * (KEPT_PLANS + 1) + 1, (
        "layouts and plans, those that leave with the next save, and the decision"
    )


class Store:
    """What is published, and the pods that look for it."""

    def __init__(self, seed: int) -> None:
        self.drawn = random.Random(seed)
        self.names: set[str] = set()
        self.coordinator = Agreements()
        self.pods = [self.coordinator, *(Agreements() for _ in range(PODS - 1))]
        self.fresh = 0

    def save(self) -> None:
        """All pods agree on one save, whose layouts are old or new."""
        digests = {rank: self.draw() for rank in range(PODS)}
        for rank, pod in enumerate(self.pods):
            if digests[rank] not in pod.layouts:
                self.names.add(layout_name(digests[rank]))
                pod.layouts[digests[rank]] = cast("layout.Layout", object())
        gone = self.coordinator.settle(digests)
        plan_id = plan_module.plan_id(digests)
        if self.coordinator.plan(plan_id) is None:
            for digest in set(digests.values()) - self.coordinator.layouts.keys():
                assert layout_name(digest) in self.names, "the coordinator waits for a layout that nobody publishes"
                self.coordinator.layouts[digest] = cast("layout.Layout", object())
            self.names.add(plan_name(plan_id))
            self.coordinator.remember(plan_module.Plan(plan_id, {}, {}))
        decision = self.coordinator.notice()
        self.names -= set(gone)
        for pod in self.pods:
            if pod is not self.coordinator and self.drawn.random() < 0.1:
                pod.forget()
                continue
            pod.hear(decision)
            assert pod.plan(plan_id) or plan_name(plan_id) in self.names, "a pod waits for a plan that is gone"
            pod.remember(plan_module.Plan(plan_id, {}, {}))

    def draw(self) -> str:
        self.fresh += 1
        return self.drawn.choice(["always", f"one of {self.drawn.randrange(6)}", f"new {self.fresh}"])


@pytest.mark.parametrize("seed", range(20))
def test_no_pod_waits_for_what_another_has_forgotten(seed: int) -> None:
    """Layouts come, go and come again; pods miss decisions, and executors are replaced; what is published stays bounded."""
    of = Store(seed)
    for _ in range(ROUNDS):
        of.save()
        assert len(of.names) <= 2 * (KEPT_PLANS + 1) * (PODS + 1)
        assert all(len(pod.layouts) <= 2 * KEPT_PLANS * PODS for pod in of.pods)
        if of.drawn.random() < 0.1:
            of.pods[of.drawn.randrange(1, PODS)] = Agreements()
    for _ in range(ROUNDS):
        of.save()
        if of.drawn.random() < 0.1:
            of.coordinator = of.pods[0] = Agreements()
