"""
The whole of: which `pillion` a trainer gets: one that is installed in its image when its protocol is the sidecar's, else the
one that the sidecar's image brought.

`pillion-sidecar client` lays this file out as `pillion/__init__.py` in a folder of PYTHONPATH, with the sidecar's own client
below it. PYTHONPATH comes before what is installed, so this file is what `import pillion` finds. It looks further along
sys.path, chooses, and becomes the package that it chose: the same module object, so that other threads wait for it as for
any import.

Called from: the import system of a trainer. The sidecar itself never imports it.
Must never: import torch, or anything of Pillion before it has chosen; use syntax that Python 3.6 does not read (an older
interpreter has to get as far as the error that says so); leave names of its own in the package.
"""

import logging
import os
import re
import sys
from importlib import machinery
from typing import Any

BUNDLED = "bundled"
"""Folder beside this file in which the sidecar's own package `pillion` lies."""
LEAST_PYTHON = (3, 11)
"""What the sidecar's own client needs, as `requires-python` in client/pyproject.toml says."""
PROTOCOL = re.compile(rb"^PROTOCOL_VERSION\b[^=\n]*=\s*(\d+)", re.MULTILINE)


def protocol(spec: Any) -> int:
    """The PROTOCOL_VERSION of a package, read without importing it; -1 where it has none."""
    try:
        match = PROTOCOL.search(spec.loader.get_data(os.path.join(os.path.dirname(spec.origin), "wire", "__init__.py")))
    except (AttributeError, TypeError, OSError):  # a namespace package, or somebody else's package of this name
        return -1
    return int(match.group(1)) if match else -1


def installed(here: str) -> Any:
    """The spec of the `pillion` that this interpreter would find without this file; None where there is none."""
    ours = os.path.realpath(os.path.dirname(here))
    rest = [entry for entry in sys.path if os.path.realpath(entry or os.getcwd()) != ours]
    for finder in sys.meta_path:
        # Editable installs bring finders of their own; only the usual one looks along sys.path.
        spec = finder.find_spec("pillion", rest if finder is machinery.PathFinder else None)
        if spec is None or not spec.origin or not spec.loader:
            continue
        if os.path.realpath(os.path.dirname(spec.origin)) != os.path.realpath(here):
            return spec
    return None


def choose(here: str) -> Any:
    """
    The spec of the package to be.

    Raises:
        ImportError: it is to be the sidecar's own, which this interpreter is too old for.
    """
    own = machinery.PathFinder.find_spec("pillion", [os.path.join(here, BUNDLED)])
    other = installed(here)
    log = logging.getLogger("pillion")
    wanted = protocol(own)
    if other is not None and protocol(other) == wanted:
        log.info("pillion: %s is used: it is installed, and speaks the sidecar's protocol %d", other.origin, wanted)
        return other
    if sys.version_info < LEAST_PYTHON:
        needed = ".".join(str(number) for number in LEAST_PYTHON)
        raise ImportError(
            f"pillion needs Python {needed} or newer; {sys.executable} is Python {sys.version.split()[0]}"
        )
    if other is None:
        log.info("pillion: the sidecar's own client is used, as none is installed")
    else:
        log.warning(
            "pillion: the sidecar's own client is used: %s is installed, and its protocol is %s, the sidecar's is %d",
            other.origin,
            protocol(other) if protocol(other) >= 0 else "none",
            wanted,
        )
    return own


def become(module: Any, chosen: Any) -> Any:
    """Turn `module` into the package of the spec `chosen`; the code that has to run in it then."""
    # The spec stays the same object: the import system marks in it that the import is going on.
    own = module["__spec__"]
    own.origin, own.loader, own.cached = chosen.origin, chosen.loader, chosen.cached
    own.submodule_search_locations = list(chosen.submodule_search_locations)
    for name in [name for name in module if not name.startswith("__")]:
        del module[name]
    module.update(
        __file__=own.origin,
        __path__=own.submodule_search_locations,
        __loader__=own.loader,
        __cached__=own.cached,
    )
    return own.loader.get_code("pillion")


exec(become(globals(), choose(os.path.dirname(os.path.abspath(__file__)))))
