"""
The opcodes of pickle protocol 2 in Pillion's two pickles: `data.pkl` in each archive, and `.metadata`.

No other module turns a value into opcodes. The modules `archive` and `dcp_metadata` call this one and order the opcodes. torch's restricted
unpickler (`weights_only=True`), which takes only a part of protocol 2, knows every opcode here. This module must never let an object choose
how it is pickled.

Source: Lib/pickletools.py of CPython; torch/_weights_only_unpickler.py of torch 2.6 and 2.15.
"""


def push_int(value: int) -> bytes:
    """
    Return the shortest opcode of pickle protocol 2 that pushes `value`. torch's restricted unpickler knows all of them.

    Raises: OverflowError if `value` needs more than 255 bytes.
    """
    if 0 <= value <= 0xFF:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value <= 0xFFFF:
        return b"M" + value.to_bytes(2, "little")
    if -(2**31) <= value < 2**31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    num_bytes = value.bit_length() // 8 + 1
    return b"\x8a" + num_bytes.to_bytes(1, "little") + value.to_bytes(num_bytes, "little", signed=True)


def push_ints(values: tuple[int, ...]) -> bytes:
    """Return the opcodes of pickle protocol 2 that push `values` as a tuple."""
    items = b"".join(map(push_int, values))
    match len(values):
        case 0:
            return b")"
        case 1 | 2 | 3:
            return items + (b"\x85", b"\x86", b"\x87")[len(values) - 1]
        case _:
            return b"(" + items + b"t"


def push_str(value: str) -> bytes:
    """Return the opcode of pickle protocol 2 that pushes `value`. Lone surrogates are allowed, as in the standard pickler."""
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def push_global(module: str, name: str) -> bytes:
    """Return the opcode of pickle protocol 2 that pushes the object `module.name`."""
    return f"c{module}\n{name}\n".encode("ascii")
