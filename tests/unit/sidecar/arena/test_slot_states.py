"""
The whole of: that a save's state has one writer, and that its table of states is true.

Called from: pytest.
"""

import ast
import dataclasses
import re
from pathlib import Path

import pillion_sidecar
from pillion.errors import ErrorDocument
from pillion.wire.policy import Overlap
from pillion_sidecar.arena import slots
from pillion_sidecar.arena.slots import Granted, Save, SaveState, SlotTable

FIELDS = {field.name for field in dataclasses.fields(Save)}


def written(tree: ast.AST) -> set[str]:
    """Attributes of other objects than `self` that are assigned to, or whose contents are changed by a method of set or dict."""
    targets = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets.append(node.target)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("add", "discard", "update", "clear", "pop", "setdefault")
        ):
            targets.append(node.func.value)
    found = {each for target in targets for each in ast.walk(target) if isinstance(each, ast.Attribute)}
    return {each.attr for each in found if not (isinstance(each.value, ast.Name) and each.value.id == "self")}


def test_nobody_but_the_slot_table_changes_a_save() -> None:
    """Every transition is a method of the table: what two modules change, neither can promise."""
    sources = Path(pillion_sidecar.__file__).parent.rglob("*.py")
    changed = {
        str(path): names
        for path in sources
        if path != Path(slots.__file__)
        and (names := written(ast.parse(path.read_text())) & (FIELDS - {"step", "slot"}))
    }
    assert changed == {}


def test_the_table_of_states_names_every_state_and_every_method_that_leaves_it() -> None:
    """What the module says is what the code has."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in str(slots.__doc__).splitlines()]
    table = {row[0]: row[2] for row in rows if len(row) == 3 and row[0] in set(SaveState)}
    assert list(table) == [state.value for state in SaveState]
    named = set(re.findall(r"\b(?:[a-z]+_[a-z]+|sealed|claim|lend|take|finish)\b", " ".join(table.values())))
    assert named == {name for name in named if hasattr(SlotTable, name)}


def test_a_snapshot_that_a_rescue_wants_while_the_executor_has_it_is_queued_again() -> None:
    """It was taken up for memory only: the end of that is not the end of the save."""
    table = SlotTable(2, [0], Overlap.WAIT)
    granted = table.claim(1, 0, persist=False)
    assert isinstance(granted, Granted)
    save = table.sealed(1, 0, now_ns=5)
    assert save is not None
    assert save.sealed_ns == 5
    assert table.next_to_persist() is save
    table.start_persist(save)
    assert table.next_to_persist() is None
    table.to_storage(save)
    assert table.finish(save, persisted=False, concluded=True)
    assert table.next_to_persist() is save
    table.start_persist(save)
    assert not table.finish(save, persisted=True, concluded=True)
    assert (save.state, save.persisted) == (SaveState.DONE, True)


def test_a_save_that_failed_on_a_rank_is_never_taken_up() -> None:
    """It has no whole state."""
    table = SlotTable(2, [0, 1], Overlap.WAIT)
    for rank in (0, 1):
        table.claim(1, rank, persist=True)
    table.sealed(1, 0)
    table.fail_rank(1, 1, ErrorDocument("StagingError", "x"))
    assert table.next_to_persist() is None


def test_a_whole_snapshot_that_loses_its_slot_is_kept_for_a_report() -> None:
    """Its trainer waits for its outcome: one that nobody reports counts as lost at the end of the script."""
    table = SlotTable(2, [0], Overlap.WAIT)
    for step in (1, 2, 3):
        assert isinstance(table.claim(step, 0, persist=False), Granted)
        table.sealed(step, 0)
    assert [save.step for save in table.overtaken] == [1]
    table.finish(table.saves[2], persisted=False)
    assert isinstance(table.claim(4, 0, persist=False), Granted)
    assert [save.step for save in table.overtaken] == [1], "what the executor had has its outcome already"
