"""Critics as models: heads that read hidden states, alone or on a copy of the policy's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlkit.data.layout import Layout
from rlkit.data.models.policy import hidden_before_responses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ValueHeads(nn.Module):
    """Hidden states [n, H] -> [n, num_heads] float32.

    One head is a linear map that starts at 0, so that the first values are no guesses. Two are small networks with a norm before
    them, as SAFE's critic has them; they start apart, or their minimum would never differ from either.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the same on every rank, and nobody else's generator moves
            if num_heads == 1:
                self.norm: nn.Module = nn.Identity()
                self.heads = nn.ModuleList([nn.Linear(hidden_size, 1)])
                nn.init.zeros_(self.heads[0].weight)  # pyright: ignore[reportArgumentType]
                nn.init.zeros_(self.heads[0].bias)  # pyright: ignore[reportArgumentType]
            else:
                self.norm = nn.LayerNorm(hidden_size)
                self.heads = nn.ModuleList(
                    nn.Sequential(nn.Linear(hidden_size, hidden_size // 4), nn.GELU(), nn.Linear(hidden_size // 4, 1))
                    for _ in range(num_heads)
                )

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        return torch.cat([head(normed) for head in self.heads], dim=-1).float()


class CriticModel(nn.Module):
    """The policy's layers as they were at the start of the run, and heads on them: trained by the value loss alone."""

    def __init__(self, model: PreTrainedModel, heads: ValueHeads):
        super().__init__()
        self.decoder = model.get_decoder()  # without the output head, which a critic has no use for
        self.heads = heads

    def forward(self, layout: Layout) -> Tensor:
        """[n, num_heads]: of the state before each response token."""
        return self.heads(hidden_before_responses(self.decoder, layout))
