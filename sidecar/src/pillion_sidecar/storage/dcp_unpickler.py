"""
The unpickler for DCP's `.metadata`. No other module of the sidecar unpickles data from storage.

It knows the names and opcodes that stock DCP of torch 2.6 to 2.15 writes on any Python, and refuses all others. For each name there is a class
or function of this module, which only keeps the content of the file. Called from: `dcp_metadata.decode`. This module must never import a name
of a file, or let a file change an object that outlives the call.

It derives from the interpreter's unpickler in Python, not from the one in C, for two reasons. The one in C allocates for the largest memo
index, so that one flipped byte takes tens of GiB. And it hashes any key of a dict: nested tuples then end the process with SIGSEGV, or take
2**n steps if each contains the one before twice.
"""

import io
import ntpath
import pickle
import posixpath
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, Never, TypeVar

from pillion_sidecar.storage import archive

METADATA_MODULE: Final = "torch.distributed.checkpoint.metadata"
FILESYSTEM_MODULE: Final = "torch.distributed.checkpoint.filesystem"

_T = TypeVar("_T")


class Refusal(ValueError):
    """The content of a file is not what DCP writes. The text names the difference."""


class Instance:
    """An instance of one of DCP's dataclasses, with its state from the file, which is not checked yet."""

    __slots__ = ("state",)
    state: Any

    # A method of the class, so that a BUILD on the class itself fails and does not set attributes on it.
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
    """A class or function that the file may call. Its results are plain values."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> Never:
        raise Refusal("not a .metadata file of DCP: it sets attributes on a function")


_MEMORY_FORMATS: Final = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")


def _memory_format(value: object) -> str:
    if not isinstance(value, int) or not 0 <= value < len(_MEMORY_FORMATS):
        raise Refusal(f"not a memory format of DCP: {reprlib.repr(value)}")
    return _MEMORY_FORMATS[value]


_MEM_FORMAT_ENCODING: Final = _Callable(_memory_format)


def _getattr(owner: object, name: object) -> str:
    """Return the name of an enum's member: Python 3.11.2 (and near versions) pickles it as getattr(class, name). No other getattr is allowed."""
    if owner is not _MEM_FORMAT_ENCODING or not isinstance(name, str) or name not in _MEMORY_FORMATS:
        raise Refusal(
            f"refused: the file uses builtins.getattr for {reprlib.repr(name)}, and .metadata needs it for memory formats only"
        )
    return name


def _layout(name: object) -> str:
    if name != "torch.strided":
        raise Refusal(f"a tensor of layout {reprlib.repr(name)} cannot be read: only torch.strided can")
    return "strided"


def _path_joiner(join: Callable[..., str]) -> _Callable:
    """Return the stand-in of a path class. Its pickle calls the class with the parts, of which the first may be the root."""

    def path(*parts: object) -> str:
        texts = [expect(part, str, "a part of a path") for part in parts]
        return join(*texts) if texts else "."

    return _Callable(path)


_POSIX_PATH: Final = _path_joiner(posixpath.join)
_WINDOWS_PATH: Final = _path_joiner(ntpath.join)


def _ordered_dict(*items: object) -> dict[object, object]:
    """Return an empty dict. The pickle of an OrderedDict makes an empty one, and then sets its items."""
    if items:
        raise Refusal("not a .metadata file of DCP: an OrderedDict is made of items")
    return {}


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
    ("collections", "OrderedDict"): _Callable(_ordered_dict),
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
"""Every name that a file may have -> its stand-in."""


_OPCODES: Final = (
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "STACK_GLOBAL", "BUILD"),
)
"""Opcodes that a pickler needs for these classes in any protocol, except those that call, or set items of a dict: `_Unpickler` has them. All other
opcodes are missing: a `.metadata` has no sets, buffers, extension codes or persistent ids."""


class _Unpickler(pickle._Unpickler):
    """Reads the names of `_KNOWN` and the opcodes of `_OPCODES`. Each opcode makes at most one object, so the file's length bounds the memory."""

    dispatch: ClassVar = {}
    # The interpreter's class has this attribute, and its type stubs do not.
    stack: list[Any]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[object]]

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise Refusal(
                f"refused: the file refers to {module}.{name}, which .metadata of DCP does not need"
            ) from None

    def _set_items(self, target: object, items: list[object]) -> None:
        into = expect(target, dict, "what items are set of")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A MetadataIndex is hashed by its identity. No other object may be hashed: see the module.
            into[expect(key, (str, int, Instance), "a key of a dict")] = value

    def _load_reduce(self) -> None:
        # This check comes first: the interpreter's own error would contain the text of the called object, whatever that is.
        arguments = expect(self.stack.pop(), tuple, "what a function is called with")
        self.stack[-1] = expect(self.stack[-1], _Callable, "what is called")(*arguments)

    def _load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if arguments != () or not isinstance(kind, type) or not issubclass(kind, Instance):
            raise Refusal("not a .metadata file of DCP: an instance of no class of DCP, or made with arguments")
        self.append(kind())

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items(self.stack[-1], [key, value])

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(self.stack[-1], items)

    def _load_dict(self) -> None:
        made: dict[object, object] = {}
        self._set_items(made, self.pop_mark())
        self.append(made)


def _table() -> dict[int, Callable[[Any], None]]:
    dispatch: Mapping[int, Callable[[Any], None]] = pickle._Unpickler.dispatch
    table = {code: dispatch[code] for code in (getattr(pickle, name)[0] for name in _OPCODES)}
    table |= {
        pickle.REDUCE[0]: _Unpickler._load_reduce,
        pickle.NEWOBJ[0]: _Unpickler._load_newobj,
        pickle.SETITEM[0]: _Unpickler._load_setitem,
        pickle.SETITEMS[0]: _Unpickler._load_setitems,
        pickle.DICT[0]: _Unpickler._load_dict,
    }
    return table


_Unpickler.dispatch = _table()


def expect(value: object, kind: type[_T] | tuple[type[_T], ...], what: str) -> _T:
    """
    Return `value` if it is of `kind`.

    Raises: ValueError if it is not. The error calls the value `what`.
    """
    if not isinstance(value, kind):
        raise Refusal(f"not a .metadata file of DCP: {what} is a {type(value).__name__}")
    return value


def fields(value: object, kind: type[Instance], what: str) -> dict[str, Any]:
    """
    Return the fields of `value` by name, as in the file. They may be incomplete, or of wrong types.

    Raises: ValueError if `value` is not an instance of `kind`, or has no fields. The error calls the value `what`.
    """
    instance = expect(value, kind, what)
    return expect(getattr(instance, "state", None), dict, f"the state of {what}")


def sizes(value: object) -> tuple[int, ...]:
    """
    Return `value` if it is a tuple of integers that are not negative.

    Raises: ValueError if it is not.
    """
    numbers = expect(value, tuple, "a size")
    for number in numbers:
        if type(number) is not int or number < 0:
            raise Refusal(f"not a .metadata file of DCP: {reprlib.repr(number)} stands among sizes")
    return numbers


def load(data: bytes) -> object:
    """
    Return the root object of a `.metadata` file, made of this module's stand-ins.

    Raises: ValueError if the file has a name that is not known here, or is not a pickle.
    Blocks: for about 1 s for each 4 MiB, with the GIL held.
    """
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except Refusal:
        raise
    except Exception as err:
        # The errors of the unpickler on a damaged pickle are not specified. The standard library says "any exception".
        raise ValueError(f"not a .metadata file of DCP: {type(err).__name__}: {err!s:.200}") from err
