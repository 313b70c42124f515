"""
The whole of: that a writer's name is a class of DCP's before anything is called.

Called from: pytest.
"""

import pytest
from torch.distributed.checkpoint import FileSystemWriter

from pillion_sidecar.executor.save import writer_class


def test_a_writer_is_found_by_its_name() -> None:
    """A class derived from DCP's StorageWriter, at the top of a module or within another object."""
    assert writer_class.find("torch.distributed.checkpoint:FileSystemWriter") is FileSystemWriter


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "torch.distributed.checkpoint:StorageReader"])
def test_what_is_no_storage_writer_is_refused_before_it_is_called(name: str) -> None:
    """A name may stand for any callable: a function, a class of another kind."""
    with pytest.raises(TypeError, match="is no StorageWriter"):
        writer_class.find(name)
