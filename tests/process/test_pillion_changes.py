"""
The whole of: `pillion` where it writes: exports, copies, pins and prunes, with what trainings, stock torch and safetensors make of the result.

Called from: pytest.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

import pytest
import safetensors.torch as reference
import torch
from torch.distributed import checkpoint as stock

from pillion import checkpointer
from pillion_sidecar.cli import copying, main, reading
from pillion_sidecar.cli.exits import Exit
from pillion_sidecar.storage.local import LocalFolder
from pillion_sidecar.storage.objects import ObjectFolder
from process.ranks import Ranks
from support.deadlines import Deadline
from support.object_stores import behind
from support.object_stores.places import Place

LARGE: Final = 100_003


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tensor need not be large to be read in several."""
    monkeypatch.setattr(reading, "STRETCH_BYTES", 1 << 16)


def state_of(step: int) -> dict[str, Any]:
    model = {
        "embed": (torch.arange(LARGE) + step).to(torch.bfloat16).reshape(LARGE, 1),
        "scalar": torch.tensor(float(step)),
        "empty": torch.zeros(0, 3),
        "same": torch.ones(7, dtype=torch.int8),
    }
    return {"model": model, "opt": {"exp_avg": torch.full((5, 6), step / 3, dtype=torch.float64), "step": step}}


@pytest.fixture
def opened(ranks: Ranks, tmp_path: Path) -> checkpointer.Checkpointer:
    """A training that has saved steps 1, 2 and 3, and that goes on."""
    opened = ranks.open(tmp_path / "run", retention={"keepLast": 9})
    for step in (1, 2, 3):
        opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
    return opened


@pytest.fixture
def root(opened: checkpointer.Checkpointer, tmp_path: Path) -> Path:
    """Its root, when it has ended."""
    opened.close()
    return tmp_path / "run"


def said_by(capsys: pytest.CaptureFixture[str], *arguments: object, status: Exit = Exit.WELL) -> tuple[str, str]:
    """Standard output and standard error of a command that ends with this status."""
    assert main.main(list(map(str, arguments))) == status
    said = capsys.readouterr()
    return said.out, said.err


def steps_of(capsys: pytest.CaptureFixture[str], root: object, *more: object) -> list[int]:
    return [each["step"] for each in json.loads(said_by(capsys, "ls", root, "-o", "json", *more)[0])]


def holds(state: dict[str, torch.Tensor], step: int, prefix: str = "model.") -> bool:
    wanted = state_of(step)["model"]
    return set(state) == {prefix + name for name in wanted} and all(
        state[prefix + name].dtype == wanted[name].dtype and torch.equal(state[prefix + name], wanted[name])
        for name in wanted
    )


def test_an_export_is_what_safetensors_and_torch_load(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards with an index, one file, and a .pt file, bit for bit; what is no tensor is named; nothing else is left in the directory."""
    out = tmp_path / "hf"
    said_by(capsys, "export", root, 2, out, "--include", "model.*", "--strip", "model.", "--max-shard-size", "100KB")
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert {path.name for path in out.iterdir()} == {*weight_map.values(), "model.safetensors.index.json"}
    assert len(set(weight_map.values())) == 2
    loaded = {name: reference.load_file(out / file)[name] for name, file in weight_map.items()}
    assert holds(loaded, 2, prefix="")

    one = tmp_path / "one.safetensors"
    _, told = said_by(capsys, "export", root, "latest", one, "--prefix", "a.")
    assert "left out, as they are no tensors: opt.step" in told
    loaded = reference.load_file(one)
    assert torch.equal(loaded.pop("a.opt.exp_avg"), state_of(3)["opt"]["exp_avg"])
    assert holds(loaded, 3, prefix="a.model.")

    said_by(capsys, "export", f"{root}/step-1", "1", tmp_path / "x.pt", status=Exit.USAGE)
    said_by(capsys, "export", root, "step-1", tmp_path / "x.pt", "--exclude", "opt.*")
    assert holds(torch.load(tmp_path / "x.pt"), 1)


def test_an_export_replaces_another_only_by_force(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By force no shard of the other one stays beside it; files of other names do."""
    out = tmp_path / "hf"
    said_by(capsys, "export", root, 2, out, "--max-shard-size", "100KB")
    (out / "config.json").write_text("{}")
    _, told = said_by(capsys, "export", root, 3, out, status=Exit.USAGE)
    assert "name another directory, or give --force" in told
    said_by(capsys, "export", root, 3, out, "--force")
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    _, told = said_by(capsys, "export", root, 3, out / "model.safetensors", status=Exit.USAGE)
    assert f"{out}/model.safetensors exists" in told
    _, told = said_by(capsys, "export", root, 3, out / "config.json", status=Exit.USAGE)
    assert "is a file: name a directory" in told
    _, told = said_by(capsys, "export", root, 3, tmp_path / "y", "--max-shard-size", "much", status=Exit.USAGE)
    assert "a size such as 5GB, 500MB or 2Gi is allowed" in told


def damage(root: Path, step: int) -> None:
    """Change one byte of the large tensor."""
    [data] = (root / f"step-{step}").glob("*.distcp")
    with open(data, "r+b") as file:
        file.seek(LARGE)
        byte = file.read(1)
        file.seek(LARGE)
        file.write(bytes([byte[0] ^ 1]))


def test_of_a_damaged_checkpoint_nothing_is_exported_or_copied(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text names the tensor; no file is left that somebody could take for whole."""
    damage(root, 3)
    for out in ("hf", "one.safetensors", "x.pt"):
        _, told = said_by(capsys, "export", root, 3, tmp_path / "out" / out, status=Exit.FOUND)
        assert "'model.embed'" in told
    assert [path for path in (tmp_path / "out").rglob("*") if not path.is_dir()] == []
    _, told = said_by(capsys, "cp", root, tmp_path / "copy", status=Exit.FOUND)
    assert "nothing was copied, as the source is damaged" in told
    assert "'model.embed'" in told
    assert [path for path in (tmp_path / "copy").rglob("*") if not path.is_dir()] == []


def test_a_difference_is_found_by_digests_and_its_kind_is_told(
    root: Path, ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No value of two equally cut checkpoints is read. Added, removed, other shape, type, values and kind each have their word."""
    state = state_of(1)
    state["model"] |= {"embed": torch.ones(3), "new": torch.ones(1), "scalar": torch.tensor(1.0, dtype=torch.float16)}
    state["opt"] = {"step": torch.ones(1)}
    other = ranks.open(tmp_path / "other")
    other.save(state, 1).result(Deadline.COMMITTED.s)
    monkeypatch.setattr(LocalFolder, "read_into", None)
    found = json.loads(said_by(capsys, "diff", root / "step-1", tmp_path / "other", "-o", "json", status=Exit.FOUND)[0])
    assert {each["name"]: each["change"] for each in found["differences"]} == {
        "model.embed": "shape",
        "model.new": "added",
        "model.scalar": "dtype",
        "opt.exp_avg": "removed",
        "opt.step": "kind",
    }
    assert found["equal"] == 2
    found = json.loads(said_by(capsys, "diff", root / "step-1", "2", "-o", "json", status=Exit.FOUND)[0])
    assert {each["name"]: each["change"] for each in found["differences"]} == {
        "model.embed": "values",
        "model.scalar": "values",
        "opt.exp_avg": "values",
        "opt.step": "bytes",
    }
    assert main.main(["diff", str(root / "step-1"), "1"]) == Exit.WELL


def test_a_copy_is_loaded_by_trainings_and_by_stock_torch(
    root: Path, ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It equals its source; a training that begins there continues from it, and what that saves is newer than any copy."""
    copy = tmp_path / "copies" / "run"
    out, _ = said_by(capsys, "cp", f"{root}/step-3", copy)
    assert "verified" in out
    out, _ = said_by(capsys, "cp", root, copy, "--step", "3")
    assert "holds this checkpoint already" in out
    assert main.main(["diff", str(root), str(copy)]) == Exit.WELL
    assert main.main(["verify", str(copy)]) == Exit.WELL
    state = {"model": {name: torch.zeros_like(each) for name, each in state_of(0)["model"].items()}}
    stock.load(state, checkpoint_id=copy / "step-3", no_dist=True)
    assert torch.equal(state["model"]["embed"], state_of(3)["model"]["embed"])

    opened = ranks.open(copy)
    state = state_of(0)
    assert opened.load(state) == 3
    assert torch.equal(state["opt"]["exp_avg"], state_of(3)["opt"]["exp_avg"])
    opened.save(state_of(4), 4).result(Deadline.COMMITTED.s)
    opened.close()
    ranks.alone()
    said_by(capsys, "cp", root, copy, "--step", "2", "--pin")
    listed = {each["step"]: each for each in json.loads(said_by(capsys, "ls", copy, "-o", "json")[0])}
    assert [step for step, each in listed.items() if each["newest"]] == [4]
    assert listed[2]["pinned"] == ["people"]
    assert not any(each["leftBehind"] for each in listed.values())


def test_another_checkpoint_is_never_copied_over(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another one of the same step stays, and the text names it; a copy keeps its step."""
    shutil.copytree(root / "step-1", tmp_path / "copy" / "step-3")
    _, told = said_by(capsys, "cp", root, tmp_path / "copy", status=Exit.FOUND)
    assert f"{tmp_path}/copy/step-3 holds another checkpoint already" in told
    _, told = said_by(capsys, "cp", root, tmp_path / "copy" / "step-9", status=Exit.USAGE)
    assert "a copy keeps its step" in told
    _, told = said_by(capsys, "cp", root, root, status=Exit.USAGE)
    assert "cannot be copied onto itself" in told


def test_a_copy_through_a_bucket_comes_back_equal(
    root: Path, s3_bucket: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are cut at the size of objects on the way there. After an interruption only what is missing is sent."""
    for name, value in s3_bucket.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ObjectFolder, "object_bytes", 150_000)
    url, store = f"{s3_bucket.url}/run", ["--endpoint", s3_bucket.endpoint]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(copying, "_publish", stop)
        assert main.main(["cp", str(root), url, *store]) == Exit.INTERRUPTED
    assert behind.committed(s3_bucket, "run") == []
    sent = behind.files(s3_bucket, "run/step-3")
    assert len(sent) == 2
    s3_bucket.client().delete(f"run/step-3/{min(sent)}")
    with monkeypatch.context() as patched:
        written: list[str] = []
        original = copying._BucketWriter.begin

        def begin(self: Any, file: str, num_bytes: int) -> None:
            written.append(file)
            original(self, file, num_bytes)

        patched.setattr(copying._BucketWriter, "begin", begin)
        said_by(capsys, "cp", root, url, *store)
        assert written == [min(sent)]
    assert behind.committed(s3_bucket, "run") == [3]
    assert main.main(["verify", url, *store]) == Exit.WELL
    assert main.main(["diff", str(root), url, *store]) == Exit.WELL
    said_by(capsys, "cp", url, tmp_path / "back", *store)
    assert main.main(["diff", str(root), str(tmp_path / "back")]) == Exit.WELL
    said_by(capsys, "export", url, "3", tmp_path / "hf", "--include", "model.*", *store)
    assert holds(reference.load_file(tmp_path / "hf" / "model.safetensors"), 3)
    said_by(capsys, "pin", f"{url}/step-3", *store)
    assert [each for each in behind.files(s3_bucket, "run") if "pins" in each] == [".pillion/pins/step-3.people.json"]
    said_by(capsys, "unpin", f"{url}/step-3", *store)


def test_a_pinned_step_outlives_the_retention_of_a_running_training(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its sidecar keeps two checkpoints besides; after `unpin` the step goes with the next commit."""
    opened, root = ranks.open(tmp_path / "run", retention={"keepLast": 1}), tmp_path / "run"
    opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
    out, _ = said_by(capsys, "pin", root, 1, "--reason", "the paper")
    assert out == f"step 1 of {root} is pinned\n"
    for step in (2, 3):
        opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
    opened.close()
    ranks.alone()
    assert steps_of(capsys, root) == [1, 3]
    said_by(capsys, "unpin", root, 1)
    _, told = said_by(capsys, "unpin", root, 1, status=Exit.FOUND)
    assert "is not pinned with `pillion pin`" in told
    opened = ranks.open(root, retention={"keepLast": 1})
    assert opened.load(state_of(0)) == 3
    opened.save(state_of(4), 4).result(Deadline.COMMITTED.s)
    opened.close()
    ranks.alone()
    # Step 3 is the one that a load has verified last.
    assert steps_of(capsys, root) == [3, 4]


def test_prune_removes_what_it_has_said_and_nothing_before(
    opened: checkpointer.Checkpointer, tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run changes nothing; what a running training may be writing stays; what was torn goes when the training has ended."""
    root = tmp_path / "run"
    # Ahead of training, so that its own retention leaves it alone.
    (root / "step-9").mkdir()
    [data] = (root / "step-1").glob("*.distcp")
    shutil.copy(data, root / "step-9")
    before = sorted((root / f"step-{step}") for step in (1, 2, 3, 9))
    out, told = said_by(capsys, "prune", root, "--keep-last", 1)
    assert sorted(root.glob("step-*")) == before
    assert "--yes removes 2 steps" in told
    assert "not among those to keep" in out
    assert "--yes removes 2 steps" in said_by(capsys, "prune", root, "--max-bytes", "1")[1]
    assert "nothing to remove" in said_by(capsys, "prune", root, "--max-age", "1d", "--max-bytes", "1Gi")[1]
    _, told = said_by(capsys, "prune", root, "--torn")
    assert "nothing to remove" in told
    out = said_by(capsys, "prune", root, "--keep-last", 2, "--torn", "--yes", "-o", "json")[0]
    kept = [(2, "keep"), (3, "keep"), (9, "keep")]
    assert [(each["step"], each["action"]) for each in json.loads(out)] == [(1, "remove"), *kept]
    assert "uses the root, and may be writing it" in out
    assert steps_of(capsys, root) == [2, 3, 9]
    opened.save(state_of(4), 4).result(Deadline.COMMITTED.s)
    opened.close()
    ranks.alone()
    said_by(capsys, "prune", root, "--keep-last", 2, "--torn", "--yes")
    assert steps_of(capsys, root) == [3, 4]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "say what stays: --keep-last N"),
        (["--keep-every", "5"], "--keep-every needs --keep-last"),
        (["--max-age", "30"], "--max-age 30: a whole number from 1 to 999999 with a unit of s, m, h or d"),
        (["--max-bytes", "0"], "--max-bytes 0: a positive number of bytes"),
        (["--keep-last", "0"], "--keep-last 0: a whole number of at least 1 is allowed"),
    ],
)
def test_prune_without_a_rule_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    """Nobody removes everything by a slip."""
    os.mkdir(tmp_path / "run")
    assert told in said_by(capsys, "prune", tmp_path / "run", *arguments, status=Exit.USAGE)[1]
