"""
The programs by which the tests read a bucket without Pillion, on what stock torch wrote.

Called from: pytest.
Must never: import Pillion: what reads here is to know nothing of it.
"""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from support.deadlines import Deadline
from support.object_stores.places import Place
from support.object_stores.stock_load import StockReader
from support.processes import Processes


def test_stock_torch_reads_a_bucket(
    stock_reader: StockReader, s3_bucket: Place, processes: Processes, tmp_path: Path
) -> None:
    """A checkpoint of stock torch, put into a bucket file by file, comes back equal, tensors and other values."""
    weight = torch.arange(6000, dtype=torch.bfloat16).reshape(100, 60)
    state = {"weight": weight, "step": 7, "empty": torch.empty(0, 3)}
    dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    client = s3_bucket.client(prefix="run/step-7")
    for path in (tmp_path / "saved").iterdir():
        client.put(path.name, path.read_bytes())
    out = tmp_path / "loaded"
    stock_reader.start(processes, s3_bucket, "run/step-7", out).check(Deadline.TORCH_START)
    loaded = torch.load(out)
    assert loaded.keys() == state.keys()
    assert torch.equal(loaded["weight"], weight)
    assert loaded["step"] == 7
    assert loaded["empty"].shape == (0, 3)
