"""
The class that the name of a `StorageWriter` stands for. Called from: `executor.save.dcp_writer`.

Must never: call what is found. A name may stand for any callable, and one that is called runs where the credentials are.
"""

from __future__ import annotations

import importlib

from torch.distributed.checkpoint import StorageWriter


def find(name: str) -> type[StorageWriter]:
    """
    Import what ``package.module:Class`` names.

    Raises:
        TypeError: it is no class of DCP's `StorageWriter`.
        ImportError, AttributeError: there is none of that name.
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
