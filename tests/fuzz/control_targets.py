"""
The whole of: what a process of the same pod can reach: the control socket, the arena, and the job's store.

Called from: `targets`.
Must never: open a port, or leave a file outside the temporary folder.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any, Final

from fuzz.targets import Feed, Target, temporary_folder
from pillion.errors import ErrorDocument, SettingsError
from pillion.wire import arena, control, layout, messages, names
from pillion.wire.message import Message, Request
from pillion.wire.save_messages import Abandon
from pillion_sidecar import settings
from pillion_sidecar.arena import image as image_module
from pillion_sidecar.arena.pod_arena import Identity
from pillion_sidecar.arena.segment import Segment
from pillion_sidecar.executor import plan as plan_module
from pillion_sidecar.executor.exchange import protocol
from pillion_sidecar.supervisor.server import ControlServer, TrainerConnection

SESSION: Final = "0123456789abcdef0123456789abcdef"
HELLO: Final[dict[str, Any]] = {
    "type": "hello", "id": 1, "version": 1, "rank": 0, "world_size": 2, "local_rank": 0, "pods": [[0, 1]],
    "session": SESSION, "run_id": "r", "attempt": 0, "root": "/srv", "policy": {"trigger": {"periodSteps": 5}},
    "store": ["127.0.0.1", 1234], "store_mode": "prefix", "client": "here",
}  # fmt: skip
REQUESTS: Final[tuple[dict[str, Any], ...]] = (
    {"type": "claim", "id": 2, "step": 5, "persist": True, "room_bytes": 4096, "destination": {"path": "/x"}},
    {"type": "sealed", "id": 3, "step": 5, "stall_s": 0.01},
    {"type": "abandon", "id": 4, "step": 5, "error": {"kind": "StagingError", "message": "m", "failures": {"0": {}}}},
    {"type": "load", "id": 5, "step": None, "layout": "{}"},
    {"type": "announce_change", "id": 6, "step": 9, "policy": {}},
    {"type": "goodbye", "id": 7, "clean": True, "drain_s": 1.5},
)
OBSERVED: Final = [{"type": kind, "id": 1} for kind in sorted(control.OBSERVED)]
WORDS: Final = (
    *HELLO, *(key for each in REQUESTS for key in each), *(each["type"] for each in REQUESTS), "failures", "detail", "kind",
    "phase", "missing", "waited_s", "fqns", "reasons",
)  # fmt: skip
KINDS: Final[Mapping[str, type[Message]]] = {**control.TRAINERS, **control.OBSERVED, control.Hello.type: control.Hello}
SMALL_FRAME_BYTES: Final = 1 << 20
STRIDE_BYTES: Final = 16 * arena.PAGE_BYTES


# --- frames and fields ---------------------------------------------------------------------------------------------


def _frames(_: contextlib.ExitStack) -> Feed:
    def feed(data: bytes) -> None:
        if data[:1] == b"{":
            # A body: what is changed by its structure still has the length that it says.
            data = len(data).to_bytes(4, "big") + data
        decoder = messages.Decoder(max_frame_bytes=SMALL_FRAME_BYTES)
        for start in range(0, len(data), 1 + len(data) // 3):
            for message in decoder.feed(data[start : start + 1 + len(data) // 3]):
                assert isinstance(message["type"], str)
                messages.encode(message)
                if message["type"] in KINDS:
                    _read_fields(KINDS[message["type"]].from_document(message))

    return feed


def _read_fields(message: Message) -> None:
    """What the supervisor does with a message of any kind."""
    messages.encode(message.to_document())
    if isinstance(message, Abandon):
        str(ErrorDocument.from_document(message.error).to_exception(step=1))


def _frame_seeds() -> list[bytes]:
    whole = [b"".join(map(messages.encode, REQUESTS)), messages.encode(HELLO)]
    return [json.dumps(each).encode() for each in (HELLO, *REQUESTS)] + whole


def _bodies(_: contextlib.ExitStack) -> Feed:
    def feed(data: bytes) -> None:
        hello = control.Hello.from_document(messages.parse(data))
        identity = Identity.from_hello(hello, root="/srv")
        assert sorted(rank for pod in identity.pods for rank in pod) == list(range(identity.world_size))
        # A text is a path, for the environment; a trainer that sends one has the sidecar read it.
        settings.read_policy(hello.policy if isinstance(hello.policy, Mapping) else {})

    return feed


# --- the server ----------------------------------------------------------------------------------------------------


class Listener:
    """Implements `supervisor.server.Handler` as far as messages go: reads what the supervisor reads, and answers."""

    def __init__(self) -> None:
        self.lost_clients = 0

    async def hello(self, client: TrainerConnection, message: control.Hello) -> None:
        """As the supervisor opens a session."""
        client.rank = Identity.from_hello(message, root="/srv").local_ranks[0]
        client.answer(message.id, control.Pong())

    async def message(self, client: TrainerConnection, message: Message) -> None:
        """As the supervisor reads a request."""
        _read_fields(message)
        client.answer(message.id if isinstance(message, Request) else 0, control.Pong())

    def observed(self, client: TrainerConnection, request: Request[Any]) -> None:
        """As the supervisor answers an observer."""
        client.answer(request.id, control.Pong())

    async def lost(self, client: TrainerConnection) -> None:
        """Every greeted client is lost once."""
        self.lost_clients += 1


def _server(stack: contextlib.ExitStack) -> Feed:
    logging.disable(logging.CRITICAL)
    stack.callback(logging.disable, logging.NOTSET)
    path = str(temporary_folder(stack) / names.CONTROL_SOCKET)
    loop = asyncio.new_event_loop()
    stack.callback(loop.close)
    uncaught: list[BaseException] = []
    loop.set_exception_handler(
        lambda _, context: uncaught.append(context.get("exception") or RuntimeError(str(context)))
    )
    server = ControlServer(path, Listener())
    loop.run_until_complete(server.start())
    stack.callback(lambda: loop.run_until_complete(server.close()))

    async def talk(data: bytes) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(data)
        writer.write_eof()
        with_answer = asyncio.timeout(5.0)
        async with with_answer:
            while await reader.read(1 << 16):
                pass
        writer.close()
        await writer.wait_closed()

    greeting = messages.encode(HELLO)

    def feed(data: bytes) -> None:
        if data[:1] == b"{":
            frame = len(data).to_bytes(4, "big") + data
            data = frame if b"pi" in data or b"no" in data else greeting + frame
        with contextlib.suppress(ConnectionError):
            loop.run_until_complete(talk(data))
        if uncaught:
            error = uncaught[0]
            uncaught.clear()
            raise error
        assert server.num_connections <= 1

    return feed


def _server_seeds() -> list[bytes]:
    greeted = b"".join(map(messages.encode, (HELLO, *REQUESTS)))
    return [json.dumps(each).encode() for each in (*OBSERVED, *REQUESTS)] + [
        greeted,
        b"".join(map(messages.encode, OBSERVED)),
    ]


# --- the arena -----------------------------------------------------------------------------------------------------


def _headers(_: contextlib.ExitStack) -> Feed:
    def feed(data: bytes) -> None:
        if data[:1] == b"P" and data[:8] != arena.SLOT_MAGIC:
            header = arena.SegmentHeader.unpack(data)
            assert header.num_slots >= 1
            return
        slot = arena.SlotHeader.unpack(data, stride_bytes=STRIDE_BYTES)
        assert arena.PAGE_BYTES + slot.image_bytes <= STRIDE_BYTES
        assert slot.layout_offset + slot.layout_bytes <= STRIDE_BYTES
        assert arena.SlotHeader.unpack(slot.pack(), stride_bytes=STRIDE_BYTES) == slot

    return feed


LAYOUT: Final = layout.Layout(
    (
        layout.Item("model.weight", "float32", (8, 4), (0, 0), (4, 4)),
        layout.Item("model.bias", "bfloat16", (3,), (0,), (3,)),
        layout.Item("scalar", "int64", (), (), ()),
        layout.Item("empty", "bool", (0, 4), (0, 0), (0, 4)),
    ),
    ("optimizer.step", "rng"),
    {"model.weight": ("model", "weight"), "rng": ("rng", 0)},
)
OPAQUE_BYTES: Final = (5, 100)


def slot_bytes(
    *,
    trailer: bytes = b"",
    layout_text: bytes = LAYOUT.encoded,
    digests_offset: int | None = None,
    image_bytes: int | None = None,
) -> bytes:
    """A sealed slot, as far as it is used, and with what a test wants otherwise."""
    has_bytes = LAYOUT.opaque_starts(OPAQUE_BYTES)[1]
    text = trailer or json.dumps({"step": 5, "opaque": OPAQUE_BYTES}).encode()
    layout_offset = arena.PAGE_BYTES + has_bytes
    trailer_offset = layout_offset + len(layout_text)
    header = arena.SlotHeader(
        state=arena.SlotState.SEALED, sequence=1, step=5, world_size=1,
        image_bytes=has_bytes if image_bytes is None else image_bytes,
        layout_offset=layout_offset, layout_bytes=len(layout_text), trailer_offset=trailer_offset, trailer_bytes=len(text),
        layout_digest=hashlib.blake2b(layout_text, digest_size=16).digest(),
        trailer_digest=hashlib.blake2b(text, digest_size=16).digest(),
        digests_offset=trailer_offset + len(text) if digests_offset is None else digests_offset,
    )  # fmt: skip
    return header.pack().ljust(arena.PAGE_BYTES, b"\0") + bytes(has_bytes) + layout_text + text


def _slot_seeds() -> list[bytes]:
    """A slot that is right, with a length of each parity; and slots that once were findings, too long to lie in the corpus."""
    return [
        slot_bytes(),
        slot_bytes() + b"\0",
        slot_bytes(trailer=b'{"step":5,"opaque":[1e999]}'),
        slot_bytes(trailer=b'{"step":5}'),
        slot_bytes(trailer=b'{"step":5,"opaque":[-64,100]}'),
        slot_bytes(trailer=b"\x80\x02}."),
        slot_bytes(layout_text=b"[" * 3000),
        slot_bytes(layout_text=b'{"items":[["a","float32",[1e999],[0],[1]]],"opaque":[],"paths":{}}'),
        slot_bytes(digests_offset=0),
        slot_bytes(digests_offset=STRIDE_BYTES - 8),
        slot_bytes(image_bytes=STRIDE_BYTES - arena.PAGE_BYTES),
    ]


def _segment_headers() -> list[bytes]:
    segment = arena.SegmentHeader(num_slots=2, stride_bytes=STRIDE_BYTES)
    return [segment.pack(), slot_bytes()[: arena.SLOT_FORMAT.size]]


def _layouts(_: contextlib.ExitStack) -> Feed:
    def feed(data: bytes) -> None:
        found = layout.decode(data)
        assert layout.decode(found.encoded) == found
        assert found.tensors_bytes >= 0

    return feed


def _slots(stack: contextlib.ExitStack) -> Feed:
    path = str(temporary_folder(stack) / names.segment_file(0))
    segment = Segment.create(path, num_slots=1, stride_bytes=STRIDE_BYTES)
    stack.callback(segment.close)
    segment.grow(0, STRIDE_BYTES // 2)
    begins, room = segment.header.slot_offset(0), STRIDE_BYTES // 2

    def feed(data: bytes) -> None:
        data = data[:room]
        segment.map[begins : begins + room] = data.ljust(room, b"\0")
        if len(data) % 2:
            # A trainer can write whatever digests it wants: behind them is as much to reach.
            _sign(segment, begins)
        image = image_module.Reader().read(segment, 0)
        image_module.digest_all(image_module.frame(image))
        image_module.known_digests(image)
        assert segment.capacity_bytes(0) <= room, "touched memory that was never allocated"

    return feed


def _sign(segment: Segment, begins: int) -> None:
    """Make the digests in the slot's header right."""
    try:
        header = segment.read_header(0)
    except ValueError:
        return
    if (
        max(header.layout_offset + header.layout_bytes, header.trailer_offset + header.trailer_bytes)
        > STRIDE_BYTES // 2
    ):
        return
    memory = segment.slot(0)
    of = bytes(memory[header.layout_offset : header.layout_offset + header.layout_bytes])
    text = bytes(memory[header.trailer_offset : header.trailer_offset + header.trailer_bytes])
    signed = dataclasses.replace(
        header,
        layout_digest=hashlib.blake2b(of, digest_size=16).digest(),
        trailer_digest=hashlib.blake2b(text, digest_size=16).digest(),
    )
    segment.write_header(0, signed)


# --- the store -----------------------------------------------------------------------------------------------------


def _documents(_: contextlib.ExitStack) -> Feed:
    def feed(data: bytes) -> None:
        document = protocol.decode(data)
        assert isinstance(document, dict)
        protocol.encode(document)

    return feed


def _document_seeds() -> list[bytes]:
    plan = plan_module.make_plan({0: dataclasses.replace(LAYOUT, items=LAYOUT.items[1:])})
    return [
        protocol.encode(plan.to_document()),
        protocol.encode({"failures": {}, "ranks": {"0": [LAYOUT.digest, [1]]}}),
    ]


TARGETS: Final = (
    Target(
        name="control-frames", make=_frames, allowed=(messages.BadFrame,), seeds=_frame_seeds, words=WORDS, weight=2,
    ),
    Target(
        name="control-messages", make=_bodies, allowed=(messages.BadFrame, SettingsError), words=WORDS, weight=3,
        seeds=lambda: [json.dumps(each).encode() for each in (HELLO, *REQUESTS)],
    ),
    Target(
        name="control-server", make=_server, allowed=(), seeds=_server_seeds, words=WORDS, weight=0.3,
    ),
    Target(name="arena-headers", make=_headers, allowed=(ValueError,), seeds=_segment_headers, is_json=False),
    Target(name="arena-layouts", make=_layouts, allowed=(ValueError,), seeds=lambda: [LAYOUT.encoded], weight=2),
    Target(
        name="arena-slots", make=_slots, allowed=(image_module.TornSlot,), is_json=False,
        seeds=_slot_seeds,
    ),
    Target(name="exchange", make=_documents, allowed=(ValueError,), seeds=_document_seeds, weight=0.5),
)  # fmt: skip
