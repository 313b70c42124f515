"""
The whole of: FSDP2 of Accelerate on a machine without a GPU.

Called from: bodies of ranks, before they make an Accelerator or TrainingArguments. It changes the process of that rank alone.

Accelerate 1.15 turns FSDP off where its processes have CPUs alone, although `fully_shard` works there. Told that they have GPUs, it wraps
the model and the optimizer by the same code as on a GPU; the device stays the CPU, the backend gloo.
"""

import functools
from typing import Any

from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def allow() -> None:
    """Let Accelerate shard on CPUs in this process."""
    made = PartialState.__init__

    @functools.wraps(made)
    def as_if_on_gpus(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_if_on_gpus


def plugin() -> FullyShardedDataParallelPlugin:
    """Return the plugin of version 2 that a script gives to its Accelerator. Each layer is sharded on its own."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1, cpu_ram_efficient_loading=False
    )
