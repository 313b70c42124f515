"""
The whole of: what the coordinator of a save asks of the exchange, of which every request costs a job of many pods time.

Called from: pytest.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from pillion.wire import policy
from pillion_sidecar import channel
from pillion_sidecar.executor.exchange import protocol
from pillion_sidecar.executor.save import persist
from support import contexts


class Recorded(protocol.LocalExchange):
    """An exchange of one pod that notes what it is asked for."""

    def __init__(self) -> None:
        super().__init__(0)
        self.received: list[str] = []
        self.forgotten: list[str] = []
        self.unpublished: list[str] = []

    def receive(self, phase: str, timeout_s: float, look: Callable[[], None] = protocol.nothing) -> protocol.Document:
        self.received.append(phase)
        return super().receive(phase, timeout_s, look)

    def forget(self, phases: Sequence[str]) -> None:
        self.forgotten += phases
        super().forget(phases)

    def unpublish(self, phases: Sequence[str]) -> None:
        self.unpublished += phases
        super().unpublish(phases)

    @property
    def left(self) -> set[str]:
        return {*self._posted, *self._published}


def saved(root: Path, between: Recorded, num_saves: int) -> None:
    """Save steps 1, 2 and so on, with nothing in them."""
    context = contexts.of_pod(root, between)
    for step in range(1, num_saves + 1):
        request = channel.Persist(step=step, slot=0, persist=True, retention=policy.Retention())
        outcome = persist.persist_images(context, request, persist.phase_of(context, step, persist=True), {}, {}, 0.0)
        assert (root / f"step-{step}" / ".metadata").exists(), outcome


def test_the_coordinator_does_not_ask_for_what_it_has_published(tmp_path: Path) -> None:
    """Neither for its decision nor for its outcome: the store answers all other pods first, which wait for them."""
    between = Recorded()
    saved(tmp_path, between, 2)
    assert between.received == []


def test_a_save_s_documents_are_deleted_at_the_next_one_and_no_name_that_never_was(tmp_path: Path) -> None:
    """A phase is deleted by a request for each pod. An outcome is only published, and is deleted by one."""
    between = Recorded()
    saved(tmp_path, between, 2)
    assert sorted(between.forgotten) == ["save/0/1/0/result", "save/0/1/plan"]
    assert "save/0/1/0/outcome" in between.unpublished
    assert not [name for name in between.left if name.startswith("save/0/1/")]
