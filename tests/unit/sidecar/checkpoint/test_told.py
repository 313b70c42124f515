"""
The whole of: the note of what a script was told, on a real folder.

Called from: pytest.
"""

from pathlib import Path

from pillion.wire import manifest, names
from pillion_sidecar.checkpoint import told
from pillion_sidecar.storage.local import LocalFolder


def commit(root: Path, step: int, generation: str) -> None:
    """A checkpoint as far as the note looks at it."""
    folder = root / names.step_directory(step)
    folder.mkdir(exist_ok=True)
    made = manifest.Manifest(
        step=step,
        generation=generation,
        run_id="run",
        world_size=1,
        plan_id="plan",
        created_ns=1,
        size_bytes=1,
        digest_algorithm="xxh3_128",
        metadata_digest="",
        parts=(),
    )
    (folder / names.MANIFEST).write_bytes(made.encode())
    (folder / names.COMMIT_MARKER).write_bytes(b"")


def test_news_is_what_was_committed_since_the_first_look_and_not_noted(tmp_path: Path) -> None:
    """In the order of the commits; a step that was saved again is news again; a checkpoint that is gone is none."""
    root = LocalFolder(str(tmp_path))
    commit(tmp_path, 1, "1")
    assert told.untold(root) == []
    for step, generation in ((30, "2"), (20, "3"), (1, "3-2")):
        commit(tmp_path, step, generation)
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-7" / names.COMMIT_MARKER).write_bytes(b"another program's")
    assert told.untold(root) == [30, 20, 1]
    for step in (30, 1, 99):
        told.note(root, step)
    assert told.untold(root) == [20]
    for name in (names.MANIFEST, names.COMMIT_MARKER):
        (tmp_path / "step-20" / name).unlink()
    assert told.untold(root) == []


def test_a_damaged_note_is_a_first_look(tmp_path: Path) -> None:
    """Nothing is told twice for it."""
    root = LocalFolder(str(tmp_path))
    assert told.untold(root) == []
    commit(tmp_path, 1, "1")
    for text in ("", "[]", '{"told": 1}', '{"told": {"x": "1"}}'):
        (tmp_path / names.INTERNAL_DIR / told.TOLD).write_text(text)
        assert told.untold(root) == []
        assert told.untold(root) == []
