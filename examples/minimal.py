"""
The whole of: the fewest lines that make a training loop survive. Run it twice: `python examples/minimal.py`.
"""

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import pillion

model = torch.nn.Linear(1000, 1000)
optimizer = torch.optim.AdamW(model.parameters())

with pillion.Checkpointer("checkpoints", policy={"trigger": {"periodSteps": 100}}) as checkpointer:
    start = 0
    if checkpointer.find() is not None:  # only then: get_state_dict steps a new optimizer once, to make its state
        weights, moments = get_state_dict(model, optimizer)
        start = checkpointer.load({"model": weights, "optimizer": moments}) or 0
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    for step in range(start + 1, start + 301):
        model(torch.randn(8, 1000)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if checkpointer.due(step):
            weights, moments = get_state_dict(model, optimizer)
            checkpointer.save({"model": weights, "optimizer": moments}, step)
    checkpointer.wait(timeout_s=60)
print(f"trained up to step {step}")
