"""
Finds the class of a `StorageWriter` by its name. Called from: `executor.save.dcp_writer`.

Must never: call the object that a name stands for. A name may stand for any callable, and a call runs in the process with the credentials.
"""

from __future__ import annotations

import importlib

from torch.distributed.checkpoint import StorageWriter


def find(name: str) -> type[StorageWriter]:
    """
    Import the class that ``package.module:Class`` names.

    Raises:
        TypeError: the name is not that of a class derived from DCP's `StorageWriter`.
        ImportError, AttributeError: there is no module or class of this name.
    """
    module, _, qualname = name.partition(":")
    attribute: object = importlib.import_module(module)
    for part in qualname.split("."):
        attribute = getattr(attribute, part)
    if not isinstance(attribute, type) or not issubclass(attribute, StorageWriter):
        raise TypeError(
            f"{name} is no StorageWriter: a class derived from torch.distributed.checkpoint.StorageWriter is needed"
        )
    return attribute
