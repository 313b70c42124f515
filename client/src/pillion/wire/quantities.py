"""
Quantities: bytes and thousandths of a CPU in the notation of Kubernetes, and durations; read and written exactly.

Producer: the author of a policy or a pod. Consumer: `policy`, which has such fields, and the operator.
Breaking changes: refusing a notation that was accepted; another number for a notation.
Non-breaking changes: accepting one more notation.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final, NamedTuple

INT64_MAX: Final = 2**63 - 1
"""Largest integer that the API server stores."""
_BINARY: Final = {"Ei": 2**60, "Pi": 2**50, "Ti": 2**40, "Gi": 2**30, "Mi": 2**20, "Ki": 2**10}
_DECIMAL: Final = {"E": 10**18, "P": 10**15, "T": 10**12, "G": 10**9, "M": 10**6, "k": 10**3}
_FACTORS: Final = {suffix: Fraction(factor) for suffix, factor in (_BINARY | _DECIMAL).items()} | {
    suffix: Fraction(1, 1000**power) for power, suffix in enumerate(("", "m", "u", "n"))
}
# Lengths are bounded, so that no document can demand a number of a billion digits.
_QUANTITY: Final = re.compile(
    r"\+?([0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:[eE]([+-]?[0-9]{1,2})|([KMGTPE]i|[kMGTPEmun]))?"
)


def _quantity(value: object, parts: int) -> int:
    """Return a Kubernetes quantity in units of 1/``parts``, exactly. ValueError if that is not a whole int64 >= 0."""
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if match := _QUANTITY.fullmatch(text):
        number, exponent, suffix = match.groups()
        exact = Fraction(number.rstrip(".")) * Fraction(10) ** int(exponent or 0) * _FACTORS[suffix or ""] * parts
        if exact.denominator == 1 and exact <= INT64_MAX:
            return exact.numerator
    raise ValueError(f"{value!r} is not a quantity of a whole number of bytes, or of thousandths of a CPU")


def quantity_bytes(quantity: str | int) -> int:
    """
    Return the bytes of a Kubernetes quantity such as ``"96Gi"``, ``"1.5G"``, ``"1e9"`` or ``1073741824``, exactly.

    Raises:
        ValueError: not a quantity, negative, above 2**63 - 1, or with a fraction of a byte.
    Source: Kubernetes API reference, "Quantity".
    """
    return _quantity(quantity, 1)


def format_bytes(num_bytes: int) -> str:
    """Return the quantity of exactly this many bytes: with the largest binary suffix that divides it, else decimal, else none."""
    whole = (f"{num_bytes // size}{name}" for name, size in (_BINARY | _DECIMAL).items() if num_bytes % size == 0)
    return next(whole, str(num_bytes)) if num_bytes else "0"


_DURATION: Final = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_SECONDS: Final = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


def duration_seconds(duration: object) -> int:
    """
    Return the seconds of a duration such as ``"30d"``, ``"36h"``, ``"90m"`` or ``"45s"``.

    Raises:
        ValueError: not a text of a whole number from 1 to 999999 and one of these units.
    """
    match = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if match is None:
        raise ValueError(f"{duration!r} is not a whole number from 1 to 999999 with the unit s, m, h or d")
    return int(match[1]) * _SECONDS[match[2]]


def format_duration(seconds: int) -> str:
    """Return the duration of exactly this many seconds, with the largest unit that divides it."""
    return next(f"{seconds // size}{name}" for name, size in _SECONDS.items() if seconds % size == 0)


class Unit(NamedTuple):
    """Unit of a quantity: how to read and write it, and what is allowed."""

    parse: Callable[[Any], int]
    format: Callable[[int], str]
    allowed: str


BYTES: Final = Unit(quantity_bytes, format_bytes, 'a positive number of bytes, such as "96Gi", "1.5G" or 1073741824')
CPU: Final = Unit(
    parse=lambda quantity: _quantity(quantity, 1000),
    format=lambda millicores: f"{millicores}m" if millicores % 1000 else str(millicores // 1000),
    allowed='a positive number of CPUs, in steps of a thousandth, such as "500m", "0.5" or 2',
)
DURATION: Final = Unit(
    duration_seconds,
    format_duration,
    'a whole number from 1 to 999999 with a unit of s, m, h or d, such as "30d" or "36h"',
)
