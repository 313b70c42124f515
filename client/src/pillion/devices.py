"""
The CUDA devices of a state, and how Pillion's own threads use them.

Called from: `pillion.registration`, `pillion.staging`, `pillion.saving`, `pillion.preparing`.

A new thread uses device 0, whatever device its rank trains on. Its first CUDA call would create a context there: some 500 MiB on device 0
for each rank of the node. So every thread of Pillion that may call CUDA begins with `use`.
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
    """Return the CUDA devices of the tensors, ordered by index. Empty for a state on the host."""
    return tuple(sorted({tensor.device for tensor in tensors if tensor.is_cuda}, key=lambda device: device.index))


def use(devices: Sequence[torch.device]) -> None:
    """
    Switch the calling thread to the first of these devices, in relaxed capture mode.

    The trainer may capture a CUDA graph, by default for all threads. Then an unsafe call in another thread, such as page-locking, fails and
    breaks the capture. A thread in relaxed mode may make such calls.

    Called from: each of Pillion's own threads, first. Never from a thread of the trainer.

    Source: CUDA Runtime API, cudaThreadExchangeStreamCaptureMode.
    """
    if devices:
        torch.cuda.set_device(devices[0])
        _exchange_capture_mode(RELAXED)


def _exchange_capture_mode(mode: int) -> None:
    try:
        # torch loads the CUDA runtime into the process, but does not wrap this function.
        exchange = ctypes.CDLL(None).cudaThreadExchangeStreamCaptureMode
    except AttributeError:  # another runtime (ROCm), or one that is linked in
        return
    exchange(ctypes.byref(ctypes.c_int(mode)))


def marks(devices: Iterable[torch.device]) -> Mapping[torch.device, Any]:
    """Record an event on the current stream of each device."""
    events = {}
    for device in devices:
        events[device] = torch.cuda.Event()
        events[device].record(torch.cuda.current_stream(device))
    return events
