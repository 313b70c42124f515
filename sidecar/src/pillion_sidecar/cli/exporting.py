"""
`pillion export`: writes the tensors of a checkpoint as safetensors, with Hugging Face's shards and index, or as a `.pt` file of torch.

Every value is verified by its digest while it is read. Files get their names when all of them are whole: an export that fails leaves none.

Called from: `cli.main`. torch is imported for `.pt` alone.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import mmap
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from pillion.wire.quantities import quantity_bytes
from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.cli import assembly, contents, output, places, safetensors
from pillion_sidecar.cli.exits import Ended, Exit, not_found, wrong_usage
from pillion_sidecar.storage import archive

SHOWN: Final = 8
"""Maximum of names that a message lists."""
SHARD_SUFFIX: Final = ".safetensors"
_EXPORTED: Final = re.compile(r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors")
TORCH_SUFFIXES: Final = (".pt", ".pth", ".bin")


def run(arguments: argparse.Namespace) -> Exit:
    """Export a checkpoint. FOUND: it is damaged; nothing is left of the export then."""
    max_shard_bytes = _max_shard_bytes(arguments.max_shard_size)
    options, ca_file = places.storage_options(arguments, os.environ)
    place = places.open_place(arguments.root, options, ca_file)
    folder, step = places.checkpoint_of(place, arguments.step)
    stored = contents.read(folder, step)
    wanted = contents.tensors(stored, arguments.include, arguments.exclude)
    left_out = sorted(fqn for fqn in stored.opaque if contents.matches(fqn, arguments.include, arguments.exclude))
    if not wanted:
        raise not_found(f"{folder} has no tensor that --include and --exclude leave")
    names = rename([each.fqn for each in wanted], strip=arguments.strip, prefix=arguments.prefix)
    if arguments.out.endswith(TORCH_SUFFIXES):
        written = _export_torch(stored, wanted, names, arguments)
    else:
        written = _export_safetensors(stored, wanted, names, arguments, max_shard_bytes)
    if left_out:
        more = f" and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
        output.say(f"pillion: left out, as they are no tensors: {', '.join(left_out[:SHOWN])}{more}")
    for path, num_bytes in written:
        output.show(f"{path}  {output.size(num_bytes)}\n")
    return Exit.WELL


def _max_shard_bytes(text: str) -> int:
    try:
        # Hugging Face's tools write 5GB and 100KB, Kubernetes 5G and 100k.
        short = text.removesuffix("B")
        found = quantity_bytes(short[:-1] + "k" if short.endswith("K") else short)
    except ValueError:
        found = 0
    if found < 1:
        raise wrong_usage(f"--max-shard-size {text!r}: a size such as 5GB, 500MB or 2Gi is allowed")
    return found


def rename(fqns: Sequence[str], *, strip: str, prefix: str) -> dict[str, str]:
    """
    Return the name of each tensor in the output. Pure.

    Args:
        strip: what is taken from the beginning of the names that have it.
        prefix: what is put in front of every name after that.

    Raises:
        Ended: two tensors would have one name.
    """
    names: dict[str, str] = {}
    owner: dict[str, str] = {}
    for fqn in fqns:
        name = prefix + fqn.removeprefix(strip)
        if name in owner:
            raise wrong_usage(
                f"{owner[name]!r} and {fqn!r} would both be named {name!r}: change --strip, or leave one out with --exclude"
            )
        owner[name] = fqn
        names[fqn] = name
    return names


def _export_safetensors(
    stored: catalog.Stored,
    wanted: Sequence[contents.Tensor],
    names: Mapping[str, str],
    arguments: argparse.Namespace,
    max_shard_bytes: int,
) -> list[tuple[str, int]]:
    without = [f"{each.fqn} ({each.dtype})" for each in wanted if each.dtype not in safetensors.DTYPES]
    if without:
        more = f" and {len(without) - SHOWN} more" if len(without) > SHOWN else ""
        raise wrong_usage(
            f"safetensors has no type for {', '.join(without[:SHOWN])}{more}: leave them out with --exclude, or write a .pt file"
        )
    entries = [_entry(each, names[each.fqn]) for each in wanted]
    is_file = arguments.out.endswith(SHARD_SUFFIX)
    made = safetensors.shards(entries, max_shard_bytes=2**63 if is_file else max_shard_bytes)
    directory = os.path.dirname(arguments.out) if is_file else arguments.out
    files = [os.path.basename(arguments.out)] if is_file else [shard.file for shard in made]
    targets = [os.path.join(directory, name) for name in files]
    index = os.path.join(directory, safetensors.INDEX) if len(made) > 1 else ""
    if not is_file:
        _refuse_other_exports(directory, arguments.force)
    _refuse_existing([*targets, *([index] if index else [])], arguments.force)
    os.makedirs(directory or ".", exist_ok=True)
    tensors = {names[each.fqn]: each for each in wanted}
    metadata = {"pillion_step": str(stored.step)} if stored.native else {}
    with contextlib.ExitStack() as stack:
        total = sum(chunk.length for each in wanted for chunk in each.chunks)
        bar = stack.enter_context(output.progress("export", total, is_quiet=arguments.quiet))
        temporary = stack.enter_context(_temporary([*targets, *([index] if index else [])]))
        written = []
        for shard, path in zip(made, targets, strict=True):
            head = safetensors.header(shard, metadata)
            with _mapped(temporary[path], len(head) + shard.num_bytes) as memory:
                memory[: len(head)] = head
                starts = zip(shard.entries, shard.starts(), strict=True)
                memory_of = {
                    tensors[each.name].fqn: memory[len(head) + start : len(head) + start + each.num_bytes]
                    for each, start in starts
                }
                _fill(stored, [tensors[each.name] for each in shard.entries], memory_of, bar.moved)
            written.append((path, len(head) + shard.num_bytes))
        if index:
            with open(temporary[index], "wb") as file:
                file.write(safetensors.index(made))
            written.append((index, os.path.getsize(temporary[index])))
    if not is_file and arguments.force:
        _remove_earlier_export(directory, {os.path.basename(path) for path, _ in written})
    return written


def _entry(tensor: contents.Tensor, name: str) -> safetensors.Entry:
    item_bytes = archive.SUPPORTED_DTYPES[tensor.dtype]
    return safetensors.Entry(name, tensor.dtype, tensor.shape, item_bytes, math.prod(tensor.shape) * item_bytes)


def _export_torch(
    stored: catalog.Stored, wanted: Sequence[contents.Tensor], names: Mapping[str, str], arguments: argparse.Namespace
) -> list[tuple[str, int]]:
    _refuse_existing([arguments.out], arguments.force)
    try:
        import torch
    except ImportError as err:
        raise wrong_usage(
            f"{arguments.out} needs torch, which is not installed: a name with .safetensors does not"
        ) from err
    state: dict[str, torch.Tensor] = {}
    memory_of: dict[str, memoryview] = {}
    for each in wanted:
        dtype = getattr(torch, each.dtype, None)
        if dtype is None or each.num_bytes is None:
            raise wrong_usage(
                f"torch {torch.__version__} has no type for {each.fqn} ({each.dtype}): leave it out with --exclude"
            )
        memory = bytearray(each.num_bytes)
        memory_of[each.fqn] = memoryview(memory)
        flat = torch.frombuffer(memory, dtype=dtype) if memory else torch.empty(0, dtype=dtype)
        state[names[each.fqn]] = flat.reshape(each.shape)
    total = sum(chunk.length for each in wanted for chunk in each.chunks)
    with output.progress("export", total, is_quiet=arguments.quiet) as bar:
        _fill(stored, wanted, memory_of, bar.moved)
    os.makedirs(os.path.dirname(arguments.out) or ".", exist_ok=True)
    with _temporary([arguments.out]) as temporary:
        torch.save(state, temporary[arguments.out])
        size = os.path.getsize(temporary[arguments.out])
    return [(arguments.out, size)]


def _fill(
    stored: catalog.Stored,
    wanted: Sequence[contents.Tensor],
    memory_of: Mapping[str, memoryview],
    moved: Callable[[int], None],
) -> None:
    result = assembly.fill(stored, wanted, memory_of, moved=moved)
    if result.problems:
        raise Ended(Exit.FOUND, "nothing was exported: " + "; ".join(result.problems[:SHOWN]))


def _refuse_existing(paths: Sequence[str], force: bool) -> None:
    existing = [path for path in paths if os.path.exists(path)]
    if existing and not force:
        raise wrong_usage(f"{existing[0]} exists: name another place, or give --force")


def _refuse_other_exports(directory: str, force: bool) -> None:
    """Refuse a directory with the shards of another export: their index and ours would be mixed."""
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise wrong_usage(f"{directory} is a file: name a directory, or a file that ends with .safetensors or .pt")
    with contextlib.suppress(FileNotFoundError):
        others = [name for name in sorted(os.listdir(directory)) if name.endswith((SHARD_SUFFIX, safetensors.INDEX))]
        if others and not force:
            raise wrong_usage(f"{directory} holds {others[0]}: name another directory, or give --force")


def _remove_earlier_export(directory: str, own: set[str]) -> None:
    """(--force) Remove the files of an earlier export with other shards, which a reader would mix with ours."""
    for name in os.listdir(directory):
        if name not in own and (name == safetensors.INDEX or _EXPORTED.fullmatch(name)):
            os.unlink(os.path.join(directory, name))


@contextlib.contextmanager
def _temporary(paths: Sequence[str]) -> Iterator[Mapping[str, str]]:
    """Give each path a temporary name beside it. At the end all get their names, in this order; after an error none is left."""
    made = {
        path: os.path.join(os.path.dirname(path), f".{os.path.basename(path)}-{secrets.token_hex(4)}.tmp")
        for path in paths
    }
    try:
        yield made
        for path, temporary in made.items():
            os.rename(temporary, path)
    finally:
        for temporary in made.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


@contextlib.contextmanager
def _mapped(path: str, num_bytes: int) -> Iterator[memoryview]:
    """Make a file of that size, and map it. Its room is reserved first, so that a full disk is an error here and no SIGBUS later."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            os.posix_fallocate(fd, 0, num_bytes)
        except OSError as err:
            err.filename = path
            raise
        mapped = mmap.mmap(fd, num_bytes)
        yield memoryview(mapped)
        os.fsync(fd)
    finally:
        os.close(fd)
