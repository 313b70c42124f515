"""
Chooses the package `pillion` of a trainer: the client installed in its image if it speaks the sidecar's protocol, otherwise the client from
the sidecar's image.

`pillion-sidecar client` installs this file as `pillion/__init__.py` in a directory of PYTHONPATH, with the sidecar's client below it.
PYTHONPATH comes before installed packages, so `import pillion` finds this file. It searches the rest of sys.path, chooses a package, and
becomes that package. The module object stays the same, so that other threads wait for it as for any import.

Called from: the import system of a trainer. The sidecar itself never imports it.
Must never: import torch, or any module of Pillion before the choice; use syntax that Python 3.6 cannot read (an older interpreter must reach
the error that names the needed version); leave names of its own in the package.
"""

import logging
import os
import re
import sys
from importlib import machinery
from typing import Any

BUNDLED = "bundled"
"""Name of the directory beside this file with the sidecar's package `pillion`."""
MIN_PYTHON = (3, 11)
"""Oldest Python for the sidecar's client, as in `requires-python` of client/pyproject.toml."""
PROTOCOL = re.compile(rb"^PROTOCOL_VERSION\b[^=\n]*=\s*(\d+)", re.MULTILINE)


def protocol(spec: Any) -> int:
    """Return the PROTOCOL_VERSION of a package without importing it. -1 if the package has none."""
    try:
        match = PROTOCOL.search(spec.loader.get_data(os.path.join(os.path.dirname(spec.origin), "wire", "__init__.py")))
    except (AttributeError, TypeError, OSError):  # a namespace package, or somebody else's package of this name
        return -1
    return int(match.group(1)) if match else -1


def installed(shim_folder: str) -> Any:
    """Return the spec of the `pillion` that this interpreter would import without this file. None if there is none."""
    shim_entry = os.path.realpath(os.path.dirname(shim_folder))
    other_entries = [entry for entry in sys.path if os.path.realpath(entry or os.getcwd()) != shim_entry]
    for finder in sys.meta_path:
        # Editable installs have their own finders. Only PathFinder searches sys.path.
        spec = finder.find_spec("pillion", other_entries if finder is machinery.PathFinder else None)
        if spec is None or not spec.origin or not spec.loader:
            continue
        if os.path.realpath(os.path.dirname(spec.origin)) != os.path.realpath(shim_folder):
            return spec
    return None


def choose(shim_folder: str) -> Any:
    """
    Return the spec of the chosen package.

    Raises:
        ImportError: the choice is the sidecar's client, and this interpreter is too old for it.
    """
    own = machinery.PathFinder.find_spec("pillion", [os.path.join(shim_folder, BUNDLED)])
    other = installed(shim_folder)
    log = logging.getLogger("pillion")
    version = protocol(own)
    if other is not None and protocol(other) == version:
        log.info("pillion: %s is used: it is installed, and speaks the sidecar's protocol %d", other.origin, version)
        return other
    if sys.version_info < MIN_PYTHON:
        needed = ".".join(str(number) for number in MIN_PYTHON)
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
            version,
        )
    return own


def become(module: Any, chosen: Any) -> Any:
    """Turn `module` into the package of the spec `chosen`. Return the code that must then run in it."""
    # The spec object stays the same, because the import system marks in it that the import is in progress.
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
