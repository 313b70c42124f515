"""
The whole of: a small character-level transformer, as a training example.

Called from: train.py and verify.py, on every rank.
Must never: draw random numbers other than torch's own, or depend on the rank; ranks start with equal weights.

Shapes: B batch, T time, C channels, H heads, V vocabulary.
"""

import dataclasses

import torch
from torch import nn
from torch.nn import functional


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """
    How large the model is. The default has 1.4 million parameters: 17 MB with the state of AdamW.
    """

    vocabulary: int = 128
    context: int = 64
    channels: int = 192
    heads: int = 4
    num_blocks: int = 3
    dropout: float = 0.1


class Block(nn.Module):
    """
    Causal self-attention and a two-layer network, each behind a norm and beside a residual path.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm_attention = nn.LayerNorm(shape.channels)
        self.qkv = nn.Linear(shape.channels, 3 * shape.channels)
        self.projection = nn.Linear(shape.channels, shape.channels)
        self.norm_network = nn.LayerNorm(shape.channels)
        self.widen = nn.Linear(shape.channels, 4 * shape.channels)
        self.narrow = nn.Linear(4 * shape.channels, shape.channels)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        batch, time, channels = x_BTC.shape
        qkv = self.qkv(self.norm_attention(x_BTC)).view(batch, time, 3, self.heads, channels // self.heads)
        q_BHTD, k_BHTD, v_BHTD = qkv.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        x_BTC = x_BTC + self.dropout(self.projection(seen.transpose(1, 2).reshape(batch, time, channels)))
        wide = functional.gelu(self.widen(self.norm_network(x_BTC)))
        result: torch.Tensor = x_BTC + self.dropout(self.narrow(wide))
        return result


class CharModel(nn.Module):
    """
    Predicts the next character of a text.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.characters = nn.Embedding(shape.vocabulary, shape.channels)
        self.positions = nn.Embedding(shape.context, shape.channels)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_blocks))
        self.norm = nn.LayerNorm(shape.channels)
        self.head = nn.Linear(shape.channels, shape.vocabulary)

    def forward(self, text_BT: torch.Tensor) -> torch.Tensor:
        """
        Gives the logits, B x T x V.
        """
        x_BTC = self.characters(text_BT) + self.positions(torch.arange(text_BT.shape[1]))
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits: torch.Tensor = self.head(self.norm(x_BTC))
        return logits


def build(seed: int, shape: Shape | None = None) -> CharModel:
    """
    A model whose first weights depend on the seed only.
    """
    torch.manual_seed(seed)
    return CharModel(shape or Shape())
