"""A model that scores given tokens: the reference, later a teacher. It is frozen, or follows the policy by a rule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlkit.core.logprobs import chunk_size, token_statistics
from rlkit.core.references import MovingReference, Weights, side_by_side
from rlkit.data.collate import sequences_of
from rlkit.data.layout import LayoutKind, arrange
from rlkit.data.models.loading import checkpoint_tensors, load_model
from rlkit.data.models.policy import Policy
from rlkit.data.models.reference import pour_soup
from rlkit.errors import DataError, ResourceError, WorkerError
from rlkit.types import Rollout
from rlkit.workers.rollout.engine import expected_tensors
from rlkit.workers.weight_sync import Manifest, WeightPart, check_complete, digests, unpack

STATE, POSITION = "state/reference.safetensors", "state/reference.json"  # of a checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerSpec:
    """What a scorer is built from; equal specs can share one."""

    model_path: str  # a folder in Hugging Face format
    dtype: str
    trust_remote_code: bool
    tokens_per_microbatch: int
    head_memory_mib: int
    soup: tuple[tuple[str, float], ...] = ()  # folder and share of each model whose average takes the place of the weights
    second_path: str = ""  # of another model, of which and the first this scores the geometric mixture
    second_share: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Per rollout, in order; what was not asked for is None."""

    logprobs: list[np.ndarray]  # each [T] float32, at the learner's temperature
    hidden: list[np.ndarray] | None  # each [T, H] float32, for exact divergences together with `head`
    ref_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """What became of a reference that followed the policy."""

    ref_version: int  # of the weights that score now
    distance: float  # Euclidean, over all weights, of the policy from the reference as it was before


class Scorer:
    """Holds one model, or the mixture of two."""

    def __init__(self, spec: ScorerSpec, *, num_threads: int | None = None):
        if num_threads:
            torch.set_num_threads(num_threads)
        self.spec = spec
        self._load()

    def _load(self) -> None:
        """The weights as they are on disk."""
        self.policy = self._model(self.spec.model_path)
        if self.spec.soup:
            pour_soup(self.policy.model, self.spec.soup)
        self._second: Policy | None = None
        if self.spec.second_path:
            self._second = self._model(self.spec.second_path)
            heads = [unbiased_head(policy) for policy in (self.policy, self._second)]
            self._mixed_head = torch.cat(heads, dim=1)
        self._moving: MovingWeights | None = None
        self.ref_version = self.moved_at = 0

    def _model(self, path: str) -> Policy:
        dtype = getattr(torch, self.spec.dtype)
        return Policy(load_model(path, dtype=dtype, trust_remote_code=self.spec.trust_remote_code)).requires_grad_(False)

    def begin(self, rule: MovingReference | None) -> None:
        """Forget what an earlier run did to the weights; `rule` is how they will move in this one, None for not at all."""
        if self._moving is not None and self._moving.has_moved:
            self._load()
        self._moving = None if rule is None else MovingWeights(rule, self.policy, self.spec)

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], *, temperature: float, with_hidden: bool) -> Scores:
        """Log-probs of the rollouts' own tokens, and on request the hidden states that the head turns into whole distributions."""
        if self._moving is not None and self._moving.is_torn:
            raise WorkerError("The reference was asked for scores while its weights are half of one version and half of the next.")
        takes_masks = all(policy.takes_masks for policy in (self.policy, self._second) if policy is not None)
        kind = LayoutKind.auto if takes_masks else LayoutKind.padded
        budget, sequences = self.spec.tokens_per_microbatch, sequences_of(rollouts)
        chunk_tokens = chunk_size(self.policy.vocab_size, memory_bytes=self.spec.head_memory_mib << 20)
        second = self._second
        head, bias = (self.policy.head.weight, self.policy.head.bias) if second is None else (self._mixed_head, None)
        logprobs: dict[int, np.ndarray] = {}
        hidden: dict[int, np.ndarray] = {}
        for samples, layout in arrange(sequences, token_budget=budget, kind=kind, cost=self.policy.cost):
            sizes = sequences.response_lengths[samples].tolist()
            states = self.policy.hidden_states(layout)
            if second is not None:
                states = side_by_side(states, second.hidden_states(layout), share=self.spec.second_share)
            statistics = token_statistics(
                states, head, layout.targets, temperature=temperature, chunk_tokens=chunk_tokens, head_bias=bias
            )
            for sample, values in zip(samples, statistics.logprobs.split(sizes), strict=True):
                logprobs[sample] = values.numpy()
            if with_hidden:
                for sample, values in zip(samples, states.split(sizes), strict=True):
                    hidden[sample] = values.float().numpy()
        return Scores(
            logprobs=[logprobs[row] for row in range(len(rollouts))],
            hidden=[hidden[row] for row in range(len(rollouts))] if with_hidden else None,
            ref_version=self.ref_version,
        )

    def head(self) -> np.ndarray:
        """[V, H] float32: the output head that belongs to the hidden states."""
        return (unbiased_head(self.policy) if self._second is None else self._mixed_head).float().numpy()

    # --- following the policy ----------------------------------------------------------------------------------------------

    def receive(self, part: WeightPart) -> None:
        """Move some layers towards the policy's of `part`. Until `commit` nothing can be scored."""
        self._rule_of().receive(part)

    def commit(self, manifest: Manifest) -> Move:
        """The next version of the reference, from the policy that `manifest` describes. Raises SyncError where it came in part."""
        distance = self._rule_of().commit(manifest)
        self.ref_version += 1
        self.moved_at = manifest.version
        return Move(ref_version=self.ref_version, distance=distance)

    def save(self, folder: str) -> None:
        """Into a checkpoint's `state/`, which exists, what a reference that moves has become. Raises ResourceError."""
        position = {"ref_version": self.ref_version, "moved_at": self.moved_at}
        try:
            save_file(self._rule_of().state(), Path(folder) / STATE)
            (Path(folder) / POSITION).write_text(json.dumps(position), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise ResourceError(f"reference scorer: {error}") from error

    def restore(self, folder: str) -> tuple[int, int]:
        """Go on from what `save` wrote, bit for bit. Returns version and step of the last move; raises DataError for another's."""
        try:
            position = json.loads((Path(folder) / POSITION).read_text(encoding="utf-8"))
            state = load_file(Path(folder) / STATE)
        except OSError as error:
            raise DataError(
                f"{folder}: holds no reference that moved ({error.strerror}). Resume with the run's own reference, or start a new "
                "run from the checkpoint with model.path."
            ) from error
        self._rule_of().restore(state, folder)
        self.ref_version, self.moved_at = position["ref_version"], position["moved_at"]
        return self.ref_version, self.moved_at

    def _rule_of(self) -> MovingWeights:
        assert self._moving is not None, "begin with a rule comes first"
        return self._moving


def unbiased_head(policy: Policy) -> Tensor:
    """[V, H]. Raises DataError for a head with a bias, which is not part of what whole distributions are sent as."""
    if policy.head.bias is not None:
        raise DataError(
            f"{policy.model.name_or_path}: its output head has a bias, which mixtures and divergence.estimator=exact do not know. "
            "Use a reference without one, or another estimator."
        )
    return policy.head.weight.detach()


class MovingWeights:
    """A model's weights under a rule, in float32 whatever the model computes in: small steps would be lost in bfloat16."""

    def __init__(self, rule: MovingReference, policy: Policy, spec: ScorerSpec):
        self._rule, self._folder = rule, spec.model_path
        self._parameters = dict(policy.model.named_parameters())
        # In a model that computes in float32, the parameters themselves.
        self._weights = {name: rule.start(parameter.detach().float()) for name, parameter in self._parameters.items()}
        self._expected = frozenset(expected_tensors(spec.model_path))
        self._received: dict[str, str] = {}  # digests of a transfer under way
        self._squares = 0.0  # of its tensors' distances
        self.has_moved = False

    @property
    def is_torn(self) -> bool:
        """Whether some layers are of the next version already."""
        return bool(self._received)

    def receive(self, part: WeightPart) -> None:
        """Layer by layer as they come, so that no second copy of the model exists."""
        self._received |= digests(part.tensors)
        self.has_moved = True
        known = [name for name in part.tensors if name in self._parameters]  # `commit` names the others
        initial = checkpoint_tensors(self._folder, known) if self._rule.uses_initial else {}
        for name in known:
            old, policy = self._weights[name], unpack(part.tensors[name]).float()
            self._squares += float(torch.linalg.vector_norm(policy - old.ref, dtype=torch.float64) ** 2)
            # Rounded as the policy's are for an engine, or one that never moved would differ from it.
            start = initial[name].to(self._parameters[name].dtype).float() if name in initial else None
            self._put(name, self._rule.update(old, policy=policy, initial=start, step=part.version))

    def commit(self, manifest: Manifest) -> float:
        """How far the policy was from the reference before."""
        check_complete(manifest, self._received, self._expected, receiver="the reference")
        distance, self._received, self._squares = self._squares**0.5, {}, 0.0
        return distance

    def state(self) -> dict[str, Tensor]:
        """Name -> tensor of all that moves: `ref.<parameter>`, and `average.<parameter>` where the rule has one."""
        state = {f"ref.{name}": weights.ref for name, weights in self._weights.items()}
        return state | {f"average.{name}": one.average for name, one in self._weights.items() if one.average is not None}

    def restore(self, state: dict[str, Tensor], folder: str) -> None:
        """What `state` returned."""
        mine = self.state()
        if differing := sorted(mine.keys() ^ state.keys()):
            raise DataError(
                f"{folder}: its reference {'lacks' if differing[0] in mine else 'has'} {differing[0]}, unlike this run's. "
                "Resume with the run's own model and reference."
            )
        self.has_moved = True
        for name in self._parameters:
            self._put(name, Weights(ref=state[f"ref.{name}"], average=state.get(f"average.{name}")))

    @torch.no_grad()
    def _put(self, name: str, weights: Weights) -> None:
        parameter = self._parameters[name]
        parameter.copy_(weights.ref)
        is_exact = parameter.dtype is torch.float32
        self._weights[name] = Weights(ref=parameter.detach() if is_exact else weights.ref, average=weights.average)
