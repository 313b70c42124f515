"""
The whole of: CUDA as far as Pillion calls it, on a machine without a GPU: its documented rules, and who broke which.

Called from: tests of the staging path, through `installed`.
Must never: be taken for a GPU. It says whether calls keep to the rules, and nothing of speed or of a driver's own defects.

Memory of a device is a storage that was made by `Cuda.tensor`; the tensors over it say that they are there. What is queued on a stream
runs when somebody waits for it, and not before: a copy that nobody waits for has not happened.

Source: CUDA Runtime API. Memory Management: ranges are page-locked once, and by whole pages here; cudaMemcpyAsync takes host memory that is
"either entirely registered with CUDA, or in the case of host pageable transfers, not registered at all" (also not of two registrations,
which no page promises). Error Handling: the last error is the host thread's. Device Management: a thread begins on device 0, and
cudaSetDevice, or the first call on a device, makes its context. PyTorch 2.15: torch.cuda.stream sets the device before it again at its
end; copy_ of a conjugated tensor to the host queues the bytes, and conjugates the host's memory at once (aten/src/ATen/native/cuda/Copy.cu).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
import torch

PAGE_BYTES: Final = 4096
INVALID_VALUE: Final = 1
ALREADY_REGISTERED: Final = 712
NOT_REGISTERED: Final = 713
OUT_OF_MEMORY: Final = 2


class Stream:
    """A queue of a device."""

    def __init__(self, cuda: Cuda, device: torch.device) -> None:
        self.cuda, self.device = cuda, device
        self._queue: list[Callable[[], None]] = []
        self._done = 0
        self._running = threading.RLock()

    def enqueue(self, work: Callable[[], None]) -> None:
        self._queue.append(work)

    def wait_event(self, event: Event) -> None:
        stream, position = event.place()
        self.enqueue(lambda: stream.run(position))

    def wait_stream(self, other: Stream) -> None:
        position = len(other._queue)
        self.enqueue(lambda: other.run(position))

    def synchronize(self) -> None:
        self.run(len(self._queue))

    def run(self, position: int) -> None:
        with self._running:
            while self._done < position:
                self._done += 1
                self._queue[self._done - 1]()


class Event:
    """A place in a stream."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._place: tuple[Stream, int] | None = None

    def record(self, stream: Stream | None = None) -> None:
        on = stream or self._cuda.current_stream()
        self._place = (on, len(on._queue))

    def place(self) -> tuple[Stream, int]:
        assert self._place is not None, "an event that was never recorded"
        return self._place


class Cuda:
    """
    Some devices, and what they were asked for.

    Attributes:
        problems: each rule that was broken, in words.
        contexts: the devices that a context was made on.
        registered: address -> length of what is page-locked.
        errors: name of a thread -> the last error that it was left with.
        lockable_bytes: registering more fails.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.contexts: set[int] = set()
        self.registered: dict[int, int] = {}
        self.errors: dict[str, int] = {}
        self.lockable_bytes = 2**63
        self._memory: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self._thread = threading.local()
        self._default: dict[int, Stream] = {}
        self._copying: list[tuple[int, int]] = []
        self._lock = threading.RLock()

    # --- what a trainer does -----------------------------------------------------------------------------------------

    def tensor(self, values: torch.Tensor, index: int) -> torch.Tensor:
        """A tensor of the device with these values, order and dtype."""
        storage = values.untyped_storage().clone()
        with self._lock:
            self._memory[storage.data_ptr()] = (index, storage)
        made = torch.empty(0, dtype=values.dtype).set_(storage, values.storage_offset(), values.shape, values.stride())
        return made.conj() if values.is_conj() else made

    def launch(self, index: int, kernel: Callable[[], Any]) -> None:
        """Queue a kernel on the device's current stream."""
        self.current_stream(torch.device("cuda", index)).enqueue(kernel)

    def values(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values of a device's tensor on the host, after the device's default stream has finished."""
        self.default_stream(tensor.device).synchronize()
        return torch.empty(0, dtype=tensor.dtype).set_(
            tensor.untyped_storage().clone(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )

    # --- torch.cuda --------------------------------------------------------------------------------------------------

    def of(self, tensor: torch.Tensor) -> int | None:
        """The device of a tensor; None: the host."""
        try:
            found = self._memory.get(tensor.untyped_storage().data_ptr())
        except (RuntimeError, NotImplementedError):
            return None
        return None if found is None else found[0]

    @property
    def device(self) -> int:
        return int(getattr(self._thread, "device", 0))

    def set_device(self, device: torch.device | int) -> None:
        self._thread.device = device if isinstance(device, int) else device.index
        self.contexts.add(self.device)

    def default_stream(self, device: torch.device) -> Stream:
        with self._lock:
            return self._default.setdefault(device.index, Stream(self, device))

    def current_stream(self, device: torch.device | None = None) -> Stream:
        on = device or torch.device("cuda", self.device)
        streams: dict[int, Stream] = self._thread.__dict__.setdefault("streams", {})
        return streams.get(on.index) or self.default_stream(on)

    def new_stream(self, device: torch.device) -> Stream:
        self.contexts.add(device.index)
        return Stream(self, device)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, device = self.current_stream(stream.device), self.device
        streams: dict[int, Stream] = self._thread.__dict__.setdefault("streams", {})
        streams[stream.device.index] = stream
        self.set_device(stream.device)
        try:
            yield
        finally:
            streams[stream.device.index] = before
            self.set_device(device)

    # --- the driver --------------------------------------------------------------------------------------------------

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        self.contexts.add(self.device)
        with self._lock:
            if address % PAGE_BYTES or size_bytes % PAGE_BYTES or size_bytes <= 0:
                return self._failed(INVALID_VALUE, f"registered {size_bytes} bytes at {address:#x}: no whole pages")
            if any(a < address + size_bytes and address < a + n for a, n in self.registered.items()):
                return self._failed(ALREADY_REGISTERED, f"registered {address:#x} twice")
            if sum(self.registered.values()) + size_bytes > self.lockable_bytes:
                self.errors[threading.current_thread().name] = OUT_OF_MEMORY
                return OUT_OF_MEMORY
            self.registered[address] = size_bytes
            return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.contexts.add(self.device)
        with self._lock:
            size_bytes = self.registered.pop(address, None)
            if size_bytes is None:
                return self._failed(NOT_REGISTERED, f"unregistered {address:#x}, which is not registered")
            if any(a < address + size_bytes and address < a + n for a, n in self._copying):
                self.problems.append(f"unregistered {address:#x} while a copy runs there")
            return 0

    def _failed(self, error: int, problem: str) -> int:
        self.problems.append(problem)
        self.errors[threading.current_thread().name] = error
        return error

    def memcpy(self, host: torch.Tensor, device: torch.Tensor, work: Callable[[], Any], *, waits: bool) -> None:
        """Queue a copy between contiguous memory of the host and a device."""
        start, end = host.data_ptr(), host.data_ptr() + host.numel() * host.element_size()
        with self._lock:
            touched = [(a, n) for a, n in self.registered.items() if a < end and start < a + n]
        locked = any(a <= start and end <= a + n for a, n in touched)
        if touched and not locked:
            self.problems.append(f"copied {end - start} bytes at {start:#x} across the edge of what is registered")
            raise RuntimeError("CUDA error: invalid argument")
        stream, run = self.current_stream(device.device), (start, end - start)
        self._copying.append(run)

        def copy() -> None:
            work()
            self._copying.remove(run)

        stream.enqueue(copy)
        if waits or not locked:
            stream.synchronize()

    def computed(self, like: torch.Tensor, source: torch.Tensor, work: Callable[[torch.Tensor], Any]) -> torch.Tensor:
        """A new tensor of the source's device, which its current stream computes."""
        index = self.of(source)
        assert index is not None
        made = self.tensor(like, index)
        self.launch(index, lambda: work(made))
        return made


@contextlib.contextmanager
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """
    Have torch see these devices in this process.
    """
    cuda, plain = Cuda(), torch.Tensor
    copy_, clone, contiguous, resolve_conj = plain.copy_, plain.clone, plain.contiguous, plain.resolve_conj
    device = vars(torch._C.TensorBase)["device"]
    empty = torch.empty

    def made(*shape: Any, device: torch.device | None = None, **options: Any) -> torch.Tensor:
        found = empty(*shape, **options)
        return found if device is None else cuda.tensor(found, device.index)

    def where(self: torch.Tensor) -> torch.device:
        index = cuda.of(self)
        found: torch.device = device.__get__(self) if index is None else torch.device("cuda", index)
        return found

    def copied(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        to, from_ = cuda.of(self), cuda.of(source)
        if to is not None and from_ is not None:
            cuda.launch(from_, lambda: copy_(self, source))
        elif from_ is not None:
            packed = source.contiguous()
            raw = packed.conj() if packed.is_conj() else packed
            cuda.memcpy(self, source, lambda: copy_(self, raw), waits=not non_blocking)
            if packed.is_conj():
                self.conj_physical_()
        elif to is not None and self.is_contiguous() and self.dtype == source.dtype:
            cuda.memcpy(source, self, lambda: copy_(self, source), waits=True)
        elif to is not None:
            private = clone(source)
            cuda.memcpy(private, self, lambda: copy_(self, private), waits=True)
        else:
            copy_(self, source, non_blocking)
        return self

    def cloned(self: torch.Tensor, **options: Any) -> torch.Tensor:
        if cuda.of(self) is None:
            return clone(self, **options)
        return cuda.computed(torch.empty(self.shape, dtype=self.dtype), self, lambda made: copy_(made, self))

    def packed(self: torch.Tensor, **options: Any) -> torch.Tensor:
        if cuda.of(self) is None or self.is_contiguous():
            return contiguous(self, **options)
        return cloned(self)

    def resolved(self: torch.Tensor) -> torch.Tensor:
        return cloned(self) if cuda.of(self) is not None and self.is_conj() else resolve_conj(self)

    def record_stream(self: torch.Tensor, stream: Stream) -> None:
        cuda.problems.append("record_stream: not every allocator has it, and the stream is waited for")

    for name, value in {
        "device": property(where),
        "is_cuda": property(lambda self: cuda.of(self) is not None),
        "is_cpu": property(lambda self: cuda.of(self) is None and device.__get__(self).type == "cpu"),
        "copy_": copied,
        "clone": cloned,
        "contiguous": packed,
        "resolve_conj": resolved,
        "record_stream": record_stream,
    }.items():
        monkeypatch.setattr(plain, name, value)
    monkeypatch.setattr(torch, "empty", made)
    for name, value in {
        "Stream": cuda.new_stream,
        "Event": lambda: Event(cuda),
        "stream": cuda.stream,
        "current_stream": cuda.current_stream,
        "set_device": cuda.set_device,
        "cudart": lambda: cuda,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    yield cuda
