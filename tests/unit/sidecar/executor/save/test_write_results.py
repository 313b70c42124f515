"""What a plugged-in writer's results count for; whatever they are, they are handed to its `finish` as they are."""

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from pillion_sidecar.executor.save import dcp_writer


def test_only_results_that_name_a_size_are_counted() -> None:
    """Lists of `WriteResult` add up; dictionaries, nothing at all, and sizes that are none count as 0."""
    typed = [WriteResult(MetadataIndex("a"), 10, None), WriteResult(MetadataIndex("b"), 5, None)]
    assert dcp_writer.count_bytes([typed, tuple(typed)]) == 30
    assert dcp_writer.count_bytes([[{"success": True, "bytes_written": 100}], [], None, 7, "done"]) == 0
    assert dcp_writer.count_bytes([typed, [WriteResult(MetadataIndex("c"), -1, None)], [object()]]) == 15
