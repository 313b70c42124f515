"""
Disables torch's modes of the calling thread while Pillion handles its own tensors.

Called from: `pillion.leaves`, `pillion.opaque`, `pillion.staging` and `pillion.saving`, around all code that makes, views or copies a
tensor. A validation loop runs in `torch.inference_mode`, a model is often built under a default device or in a FakeTensorMode, and a
profiler may use a function mode. Each mode changes what `torch.frombuffer`, `view` and `copy_` do. Views of the arena are kept, so a
view made under such a mode would break every later save.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import overrides


@contextlib.contextmanager
def off() -> Iterator[None]:
    """
    Disable all modes and autograd in this thread until the block ends. Tensors made in the block are ordinary ones.

    Disabled: inference_mode, dispatch modes (FakeTensorMode), function modes (a default device), grad mode. Tensor subclasses keep their
    own behaviour.

    Blocks: never. It takes some 10 us, and imports torch's tracing modules the first time that a dispatch mode is on.
    """
    with contextlib.ExitStack() as stack:
        # Function modes first, because they also intercept torch.no_grad().
        for _ in range(torch._C._len_torch_function_stack()):
            stack.callback(overrides._push_mode, overrides._pop_mode())
        if torch._C._len_torch_dispatch_stack():
            from torch.utils._python_dispatch import _disable_current_modes

            stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield
