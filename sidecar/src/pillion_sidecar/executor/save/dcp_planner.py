"""
DCP's plans for a save through a named `StorageWriter`: the items of each rank, and their data as views of the arena.

Called from: `executor.save.dcp_writer`. Pure, except that it returns views of arena memory.
Source: torch 2.15, torch/distributed/checkpoint/planner.py and default_planner.py.
"""

from __future__ import annotations

import collections
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import SavePlan, SavePlanner
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties

from pillion.wire import layout
from pillion_sidecar.arena import image
from pillion_sidecar.executor import plan as plan_module


def write_items(slot_layout: layout.Layout, opaque_lengths: Sequence[int]) -> list[dcp_planner.WriteItem]:
    """Return the DCP items of a rank: one for each item of the layout, then one for each opaque leaf."""
    items = []
    for item in slot_layout.items:
        offsets, sizes, size = torch.Size(item.offsets), torch.Size(item.sizes), torch.Size(item.size)
        kind = dcp_planner.WriteItemType.TENSOR if sizes == size else dcp_planner.WriteItemType.SHARD
        data = dcp_planner.TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, sizes),
            properties=TensorProperties(dtype=getattr(torch, item.dtype)),
            size=size,
        )
        items.append(dcp_planner.WriteItem(MetadataIndex(item.fqn, offsets), kind, tensor_data=data))
    for fqn, length in zip(slot_layout.opaque, opaque_lengths, strict=True):
        items.append(
            dcp_planner.WriteItem(
                MetadataIndex(fqn),
                dcp_planner.WriteItemType.BYTE_IO,
                bytes_io_data=dcp_planner.BytesIOWriteData(length),
            )
        )
    return items


def global_plan(plans: Mapping[int, SavePlan], layouts: Mapping[int, layout.Layout]) -> tuple[list[SavePlan], Metadata]:
    """
    Return the plans of all ranks without replicas, and the checkpoint's metadata.

    An item that the writer has added itself stays: only the writer knows what it is.

    Raises:
        PlanError: the layouts contradict one another.
    """
    chosen = plan_module.make_plan(layouts)
    deduped = []
    for rank in sorted(plans):
        rank_layout = layouts[rank]
        dropped = {MetadataIndex(item.fqn, item.offsets) for item in rank_layout.items} | {
            MetadataIndex(f) for f in rank_layout.opaque
        }
        for first, last in chosen.items[rank]:
            dropped -= {MetadataIndex(item.fqn, item.offsets) for item in rank_layout.items[first:last]}
        for first, last in chosen.opaque[rank]:
            dropped -= {MetadataIndex(fqn) for fqn in rank_layout.opaque[first:last]}
        plan = plans[rank]
        deduped.append(dataclasses.replace(plan, items=[item for item in plan.items if item.index not in dropped]))
    made, metadata = create_default_global_save_plan(deduped)
    paths = dict(collections.ChainMap(*(plan.planner_data or {} for plan in made)))
    return made, dataclasses.replace(metadata, planner_data=paths)


class ArenaPlanner(SavePlanner):
    """
    The planner of one rank: its items are those of the rank's layout, and their data are views of the arena.

    Must never copy a tensor. A view by `frombuffer` has a storage of its own size, so that no writer clones it.
    """

    def __init__(self, slot_image: image.SlotImage, layouts: Mapping[int, layout.Layout]) -> None:
        self._slot_image = slot_image
        self._layouts = layouts
        self.items = write_items(slot_image.layout, slot_image.opaque_lengths)
        self._places = {item.index: place for place, item in enumerate(self.items)}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Do nothing: the state is in the slot."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan(list(self.items), planner_data=dict(self._slot_image.layout.paths))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return global_plan(dict(enumerate(all_plans)), self._layouts)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: dcp_planner.WriteItem) -> torch.Tensor | io.BytesIO:
        """
        Return the data of an item: a view of arena memory, or a copy of an opaque leaf's bytes.

        Raises:
            KeyError: the plan names an item that is not in this rank's state.
        """
        slot_image = self._slot_image
        slot_layout = slot_image.layout
        place = self._places[write_item.index]
        if place >= len(slot_layout.items):
            leaf = place - len(slot_layout.items)
            start = slot_image.opaque_starts[leaf]
            return io.BytesIO(slot_image.memory[start : start + slot_image.opaque_lengths[leaf]])
        item = slot_layout.items[place]
        dtype: torch.dtype = getattr(torch, item.dtype)
        if item.payload_bytes == 0:
            return torch.empty(item.sizes, dtype=dtype)
        flat = torch.frombuffer(
            slot_image.memory, dtype=torch.uint8, count=item.payload_bytes, offset=slot_layout.payload_starts[place]
        )
        return flat.view(dtype).view(item.sizes)
