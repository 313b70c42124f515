"""
The whole of: DCP's variables for garbage collection, in the executor.

Called from: pytest.
Must never: leave this process's own collection changed.
"""

import gc
import weakref
from collections.abc import Iterator

import pytest

from pillion_sidecar.executor import garbage


class Ring:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def collection() -> Iterator[None]:
    """This process's collection, as it was before."""
    enabled = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if enabled else gc.disable)()


@pytest.mark.parametrize(
    ("automatic", "manual", "left_alone", "collected"),
    [(None, None, True, False), ("0", "1", True, False), ("true", None, True, False), ("1", None, False, True), ("1", "1", False, False)],
)  # fmt: skip
def test_garbage_is_collected_as_dcps_own_process_does_it(
    collection: None, automatic: str | None, manual: str | None, left_alone: bool, collected: bool
) -> None:
    """Exactly "1" switches off: the automatic collection, for one behind each save; and that one, too."""
    gc.enable()
    asked = {garbage.AUTOMATIC_OFF: automatic, garbage.MANUAL_OFF: manual}
    of = garbage.Garbage({name: value for name, value in asked.items() if value is not None})
    assert gc.isenabled() is left_alone
    gc.disable()
    ring = weakref.ref(Ring())
    before = gc.get_freeze_count()
    of.saved()
    assert (ring() is None) is collected
    assert (gc.get_freeze_count() > before) is collected
    frozen = gc.get_freeze_count()
    of.saved()
    assert gc.get_freeze_count() <= frozen, "what is behind the first save is frozen once"
