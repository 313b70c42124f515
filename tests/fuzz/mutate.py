"""
The whole of: how an input is made of another: JSON by its structure, everything else by its bytes.

Called from: `engine`, and `guided` as a custom mutator.
Must never: read a clock or draw from anything but the generator that it was given: one seed is one row of inputs.
"""

import contextlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

LARGE_BYTES: Final = 1 << 20
"""Longest input. Larger ones are what the bounds of the product refuse by their length alone."""
MAX_PLACES: Final = 4096
"""Values of a tree that a change may be made at: a list that holds the same list many times has more than can be counted."""
LARGE_ONE_IN: Final = 1500
"""How often a mutation may add a piece of up to LARGE_BYTES."""
_EDGES: Final = (0, 1, 2, 7, 8, 15, 16, 127, 128, 255, 256, 4095, 4096, 65535, 65536)
_INTEGERS: Final = (
    *(-1, 0, 1, 2, 3, 16, 255, 4096, 65536, -(2**31), 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**15, 10**18, 10**30, 10**310),
)


@dataclass(frozen=True, slots=True)
class Raw:
    """JSON text that no value of Python stands for, or that would be slow to make as one."""

    text: str


class Pairs(list[tuple[str, Any]]):
    """An object as its pairs: a key may come twice."""


_RAW: Final = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "-0", "0.1", "1E400", "2.5e3", "1e18"),
    *('"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\u2028"', '"\\uffff"', "tru", "'a'", ""),
)
_TEXTS: Final = (
    *("", " ", "\0", "\n", "a", "A" * 64, "..", "../../etc/passwd", "/etc/passwd", "a/b", "step-1\n", "-", "\u0663"),
    *(
        "float32",
        "bool",
        "1",
        "-1",
        "1e9",
        "96Gi",
        "1e99",
        "9" * 30,
        "500m",
        "Always",
        "true",
        "$(A)",
        "pillion-sidecar",
    ),
    *("2026-02-30T00:00:00Z", "9999-12-31T23:59:60Z", "0001-01-01T00:00:00+23:59", "\u00e9\U0001f600", "a:B", "*&"),
)


class Mutator:
    """
    Inputs from inputs.

    Args:
        draw: where all chance comes from.
        words: names that the target knows: keys and values worth trying.
        split: cuts an input into the pieces that it is made of; None: it is changed at any byte.
    """

    def __init__(
        self, draw: random.Random, words: Sequence[str] = (), split: Callable[[bytes], list[bytes]] | None = None
    ) -> None:
        self._draw = draw
        self._split = split
        self._words = tuple(words) or ("type", "kind", "spec", "name")

    def mutate(self, data: bytes, other: bytes, *, is_json: bool) -> bytes:
        """One to five changes to `data`; pieces may come from `other`."""
        count = 1 + min(self._draw.getrandbits(3), 4)
        if is_json and self._draw.random() < 0.9:
            # What is no JSON, or is nested deeper than we go ourselves, is changed by its bytes.
            with contextlib.suppress(ValueError, RecursionError, MemoryError):
                tree = json.loads(data, object_pairs_hook=Pairs)
                beside = json.loads(other, object_pairs_hook=Pairs)
                for _ in range(count):
                    tree = self._change(tree, beside)
                made = _render(tree).encode("utf-8", "surrogatepass")
                return (made if self._draw.random() < 0.95 else self._bytes(made, other))[:LARGE_BYTES]
        if self._split is not None and self._draw.random() < 0.8:
            pieces, beside = list(self._split(data)), self._split(other)
            for _ in range(count):
                self._pieces(pieces, beside)
            return b"".join(pieces)[:LARGE_BYTES]
        for _ in range(count):
            data = self._bytes(data, other)
        return data[:LARGE_BYTES]

    # --- pieces ----------------------------------------------------------------------------------------------------

    def _pieces(self, pieces: list[bytes], beside: list[bytes]) -> None:
        at = self._draw.randint(0, len(pieces))
        several = slice(at, at + self._draw.choice((1, 1, 2, 4, 16)))
        match self._draw.randrange(6):
            case 0:
                del pieces[several]
            case 1:
                pieces[at:at] = pieces[several] * min(self._many(), LARGE_BYTES // 64)
            case 2:
                pieces[at:at] = [_bytes_of(self._draw.choice(self._words))] * min(self._many(), LARGE_BYTES // 64)
            case 3:
                pieces[several] = [_bytes_of(self._draw.choice(self._words))]
            case 4:
                start = self._draw.randint(0, len(beside))
                pieces[at:at] = beside[start : start + self._draw.choice((1, 2, 8, 40))]
            case _ if at < len(pieces):
                pieces[at] = self._bytes(pieces[at], b"")

    # --- JSON ------------------------------------------------------------------------------------------------------

    def _change(self, tree: Any, beside: Any) -> Any:
        places: list[tuple[Any, int]] = []
        _places(tree, places)
        if not places:
            return self._value(beside)
        parent, index = self._draw.choice(places)
        key, value = parent[index] if isinstance(parent, Pairs) else (None, parent[index])
        match self._draw.randrange(10):
            case 0:
                del parent[index]
            case 1:
                # The same again: a key twice, an entry many times.
                times = self._many() if key is None else 1
                parent[index:index] = [parent[index]] * times
            case 2:
                parent.insert(index, (self._key(), self._value(beside)) if key is not None else self._value(beside))
            case 3 if key is not None:
                parent[index] = (self._key(), value)
            case 4:
                there, at = self._draw.choice(places)
                taken = there[at][1] if isinstance(there, Pairs) else there[at]
                self._set(parent, index, key, _copied(taken))
            case 5:
                self._set(parent, index, key, [value] if self._draw.random() < 0.5 else Pairs([(self._key(), value)]))
            case 6 | 7:
                self._set(parent, index, key, self._near(value, beside))
            case _:
                self._set(parent, index, key, self._value(beside))
        return tree

    def _set(self, parent: Any, index: int, key: str | None, value: Any) -> None:
        parent[index] = value if key is None else (key, value)

    def _near(self, value: Any, beside: Any) -> Any:
        """A value of the same kind."""
        match value:
            case bool():
                return not value
            case int():
                return self._draw.choice((value + 1, value - 1, -value, value * 2**32, self._draw.choice(_INTEGERS)))
            case str():
                at = self._draw.randint(0, len(value))
                piece = self._draw.choice(_TEXTS)
                return self._draw.choice((value[:at] + piece + value[at:], value[:at], value * 2, value.upper(), piece))
            case list():
                return Pairs(value[::-1]) if isinstance(value, Pairs) else value[::-1]
            case _:
                return self._value(beside)

    def _key(self) -> str:
        return self._draw.choice(self._words) if self._draw.random() < 0.8 else self._draw.choice(_TEXTS)

    def _value(self, beside: Any) -> Any:
        match self._draw.randrange(12):
            case 0 | 1:
                return self._draw.choice(_INTEGERS)
            case 2:
                return Raw(self._draw.choice(_RAW))
            case 3:
                return self._draw.choice(_TEXTS)
            case 4:
                return self._draw.choice(self._words)
            case 5:
                return self._draw.choice((None, True, False, [], Pairs()))
            case 6:
                depth = self._draw.choice((2, 20, 200, 480, 700, 950, 5000)) if self._many() > 4 else 3
                first, last = self._draw.choice((("[", "]"), ('{"a":', "}"), ('[{"name":', "}]")))
                return Raw(first * depth + "1" + last * depth)
            case 7:
                return Raw("9" * self._draw.choice((19, 400, 4300, 4301)))
            case 8:
                piece = self._draw.choice(("a", "a.", "a ", " ", "\n", ".", "-", "/", "0", "../", "\u00e9", '\\"'))
                return piece * self._many() + self._draw.choice(("", "!", "\n", "a"))
            case 9:
                return [self._draw.choice((0, "a", None, [], Raw("{}"), Raw('{"name":"A"}')))] * self._many()
            case 10:
                return Pairs((f"{self._key()}{n}", n) for n in range(min(self._many(), 20_000)))
            case _:
                places: list[tuple[Any, int]] = []
                _places(beside, places)
                if not places:
                    return beside
                parent, index = self._draw.choice(places)
                return _copied(parent[index][1] if isinstance(parent, Pairs) else parent[index])

    def _many(self) -> int:
        """A number of repetitions: small most of the time."""
        if self._draw.randrange(LARGE_ONE_IN) == 0:
            return self._draw.choice((5_000, 30_000, LARGE_BYTES // 8))
        return self._draw.choice((1, 2, 3, 4, 5, 8, 17, 70, 300))

    # --- bytes -----------------------------------------------------------------------------------------------------

    def _bytes(self, data: bytes, other: bytes) -> bytes:
        out = bytearray(data)
        at = self._draw.randint(0, len(out))
        match self._draw.randrange(9):
            case 0 if out:
                out[at % len(out)] ^= 1 << self._draw.randrange(8)
            case 1 if out:
                out[at % len(out)] = self._draw.choice(_EDGES) & 255
            case 2 | 3:
                width = self._draw.choice((1, 2, 4, 8))
                order = self._draw.choice(("little", "big"))
                number = self._draw.choice(_INTEGERS) % (1 << 8 * width)
                out[at : at + width] = number.to_bytes(width, order)  # type: ignore[arg-type]  # one of the two
            case 4:
                del out[at : at + self._draw.choice((1, 2, 4, 16, 300))]
            case 5:
                piece = out[at : at + self._draw.choice((1, 2, 8, 64))]
                out[at:at] = piece * min(self._many(), LARGE_BYTES // max(1, len(piece)))
            case 6:
                start = self._draw.randint(0, len(other))
                out[at : at + self._draw.choice((0, 8))] = other[start : start + self._draw.choice((1, 4, 16, 64, 512))]
            case 7:
                out[at:at] = _bytes_of(self._draw.choice(self._words))
            case _:
                out[at:at] = self._draw.randbytes(self._draw.choice((1, 2, 4, 8)))
        return bytes(out[:LARGE_BYTES])


def _bytes_of(word: str) -> bytes:
    """One byte a character where that is possible: opcodes are written so."""
    try:
        return word.encode("latin-1")
    except UnicodeEncodeError:
        return word.encode()


def _places(tree: Any, into: list[tuple[Any, int]]) -> None:
    """Every place of a value in a tree, as its list and its index in it, up to MAX_PLACES."""
    if len(into) > MAX_PLACES:
        return
    if isinstance(tree, Pairs):
        for index, pair in enumerate(tree):
            into.append((tree, index))
            _places(pair[1], into)
    elif isinstance(tree, list):
        for index, each in enumerate(tree[:MAX_PLACES]):
            into.append((tree, index))
            _places(each, into)


def _copied(tree: Any, known: dict[int, Any] | None = None) -> Any:
    """A copy, in which what was the same several times still is."""
    if not isinstance(tree, list):
        return tree
    known = {} if known is None else known
    if id(tree) not in known:
        if isinstance(tree, Pairs):
            known[id(tree)] = Pairs((key, _copied(value, known)) for key, value in tree)
        else:
            known[id(tree)] = [_copied(each, known) for each in tree]
    return known[id(tree)]


def _render(tree: Any) -> str:
    """JSON text of a tree, with what it has of `Raw` as it is."""
    if isinstance(tree, Raw):
        return tree.text
    if isinstance(tree, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{_render(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        # What comes many times is rendered once.
        known: dict[int, str] = {}
        pieces, length = list[str](), 0
        for each in tree:
            if id(each) not in known:
                known[id(each)] = _render(each)
            pieces.append(known[id(each)])
            length += len(pieces[-1]) + 1
            if length > LARGE_BYTES:
                break
        return "[" + ",".join(pieces) + "]"
    if isinstance(tree, int) and not isinstance(tree, bool) and abs(tree) >= 10**4000:
        return "9" * 4000
    return json.dumps(tree)
