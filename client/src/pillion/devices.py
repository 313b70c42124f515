"""
The CUDA devices of a state, and threads of Pillion's own that work for them.

Called from: `pillion.registration`, `pillion.staging`, `pillion.saving`, `pillion.preparing`.

A new thread is on device 0, whatever device its rank trains on. Its first call of CUDA there makes a context: some 500 MiB on device 0 for
each rank of the node. So each thread of Pillion that may call CUDA begins with `use`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch

from pillion import modes

RELAXED: Final = 2
"""cudaStreamCaptureModeRelaxed."""


@modes.off()
def used_by(tensors: Iterable[torch.Tensor]) -> tuple[torch.device, ...]:
    """The CUDA devices that the tensors are on, by their index; none for a state on the host."""
    return tuple(sorted({tensor.device for tensor in tensors if tensor.is_cuda}, key=lambda device: device.index))


def use(devices: Sequence[torch.device]) -> None:
    """
    Have the calling thread work on the first of these devices, and leave the trainer's captures alone.

    While the trainer captures a CUDA graph (by default for all threads), a call of another thread that is not safe within a capture fails,
    and spoils the capture: page-locking may be one. A relaxed thread may make it.

    Called from: a thread of Pillion's own, first. Never the trainer's.

    Source: CUDA Runtime API, cudaThreadExchangeStreamCaptureMode.
    """
    if devices:
        torch.cuda.set_device(devices[0])
        _exchange_capture_mode(RELAXED)


def _exchange_capture_mode(mode: int) -> None:
    try:
        # torch loads the runtime for all of the process to see, and has no call for this one.
        exchange = ctypes.CDLL(None).cudaThreadExchangeStreamCaptureMode
    except AttributeError:  # another runtime (ROCm), or one that is linked in
        return
    exchange(ctypes.byref(ctypes.c_int(mode)))


def marks(devices: Iterable[torch.device]) -> Mapping[torch.device, Any]:
    """An event on each device, behind what its current stream has to do so far."""
    events = {}
    for device in devices:
        events[device] = torch.cuda.Event()
        events[device].record(torch.cuda.current_stream(device))
    return events
