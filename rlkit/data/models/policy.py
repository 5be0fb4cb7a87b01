"""Runs a causal language model on prompt-and-response rows and reports statistics of the response tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from rlkit.core.logprobs import ExactDivergence, Nucleus, TokenStatistics, token_statistics
from rlkit.data.layout import Layout, ModelCost

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceStates:
    """What an exact divergence needs of the reference: its last hidden states at the same positions, and its head."""

    hidden: Tensor  # [n, H]
    head: Tensor  # [V, H]


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyOutput(TokenStatistics):
    """Statistics of the response tokens, and what a critic's heads on the policy's own layers say."""

    value_heads: Tensor | None = None  # [n, num_heads]


def hidden_before_responses(decoder: nn.Module, layout: Layout) -> Tensor:
    """[n, H]: the last hidden state before each response token."""
    hidden = decoder(
        input_ids=layout.input_ids, position_ids=layout.position_ids, attention_mask=layout.mask, use_cache=False
    ).last_hidden_state  # [R, S, H]
    # Not by [...]: its backward adds up in parallel, in an order of its own each time, where a prompt's end is before several
    # responses, and two runs on a CPU would differ.
    return hidden.flatten(0, 1).index_select(0, layout.predicts)


class Policy(nn.Module):
    """A language model as the learner and the scorer see it.

    The output head is applied here and not by the model, in chunks, to response positions only. All of it happens inside one
    `forward`, because that is where FSDP has the parameters gathered.
    """

    def __init__(self, model: PreTrainedModel, *, value_heads: nn.Module | None = None, values_train_layers: bool = False):
        """`value_heads`: a critic's, on the policy's layers, which its loss trains too or leaves alone."""
        super().__init__()
        self.model = model
        self.value_heads = value_heads
        self._values_train_layers = values_train_layers

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    @property
    def head(self) -> nn.Linear:
        """The output head; a tied one shares the embedding's weight."""
        return cast(nn.Linear, self.model.get_output_embeddings())

    @property
    def takes_masks(self) -> bool:
        """Whether rows of several samples are possible: every layer attends to all that its mask lets it see."""
        config = self.model.config
        kinds = getattr(config, "layer_types", None)
        full = set(kinds) == {"full_attention"} if kinds else not getattr(config, "sliding_window", None)
        return full and config._attn_implementation in ("sdpa", "eager")

    @property
    def cost(self) -> ModelCost:
        """Of its body; the output head is applied to response tokens only, whatever the layout."""
        embedding = cast(nn.Embedding, self.model.get_input_embeddings()).weight
        body = sum(parameter.numel() for parameter in self._decoder().parameters()) - embedding.numel()
        config = self.model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return ModelCost(per_token=body, per_pair=config.num_hidden_layers * config.num_attention_heads * head_dim)

    def forward(
        self,
        layout: Layout,
        *,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool = False,
        entropy_gradient: bool = True,
        with_expected_score: bool = False,
        nucleus: Nucleus | None = None,
        divergence: ExactDivergence | None = None,
        reference: ReferenceStates | None = None,
    ) -> PolicyOutput:
        """Statistics of the layout's n response tokens, sample by sample.

        Args:
            reference: what a divergence needs of it.
            All others are those of `token_statistics`.
        """
        head = self.head
        hidden = self._hidden(layout)
        statistics = token_statistics(
            hidden,
            head.weight,
            layout.targets,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
            with_entropy=with_entropy,
            entropy_gradient=entropy_gradient,
            with_expected_score=with_expected_score,
            nucleus=nucleus,
            divergence=divergence,
            ref_hidden=None if reference is None else reference.hidden,
            ref_head=None if reference is None else reference.head,
            head_bias=head.bias,
        )
        value_heads = None
        if self.value_heads is not None:
            value_heads = self.value_heads(hidden if self._values_train_layers else hidden.detach())
        return PolicyOutput(**{each.name: getattr(statistics, each.name) for each in fields(statistics)}, value_heads=value_heads)

    @torch.no_grad()
    def hidden_states(self, layout: Layout) -> Tensor:
        """[n, H]: the last hidden state before each response token."""
        return self._hidden(layout)

    def _hidden(self, layout: Layout) -> Tensor:
        return hidden_before_responses(self._decoder(), layout)

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
