"""
The whole of: amounts that a user wrote into a pod, read well enough to compare and to add.

Called from: `sidecar_spec`, `apply`. Amounts in a policy are read by `pillion.wire.policy`, which is stricter.
Must never: raise for what it cannot read; the API server judges the pod.
"""

import contextlib

from pillion.wire import policy


def millicores(amount: object) -> int | None:
    """Thousandths of a CPU, or None for what is no such amount."""
    text = str(amount)
    with contextlib.suppress(ValueError):
        return policy.quantity_bytes(text[:-1] if text.endswith("m") else f"{text}k")
    return None


def format_millicores(amount: int) -> str:
    """The shortest quantity of that many thousandths of a CPU, as the API server writes it."""
    return f"{amount}m" if amount % 1000 else str(amount // 1000)


def num_bytes(amount: object) -> int | None:
    """Bytes, or None for what is no such amount."""
    with contextlib.suppress(ValueError):
        return policy.quantity_bytes(str(amount))
    return None


def same(name: str, one: object, other: object) -> bool:
    """Whether two amounts of ``cpu`` or ``memory`` are equal, however they are spelled."""
    read = millicores if name == "cpu" else num_bytes
    return one == other or (read(one) is not None and read(one) == read(other))


def add(name: str, one: object, other: object) -> str | None:
    """The sum of two amounts of ``cpu`` or ``memory``, or None where one of them cannot be read."""
    read = millicores if name == "cpu" else num_bytes
    first, second = read(one), read(other)
    if first is None or second is None:
        return None
    return (format_millicores if name == "cpu" else policy.format_bytes)(first + second)
