"""
The whole of: what the arguments of DCP's calls mean: the sidecar's business, torch's own, or an error.

Called from: pytest.
"""

import os
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as stock
from torch.distributed.checkpoint import staging

import pillion
from pillion import dcp
from pillion import dcp_options as options
from pillion.wire.save_messages import Destination

PLAIN = staging.StagingOptions(False, False, False, False)
BESIDE = staging.StagingOptions(False, False, True, False)


class Stager(staging.BlockingAsyncStager):
    """Somebody's own, which changes what is saved."""


def test_a_local_path_is_a_directory_whoever_writes_to_it(tmp_path: Path) -> None:
    """A path, an address of a local file, and torch's two writers with either name the same directory; `overwrite` is kept."""
    path = str(tmp_path / "one")
    for where in (path, f"file://{path}", f"local://{path}", os.path.relpath(path)):
        assert options.destination(where, None) == Destination(path=path)
        assert options.destination(None, stock.FsspecWriter(where)) == Destination(path=path)
        assert options.source(where, None, None) == (path, True)
        assert options.source(None, stock.FsspecReader(where), None) == (path, True)
    kept = Destination(path=path, overwrite=False)
    assert options.destination(None, stock.FsspecWriter(f"file://{path}", overwrite=False)) == kept
    assert options.destination(path, stock.FileSystemWriter("other", overwrite=False)) == kept
    assert options.source(path, stock.FileSystemReader("other"), None) == (path, True)


def test_the_url_of_a_bucket_goes_to_the_sidecar_unless_a_writer_or_reader_of_torch_names_it() -> None:
    """The sidecar opens it with credentials of its own, and would not know those of an object of torch."""
    assert options.destination("s3://bucket/one", None).path == "s3://bucket/one"
    assert options.source("s3://bucket/one", None, None) == ("s3://bucket/one", True)
    with pytest.raises(options.Unmapped, match="is not a directory"):
        options.destination("s3://bucket/one", stock.FileSystemWriter("other"))


@pytest.mark.parametrize("where", ["gcs://bucket/one", "file://host/one", "memory://one", "simplecache::file:///one"])
def test_an_address_that_is_no_directory_is_not_the_sidecars(where: str) -> None:
    """It is another error than a wrong call: torch itself may write to it, and read from it."""
    with pytest.raises(options.Unmapped, match="is not a directory"):
        options.destination(where, None)
    with pytest.raises(options.Unmapped, match="is not a directory"):
        options.source(where, None, None)


def test_a_load_takes_the_planner_that_torch_would_take_by_default() -> None:
    """With `allow_partial_load` what the checkpoint lacks is no error; every other planner and reader is torch's own business."""
    assert options.source("one", None, stock.DefaultLoadPlanner())[1] is True
    assert options.source("one", None, stock.DefaultLoadPlanner(allow_partial_load=True))[1] is False

    class Planner(stock.DefaultLoadPlanner):
        pass

    class Reader(stock.FileSystemReader):
        pass

    for reader, planner in (
        (None, Planner()),
        (None, stock.DefaultLoadPlanner(flatten_state_dict=False)),
        (Reader("one"), None),
    ):
        with pytest.raises(options.Unmapped):
            options.source("one", reader, planner)
    with pytest.raises(pillion.UsageError, match="checkpoint_id"):
        options.source(None, None, None)


def test_a_stager_of_torchs_is_not_called_and_another_is() -> None:
    """The options of torch's stagers have no effect, except for the response. A user's stager may change what is saved."""
    assert options.staging(None) == options.Staging()
    assert options.staging(staging.DefaultStager(PLAIN)) == options.Staging()
    assert options.staging(staging.BlockingAsyncStager()) == options.Staging()
    assert options.staging(stock.FileSystemWriter("one")) == options.Staging()
    beside = staging.DefaultStager(BESIDE)
    assert options.staging(beside) == options.Staging(responds=True)
    beside.close()
    own = Stager()
    assert options.staging(own) == options.Staging(own)
    with pytest.raises(pillion.UsageError, match="async_stager must be an AsyncStager"):
        options.staging(object())


def test_a_save_that_is_not_the_sidecars_is_torchs_own(tmp_path: Path) -> None:
    """`save` and `load` hand over a writer, a reader and planners that are objects of the caller's; `async_save` refuses them."""
    seen: list[str] = []

    class Writer(stock.FileSystemWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            seen.append("finish")
            super().finish(metadata, results)

    class Planner(stock.DefaultLoadPlanner):
        def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
            seen.append("commit")
            super().commit_tensor(read_item, tensor)

    class Reader(stock.FileSystemReader):
        def read_data(self, plan: Any, planner: Any) -> Any:
            seen.append("read")
            return super().read_data(plan, planner)

    state = {"w": torch.arange(3.0)}
    made = dcp.save(state, storage_writer=Writer(tmp_path / "one"))
    assert isinstance(made, stock.Metadata)
    into = {"w": torch.zeros(3)}
    dcp.load(into, checkpoint_id=tmp_path / "one", storage_reader=Reader(tmp_path), planner=Planner())
    assert torch.equal(into["w"], state["w"])
    assert seen == ["finish", "read", "commit"]
    with pytest.raises(pillion.UsageError, match=r"pillion\.dcp\.Writer"):
        dcp.async_save(state, storage_writer=Writer(tmp_path / "two"))
    with pytest.raises(pillion.UsageError, match="leave the planner out"):
        dcp.save(
            state,
            storage_writer=dcp.Writer("torch.distributed.checkpoint:FileSystemWriter"),
            planner=stock.DefaultSavePlanner(flatten_state_dict=False),
        )


def test_what_somebodys_own_stager_makes_is_whole_before_it_is_saved() -> None:
    """A future is waited for, and leads to a response. A stager that must be synchronized is, without its warning."""

    class Late(Stager):
        _synchronize_after_execute = True

        def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            self.staged = {"w": None}
            return self.staged

        def synchronize_staging(self) -> None:
            self.staged["w"] = torch.ones(2)  # type: ignore[assignment] # not before

    staged, responds = dcp._staged(Late(), {"w": torch.ones(2)})
    assert torch.equal(staged["w"], torch.ones(2))
    assert not responds

    class Future(Stager):
        def stage(self, state_dict: dict[str, Any]) -> Any:
            future: futures.Future[dict[str, Any]] = futures.Future()
            future.set_result({"w": state_dict["w"].half()})
            return future

    staged, responds = dcp._staged(Future(), {"w": torch.ones(2)})
    assert staged["w"].dtype is torch.float16
    assert responds
