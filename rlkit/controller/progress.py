"""What the controller must remember to go on with a run: everything else follows from it, the settings and the seed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from rlkit.config import RunConfig
from rlkit.controller.evaluate import Evaluation
from rlkit.core.aepo import TemperingState
from rlkit.core.control import ControlState, Fixed
from rlkit.core.curriculum import CurriculumState
from rlkit.core.entropy import EntropyState
from rlkit.core.recap import Judged, ObjectivesState
from rlkit.core.safe import NoSafeguard, SafeState
from rlkit.errors import DataError
from rlkit.metrics import Metric
from rlkit.types import TrainBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Coefficients:
    """The numbers of the loss that controllers move once per optimiser step, each its own; see `RunConfig.controlled`.

    What is fixed is not in here: its setting holds, also where a resumed run was given another.
    """

    states: dict[str, ControlState]  # by term

    @classmethod
    def start(cls, config: RunConfig) -> Coefficients:
        """Before the first optimiser step."""
        return cls(
            states={
                term: moved.control.initial(moved.start, sign=moved.sign)
                for term, moved in config.controlled.items()
                if moved.start is not None and not isinstance(moved.control, Fixed)
            }
        )

    def of(self, term: str, config: RunConfig) -> float | None:
        """The number for the next optimiser step; None where the term is off."""
        state = self.states.get(term)
        return config.controlled[term].start if state is None else state.coef

    def restored(self, stored: dict[str, dict[str, float]]) -> Coefficients:
        """These, with every number as it was saved."""
        return Coefficients(states={term: replace(state, **stored[term]) for term, state in self.states.items()})

    def metrics(self, config: RunConfig) -> dict[str, float]:
        """What the controllers did."""
        return {
            f"ctrl/{term}/{name}": value
            for term, state in self.states.items()
            for name, value in config.controlled[term].control.metrics(state).items()
        }

    def update(self, config: RunConfig, metrics: dict[str, Metric], num_sequences: int) -> Coefficients:
        """After an optimiser step over num_sequences responses, which measured `metrics`. A step that trained on no token, as where
        a filter dropped all of it, measured nothing, and moves nothing."""

        def moved(term: str, state: ControlState) -> ControlState:
            found = metrics.get(config.controlled[term].measured)
            measured = math.nan if found is None else found.value
            return config.controlled[term].control.update(state, measured, num_sequences)

        return Coefficients(states={term: moved(term, state) for term, state in self.states.items()})


@dataclass(kw_only=True, slots=True)
class Progress:
    """A run between two steps."""

    coefficients: Coefficients
    entropy: EntropyState  # what the entropy term remembers
    safeguard: SafeState  # the safeguard
    tempering: TemperingState  # and the tempering
    objectives: ObjectivesState  # how each objective went
    curriculum: CurriculumState  # how often each prompt was solved
    step: int = 0  # finished
    prompts_drawn: int = 0  # by the finished steps
    before: Evaluation | None = None  # the first evaluation
    after: Evaluation | None = None  # the newest
    evaluated_at: int = -1  # step of the newest evaluation
    saved_at: int = -1  # step of the newest checkpoint
    best_step: int | None = None  # of the checkpoints, the one with the best held-out reward
    best_reward: float | None = None

    @classmethod
    def start(cls, config: RunConfig) -> Progress:
        """Before the first step."""
        return cls(
            coefficients=Coefficients.start(config),
            entropy=config.entropy.initial(),
            safeguard=config.safeguard.initial(),
            tempering=config.tempering.initial(),
            objectives=config.objective_weights.initial(),
            curriculum=config.curriculum.initial(),
        )

    def having_seen(self, config: RunConfig, batch: TrainBatch) -> Progress:
        """With what strategies remember of a batch of rollouts, before it is trained on."""
        entropy = config.entropy.update(
            self.entropy,
            response_mask=batch.response_mask,
            entropy=batch.old_entropy,
            nucleus_entropy=batch.old_nucleus_entropy,
            turns=batch.turns,
        )
        safeguard = self.safeguard
        if not isinstance(config.safeguard, NoSafeguard):
            assert batch.old_logprobs is not None  # a safeguard's needs name them
            assert batch.ref_logprobs is not None
            assert batch.old_entropy is not None
            assert batch.rewards is not None
            mask = batch.response_mask
            by_row = batch.old_entropy.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
            share = torch.ones(batch.num_rows) if batch.episode_share is None else batch.episode_share
            safeguard = config.safeguard.update(
                safeguard,
                kl=float((batch.old_logprobs - batch.ref_logprobs)[mask].mean()),
                entropy=float((by_row * share).sum() / share.sum()),
                reward=float((batch.rewards * share).sum() / share.sum()),
            )
        return replace(self, entropy=entropy, safeguard=safeguard)

    def divergence_coef(self, config: RunConfig) -> float | None:
        """What multiplies the divergence term now: its controller's coefficient and what the safeguard adds. None: no term."""
        coef = self.coefficients.of("divergence", config)
        return None if coef is None else coef + config.safeguard.coef(self.safeguard)

    def judged(self, config: RunConfig) -> dict[str, Judged]:
        """The run's objectives, with their weights in the next step; empty where all weigh 1."""
        return config.objective_weights.judge(self.objectives, done=self.step / config.num_steps)

    def metrics(self, config: RunConfig) -> dict[str, float]:
        """What strategies remember."""
        safeguard = {f"safe/{name}": value for name, value in config.safeguard.metrics(self.safeguard).items()}
        return config.entropy.metrics(self.entropy) | safeguard

    def note_best(self) -> None:
        """This step is about to be saved: is it the best saved so far?"""
        if self.after is None or self.evaluated_at != self.step:
            return
        reward = float(self.after.rewards.mean())
        if self.best_reward is None or reward > self.best_reward:
            self.best_step, self.best_reward = self.step, reward

    def to_json(self, fingerprint: str) -> dict[str, Any]:
        """Plain values, with the data set's fingerprint."""
        return {
            "fingerprint": fingerprint,
            "step": self.step,
            "prompts_drawn": self.prompts_drawn,
            "coefficients": {term: asdict(state) for term, state in self.coefficients.states.items()},
            "entropy": asdict(self.entropy),
            "safeguard": asdict(self.safeguard),
            "tempering": asdict(self.tempering),
            "objectives": asdict(self.objectives),
            "curriculum": asdict(self.curriculum),
            "before": None if self.before is None else self.before.to_json(),
            "after": None if self.after is None else self.after.to_json(),
            "evaluated_at": self.evaluated_at,
            "saved_at": self.saved_at,
            "best_step": self.best_step,
            "best_reward": self.best_reward,
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any], config: RunConfig, fingerprint: str) -> Progress:
        """Raises DataError when the data set is not the one that the run began with."""
        if stored["fingerprint"] != fingerprint:
            raise DataError(
                f"data: the prompts are not those that the run began with (fingerprint {fingerprint}, then "
                f"{stored['fingerprint']}), so its order cannot be continued. Restore the data, or start a "
                "new run from the checkpoint with model.path."
            )
        evaluations = {name: stored[name] and Evaluation.from_json(stored[name]) for name in ("before", "after")}
        plain = {name: stored[name] for name in ("step", "prompts_drawn", "evaluated_at", "saved_at", "best_step", "best_reward")}
        start = cls.start(config)
        return replace(
            start,
            coefficients=start.coefficients.restored(stored["coefficients"]),
            entropy=replace(start.entropy, **stored["entropy"]),
            safeguard=replace(start.safeguard, **stored["safeguard"]),
            tempering=replace(start.tempering, **stored["tempering"]),
            objectives=replace(start.objectives, **stored["objectives"]),
            curriculum=replace(start.curriculum, **stored.get("curriculum", {})),  # older checkpoints of this format have none
            **evaluations,
            **plain,
        )
