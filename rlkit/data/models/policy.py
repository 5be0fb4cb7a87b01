"""Runs a causal language model on prompt-and-response rows and reports statistics of the response tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlkit.core.logprobs import ExactDivergence, TokenStatistics, token_statistics


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceStates:
    """What an exact divergence needs of the reference: its last hidden states at the same positions, and its head."""

    hidden: Tensor  # [n, H]
    head: Tensor  # [V, H]


class Policy(nn.Module):
    """A language model as the learner and the scorer see it.

    The output head is applied here and not by the model, in chunks, to response positions only. All of it happens inside one
    `forward`, because that is where FSDP has the parameters gathered.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    @property
    def head(self) -> nn.Linear:
        """The output head; a tied one shares the embedding's weight."""
        return cast(nn.Linear, self.model.get_output_embeddings())

    def forward(
        self,
        *,
        input_ids: Tensor,
        prompt_lengths: Tensor,
        response_lengths: Tensor,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool = False,
        entropy_gradient: bool = True,
        divergence: ExactDivergence | None = None,
        reference: ReferenceStates | None = None,
    ) -> TokenStatistics:
        """Statistics of the n response tokens, row by row.

        Args:
            input_ids: [B, S] int64, prompt then response, right-padded. Padding comes after everything that counts, so causal
                attention hides it and no mask is needed.
            prompt_lengths, response_lengths: [B] int64; a prompt has at least one token.
            temperature, chunk_tokens, with_entropy, entropy_gradient, divergence: as in `token_statistics`.
        """
        hidden = self._decoder()(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, S, H]
        predicts = response_positions(prompt_lengths, response_lengths, input_ids.shape[1]) - 1  # the position before
        head = self.head
        return token_statistics(
            hidden.flatten(0, 1)[predicts],
            head.weight,
            input_ids.flatten()[predicts + 1],
            temperature=temperature,
            chunk_tokens=chunk_tokens,
            with_entropy=with_entropy,
            entropy_gradient=entropy_gradient,
            divergence=divergence,
            ref_hidden=None if reference is None else reference.hidden,
            ref_head=None if reference is None else reference.head,
            head_bias=head.bias,
        )

    @torch.no_grad()
    def hidden_states(self, *, input_ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor) -> Tensor:
        """[n, H]: the last hidden state before each response token."""
        hidden = self._decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[response_positions(prompt_lengths, response_lengths, input_ids.shape[1]) - 1]

    @contextmanager
    def capturing(self, outputs: dict[str, np.ndarray]) -> Iterator[None]:
        """Within, every forward of one row leaves the outputs [S, H] of the embedding and of each decoder layer in `outputs`."""
        modules = {"embed_tokens": self.model.get_input_embeddings()}
        modules |= {f"layers.{index}": layer for index, layer in enumerate(self._decoder().layers)}  # pyright: ignore[reportArgumentType]

        def recorder(name: str):
            def record(module, inputs, output) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                outputs[name] = hidden[0].detach().float().cpu().numpy()

            return record

        hooks = [module.register_forward_hook(recorder(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _decoder(self) -> nn.Module:
        return self.model.get_decoder()  # pyright: ignore[reportReturnType]


def response_positions(prompt_lengths: Tensor, response_lengths: Tensor, width: int) -> Tensor:
    """Indices [n] of the response tokens in a flattened [B, width], row by row."""
    column = torch.arange(width, device=prompt_lengths.device)
    start, end = prompt_lengths.unsqueeze(1), (prompt_lengths + response_lengths).unsqueeze(1)
    return ((column >= start) & (column < end)).flatten().nonzero().squeeze(1)
