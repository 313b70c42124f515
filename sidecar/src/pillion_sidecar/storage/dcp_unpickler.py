"""
The unpickler that reads DCP's `.metadata` and nothing else: this is the whole of what a pickle from storage may do to
us.

It knows the names that stock DCP of torch 2.6 to 2.15 writes, on whichever Python, and refuses every other. For each
name stands a class or function of this module, which keeps what the file says and acts on nothing. Called by
`dcp_metadata.decode`. It must never import what a file names, or let a file change an object that outlives the call.
"""

import io
import ntpath
import pickle
import pickletools
import posixpath
from collections.abc import Callable, Mapping
from typing import Any, Final, Never, TypeVar

from pillion_sidecar.storage import archive

METADATA_MODULE: Final = "torch.distributed.checkpoint.metadata"
FILESYSTEM_MODULE: Final = "torch.distributed.checkpoint.filesystem"

_T = TypeVar("_T")
_MEMO_PUTS: Final = ("PUT", "BINPUT", "LONG_BINPUT")
"""Opcodes that name the index at which they put something into the memo."""


class Instance:
    """An instance of one of DCP's dataclasses: the state that the file gives it, not looked at yet."""

    __slots__ = ("state",)
    state: Any

    # A method of its own, so that a BUILD aimed at the class itself fails instead of setting attributes on it.
    def __setstate__(self, state: object) -> None:
        self.state = state


class Metadata(Instance):
    __slots__ = ()


class TensorStorageMetadata(Instance):
    __slots__ = ()


class BytesStorageMetadata(Instance):
    __slots__ = ()


class ChunkStorageMetadata(Instance):
    __slots__ = ()


class TensorProperties(Instance):
    __slots__ = ()


class MetadataIndex(Instance):
    __slots__ = ()


class StorageMeta(Instance):
    __slots__ = ()


class StorageInfo(Instance):
    __slots__ = ()


class _Callable:
    """A class or function that the file may call; what it returns is plain."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> Never:
        raise ValueError("not a .metadata file of DCP: it sets attributes on a function")


_MEMORY_FORMATS: Final = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")


def _memory_format(value: object) -> str:
    if not isinstance(value, int) or not 0 <= value < len(_MEMORY_FORMATS):
        raise ValueError(f"not a memory format of DCP: {value!r}")
    return _MEMORY_FORMATS[value]


_MEM_FORMAT_ENCODING: Final = _Callable(_memory_format)


def _getattr(owner: object, name: object) -> str:
    """Python 3.11.2 (and neighbours) pickles an enum's member as getattr(class, name); this is for that and no more."""
    if owner is not _MEM_FORMAT_ENCODING or name not in _MEMORY_FORMATS:
        raise ValueError(
            f"refused: the file uses builtins.getattr for {name!r}, and .metadata needs it for memory formats only"
        )
    return str(name)


def _layout(name: object) -> str:
    if name != "torch.strided":
        raise ValueError(f"a tensor of layout {name!r} cannot be read: only torch.strided can")
    return "strided"


def _path_joiner(join: Callable[..., str]) -> _Callable:
    """A path class: its pickle calls it with the parts, of which the first may be the root."""

    def path(*parts: object) -> str:
        texts = [expect(part, str, "a part of a path") for part in parts]
        return join(*texts) if texts else "."

    return _Callable(path)


_POSIX_PATH: Final = _path_joiner(posixpath.join)
_WINDOWS_PATH: Final = _path_joiner(ntpath.join)


def _size(values: object = ()) -> tuple[int, ...]:
    return sizes(tuple(expect(values, (tuple, list), "a torch.Size")))


_KNOWN: Final[Mapping[tuple[str, str], object]] = {
    (METADATA_MODULE, "Metadata"): Metadata,
    (METADATA_MODULE, "TensorStorageMetadata"): TensorStorageMetadata,
    (METADATA_MODULE, "BytesStorageMetadata"): BytesStorageMetadata,
    (METADATA_MODULE, "ChunkStorageMetadata"): ChunkStorageMetadata,
    (METADATA_MODULE, "TensorProperties"): TensorProperties,
    (METADATA_MODULE, "MetadataIndex"): MetadataIndex,
    (METADATA_MODULE, "StorageMeta"): StorageMeta,
    (METADATA_MODULE, "_MEM_FORMAT_ENCODING"): _MEM_FORMAT_ENCODING,
    (FILESYSTEM_MODULE, "_StorageInfo"): StorageInfo,
    ("torch", "Size"): _Callable(_size),
    ("torch.serialization", "_get_layout"): _Callable(_layout),
    ("builtins", "getattr"): _Callable(_getattr),
    # A built-in type cannot be changed by a BUILD, and its instances have no attributes.
    ("collections", "OrderedDict"): dict,
    **{("torch", name): name for name in archive.SUPPORTED_DTYPES},
    # `pathlib._local` on Python 3.13.
    **{
        (module, name): joiner
        for module in ("pathlib", "pathlib._local")
        for name, joiner in (
            ("PosixPath", _POSIX_PATH),
            ("PurePosixPath", _POSIX_PATH),
            ("WindowsPath", _WINDOWS_PATH),
            ("PureWindowsPath", _WINDOWS_PATH),
        )
    },
}
"""Every name that a file may refer to, and what stands in for it."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise ValueError(
                f"refused: the file refers to {module}.{name}, which .metadata of DCP does not need"
            ) from None


def expect(value: object, kind: type[_T] | tuple[type[_T], ...], what: str) -> _T:
    """
    `value`, known to be of `kind`.

    Raises: ValueError, which calls the value `what`, when it is not.
    """
    if not isinstance(value, kind):
        raise ValueError(f"not a .metadata file of DCP: {what} is a {type(value).__name__}")
    return value


def fields(value: object, kind: type[Instance], what: str) -> dict[str, Any]:
    """
    The fields of `value` by name, as the file has them: neither complete nor of the right types.

    Raises: ValueError, which calls the value `what`, when it is no instance of `kind` or has no fields.
    """
    instance = expect(value, kind, what)
    return expect(getattr(instance, "state", None), dict, f"the state of {what}")


def sizes(value: object) -> tuple[int, ...]:
    """
    `value`, known to be a tuple of integers, none negative.

    Raises: ValueError when it is not.
    """
    numbers = expect(value, tuple, "a size")
    for number in numbers:
        if type(number) is not int or number < 0:
            raise ValueError(f"not a .metadata file of DCP: {number!r} stands among sizes")
    return numbers


def _refuse_a_memo_beyond(most: int, data: bytes) -> None:
    """
    Refuse a pickle that puts something into the memo at a larger index than it has bytes.

    The interpreter allocates for the largest index, so that one flipped byte would take tens of GiB. No pickler writes such a
    one: it counts up from 0, a byte or more for each.

    Raises: ValueError.
    """
    try:
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name in _MEMO_PUTS and argument is not None and argument > most:
                raise ValueError(f"memo index {argument} at byte {position} of {most}")
    except ValueError as err:
        # What pickletools cannot read is refused too: the interpreter might go on where it stopped.
        raise ValueError(f"not a .metadata file of DCP: {err}") from err


def load(data: bytes) -> object:
    """
    The root object of a `.metadata` file, in the stand-ins of this module.

    Raises: ValueError when the file refers to a name that is not known here, or is no pickle.
    Blocks: for the time of a `pickle.load`, with the GIL held.
    """
    try:
        _refuse_a_memo_beyond(len(data), data)
        return _Unpickler(io.BytesIO(data)).load()
    except ValueError:
        raise
    except Exception as err:
        # What the unpickler raises on a damaged pickle is not specified; the standard library says "any exception".
        raise ValueError(f"not a .metadata file of DCP: {type(err).__name__}: {err}") from err
