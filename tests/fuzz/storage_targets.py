"""
The whole of: what whoever can write to the storage can reach: manifests, part files, `.metadata`, and names of files.

Called from: `targets`.
Must never: leave a file outside the temporary folder.
"""

import contextlib
import functools
import os
import pickle
import pickletools
from pathlib import Path
from typing import Final

from fuzz.targets import Feed, Target, temporary_folder
from pillion.wire import manifest, names
from pillion_sidecar.checkpoint import catalog, commit
from pillion_sidecar.storage import archive, dcp_metadata, digest
from pillion_sidecar.storage import generation as generation_module
from pillion_sidecar.storage.local import LocalFolder

FILE: Final = names.data_file(0, 0, "1")
FILE_BYTES: Final = 4096
PART: Final = names.part_file(0, "1")
CHUNKS: Final = (
    manifest.StoredChunk("model.weight", "float32", (8, 4), (0, 0), (4, 4), FILE, 0, 1600, "ab"),
    manifest.StoredChunk("model.weight", "float32", (8, 4), (4, 0), (4, 4), FILE, 1600, 1600, "cd"),
    manifest.StoredChunk("scalar", "int64", (), (), (), FILE, 3200, 600, "ef"),
)
OPAQUE: Final = (manifest.StoredBytes("rng", FILE, 3800, 100, "01"),)
WHOLE: Final = manifest.Part(
    step=5, generation="1", run_id="r", world_size=1, plan_id="p", ranks=(0,), files={FILE: FILE_BYTES}, chunks=CHUNKS,
    opaque=OPAQUE, paths={"model.weight": ("model", "weight"), "rng": ("rng", 0)},
)  # fmt: skip
WORDS: Final = (
    "format", "step", "generation", "run_id", "world_size", "plan_id", "ranks", "files", "chunks", "opaque", "paths", "name",
    "digest", "length", "parts", "size_bytes", "created_ns", "digest_algorithm", "metadata_digest", FILE, PART, "1-2", "xxh3_128",
)  # fmt: skip
PICKLED: Final = (
    *(
        "\x85",
        "\x86",
        "\x87",
        "t",
        "(",
        ")",
        "]",
        "}",
        "s",
        "u",
        "R",
        "b",
        "\x81",
        "q\0",
        "h\0",
        "2",
        "0",
        "N",
        "\x88",
        "\x8f",
    ),
    *(
        "\x90",
        "\x91",
        "\x94",
        "c",
        "\x93",
        "K\x01",
        "J\xff\xff\xff\x7f",
        "\x8a\x01\xff",
        "\x8b\xff\xff\xff\x7f",
        "X\xff\xff\xff\xff",
    ),
    *(
        "\x96\xff\xff\xff\xff\xff\xff\xff\x7f",
        "\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
        "\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    ),
    *(
        "ctorch\nSize\n",
        "cbuiltins\ngetattr\n",
        "cos\nsystem\n",
        "I99999\n",
        "L9L\n",
        "Vx\n",
        "j\xff\xff\xff\x7f",
        "r\xff\xff\xff\x7f",
    ),
    *("F1e999\n", "d", "l", "a", "e", "o", "i", "P1\n", "Q", "\x82\x01", "."),
)
"""Opcodes of pickle. They are given to the mutator as text of one byte each."""


def a_manifest(metadata: bytes = b"m", part: bytes = b"") -> manifest.Manifest:
    """The manifest of a checkpoint of one part."""
    reference = manifest.PartReference(PART, (0,), digest.digest(part), len(part))
    return commit.make_manifest(
        step=5,
        generation="1",
        run_id="r",
        world_size=1,
        plan_id="p",
        parts=[reference],
        size_bytes=9,
        metadata=metadata,
    )


def _manifests(_: contextlib.ExitStack) -> Feed:
    def feed(data: bytes) -> None:
        found = manifest.decode_manifest(data)
        assert manifest.decode_manifest(found.encode()) == found

    return feed


def _parts(_: contextlib.ExitStack) -> Feed:
    def feed(data: bytes) -> None:
        found = manifest.decode_part(data)
        assert manifest.decode_part(found.encode()) == found

    return feed


def _directories(stack: contextlib.ExitStack) -> Feed:
    """A part file is found by a later run, which finishes the commit and then reads it, or refuses it as damaged."""
    root = temporary_folder(stack)
    folder = root / names.step_directory(5)
    folder.mkdir()
    (root / names.INTERNAL_DIR).mkdir()
    (folder / FILE).write_bytes(bytes(FILE_BYTES))
    secret = root / "outside"
    secret.write_bytes(b"not of this checkpoint")

    def feed(data: bytes) -> None:
        for name in (names.MANIFEST, names.COMMIT_MARKER):
            (folder / name).unlink(missing_ok=True)
        (folder / PART).write_bytes(data)
        catalog.finish_interrupted(LocalFolder(str(root)))
        if not (folder / names.COMMIT_MARKER).exists():
            return
        stored = catalog.read(LocalFolder(str(folder)), 5)
        for chunk in (each for chunks in stored.chunks.values() for each in chunks):
            _lies_inside(folder, chunk.file, chunk.offset, chunk.length)
        for leaf in stored.opaque.values():
            _lies_inside(folder, leaf.file, leaf.offset, leaf.length)

    return feed


def _committed(stack: contextlib.ExitStack) -> Feed:
    """A manifest beside a part and a `.metadata` that are whole."""
    folder = temporary_folder(stack) / names.step_directory(5)
    folder.mkdir()
    part = WHOLE.encode()
    (folder / FILE).write_bytes(bytes(FILE_BYTES))

    def feed(data: bytes) -> None:
        (folder / PART).write_bytes(part)
        (folder / names.COMMIT_MARKER).write_bytes(b"m")
        (folder / names.MANIFEST).write_bytes(data)
        stored = catalog.read(LocalFolder(str(folder)), 5)
        assert stored.native

    return feed


def _lies_inside(folder: Path, file: str, offset: int, length: int) -> None:
    assert os.path.dirname(os.path.normpath(os.path.join(folder, file))) == str(folder), f"{file!r} lies outside"
    assert offset >= 0
    assert length >= 0


def _metadata(_: contextlib.ExitStack) -> Feed:
    def feed(data: bytes) -> None:
        found = dcp_metadata.decode(data)
        assert dcp_metadata.decode(dcp_metadata.encode(found)).entries == found.entries

    return feed


def _metadata_seeds() -> list[bytes]:
    ours = commit.build_metadata(CHUNKS, OPAQUE, {"rng": ("rng", 0)})
    plain = [pickle.dumps({"a": [1, (2, "x")], "b": {3.5}}, protocol) for protocol in range(6)]
    # The shapes of stock pickles are in the corpus: making them needs torch.
    return [ours, *plain]


@functools.lru_cache(maxsize=512)
def _opcodes(data: bytes) -> list[bytes]:
    """A pickle as its opcodes, as far as it is one; the rest is the last piece."""
    starts = [0]
    with contextlib.suppress(Exception):
        starts += [position for _, _, position in pickletools.genops(data) if position]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


def _names(_: contextlib.ExitStack) -> Feed:
    def feed(data: bytes) -> None:
        for text in data.decode("utf-8", "replace").split("/"):
            step = names.parse_step_directory(text)
            assert step is None or names.step_directory(step) == text
            part = names.parse_part_file(text)
            assert part is None or names.part_file(*part) == text
            file = names.parse_data_file(text)
            assert file is None or names.data_file(*file) == text
            generation_module.order(text)

    return feed


def _archives(_: contextlib.ExitStack) -> Feed:
    """Shape and dtype of a chunk as a part file says them, as the head and the tail around its payload."""

    def feed(data: bytes) -> None:
        for chunk in manifest.decode_part(data).chunks:
            size = archive.SUPPORTED_DTYPES.get(chunk.dtype, 1)
            for length in chunk.sizes:
                size *= length
            assert len(archive.head(chunk.dtype, chunk.sizes, size)) == archive.HEAD_BYTES
            assert len(archive.tail(chunk.dtype, chunk.sizes, size)) == archive.TAIL_BYTES

    return feed


TARGETS: Final = (
    Target(
        name="manifests", make=_manifests, allowed=(manifest.ManifestError,), words=WORDS,
        seeds=lambda: [a_manifest().encode()],
    ),
    Target(
        name="parts", make=_parts, allowed=(manifest.ManifestError,), words=WORDS, weight=2, seeds=lambda: [WHOLE.encode()],
    ),
    Target(
        name="interrupted-commits", make=_directories, allowed=(catalog.Damaged,), words=WORDS, weight=0.3,
        seeds=lambda: [WHOLE.encode()],
    ),
    Target(
        name="committed-checkpoints", make=_committed, allowed=(catalog.Damaged,), words=WORDS, weight=0.5,
        seeds=lambda: [a_manifest(part=WHOLE.encode()).encode()],
    ),
    Target(
        name="dcp-metadata", make=_metadata, allowed=(ValueError,), is_json=False, weight=3, words=PICKLED, split=_opcodes,
        seeds=_metadata_seeds,
    ),
    Target(
        name="file-names", make=_names, allowed=(), is_json=False, weight=0.5,
        seeds=lambda: ["/".join(("step-5", FILE, PART, "1-2", names.MANIFEST)).encode()],
        words=("step-", "part-", "__", ".distcp", ".json", "_", "0", "9", "\u0663", "\n", "-"),
    ),
    Target(
        name="archives", make=_archives, allowed=(ValueError,), words=WORDS, weight=0.5, seeds=lambda: [WHOLE.encode()],
    ),
)  # fmt: skip
