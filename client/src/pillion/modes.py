"""
torch's modes of the calling thread, put aside while Pillion handles its own tensors.

Called from: `pillion.leaves`, `pillion.opaque`, `pillion.staging` and `pillion.saving`, around everything that makes, views or
copies a tensor. A validation loop runs in `torch.inference_mode`, a model is often built under a default device or in a
FakeTensorMode, and a profiler may watch through a function mode. Each changes what `torch.frombuffer`, `view` and `copy_` do.
A view of the arena that was made under one of them would be kept, and would spoil every save after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import overrides


@contextlib.contextmanager
def off() -> Iterator[None]:
    """
    No mode and no autograd in this thread, until the block ends: tensors that are made here are ordinary ones.

    Put aside: inference_mode, dispatch modes (FakeTensorMode), function modes (a default device), grad mode. Tensor
    subclasses keep their own behaviour.

    Blocks: never; some 10 us, and an import of torch's tracing modules the first time that a dispatch mode is on.
    """
    with contextlib.ExitStack() as stack:
        # First, as a function mode watches also torch.no_grad().
        for _ in range(torch._C._len_torch_function_stack()):
            stack.callback(overrides._push_mode, overrides._pop_mode())
        if torch._C._len_torch_dispatch_stack():
            from torch.utils._python_dispatch import _disable_current_modes

            stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield
