"""What is decided about a batch before the learner sees it: shaped rewards, an off-policy correction's weights, chosen tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlkit.config import RunConfig, choice_of
from rlkit.controller.reweighting import reward_gains, reweighted
from rlkit.core.advantages import RewardComponent
from rlkit.core.aepo import Aepo, TemperedUse, TemperingState
from rlkit.core.apo import first_advantages
from rlkit.core.copo import answer_entropy
from rlkit.core.divergences import Penalty
from rlkit.core.estimators import Place
from rlkit.core.ratios import Correction, correction_metrics, effective_fraction
from rlkit.core.selectors import NoTokenFilter, Selector
from rlkit.core.shaping import without_truncated
from rlkit.core.weights import TokenWeight
from rlkit.data.collate import group_index, token_rewards
from rlkit.errors import ConfigError, DataError
from rlkit.metrics import Max, Mean, Metric, Min
from rlkit.settings import WeightedRewards
from rlkit.types import Rollout, TrainBatch


def shaped_rewards(config: RunConfig, rollouts: Sequence[Rollout], weights: Mapping[str, float] | None = None) -> Tensor:
    """[B, T] float32: the rewards that advantages are computed from. `weights` of objectives, where they act on rewards."""
    rewards = token_rewards(rollouts)
    lengths = torch.tensor([len(rollout.response_ids) for rollout in rollouts])
    shaping = config.shaping(lengths=lengths, max_response_tokens=config.max_response_tokens)
    for gained in (reward_gains(config.objective_weights, rollouts, weights or {}), shaping):
        if gained is not None:
            rewards[torch.arange(len(rollouts)), (lengths - 1).clamp(min=0)] += gained
    return rewards


def reward_components(config: RunConfig, rollouts: Sequence[Rollout]) -> dict[str, RewardComponent]:
    """The reward's named parts, in the order that they first occur in. Raises ConfigError where no rollout has any.

    Stored parts have their weights in them; they are taken out, so that an estimator can normalise first and weigh then. Raises
    DataError for a row without a part that others of its source have: it would silently count as an average one.
    """
    names = dict.fromkeys(name for rollout in rollouts for name in rollout.reward_components)
    if not names:
        raise ConfigError(
            f"advantage={choice_of('advantage', config.advantage)}: it learns from the parts of the reward, and the reward "
            "function gave one number without parts. Write reward=weighted with "
            "reward.fns={right:my_rewards.py:exact,form:format}, or return a dict of named parts, or write advantage=grpo."
        )
    by_source: dict[str, dict[str, None]] = {}
    for rollout in rollouts:
        by_source.setdefault(rollout.source, {}).update(dict.fromkeys(rollout.reward_components))
    for rollout in rollouts:
        if lacking := [name for name in by_source[rollout.source] if name not in rollout.reward_components]:
            raise DataError(
                f"advantage={choice_of('advantage', config.advantage)}: sample {rollout.sample_id} has a reward of "
                f"{rollout.reward:g} without a part {lacking[0]}, which others of its source {rollout.source} have. Return every "
                "part for each completion that is not worth 0, or write advantage=grpo."
            )
    weights = part_weights(config)
    found = {}
    for name in names:
        weight = weights.get(name, 1.0)
        parts = [rollout.reward_components.get(name, math.nan) / weight for rollout in rollouts]
        found[name] = RewardComponent(rewards=torch.tensor(parts, dtype=torch.float64), weight=weight)
    return found


def part_weights(config: RunConfig) -> Mapping[str, float]:
    """Of each function and model where there are several: stored parts have them in them. Any other named part weighs 1."""
    if not isinstance(reward := config.reward, WeightedRewards):
        return {}
    return {name: reward.weights.get(name, 1.0) for name in (*reward.fns, *reward.models)}


def sharpened(config: RunConfig, batch: TrainBatch) -> TrainBatch:
    """The batch with the reference as its divergence takes it: of hidden states times x the head makes logits times x."""
    if batch.ref_hidden is None or batch.rewards is None or (sharpness := config.divergence.sharpness(batch.rewards)) is None:
        return batch
    return replace(batch, ref_hidden=batch.ref_hidden * sharpness[:, None, None])


@dataclass(frozen=True, kw_only=True, slots=True)
class DivergencePart:
    """What a divergence that acts in the advantages does to them, [B, T]."""

    penalty: Tensor
    is_all: bool  # they are the negative of it, and not less it
    metrics: dict[str, float]


def divergence_part(config: RunConfig, batch: TrainBatch, rollouts: Sequence[Rollout], coef: float | None) -> DivergencePart | None:
    """None for a divergence that is a term of the loss.

    To be asked while old_logprobs are the present policy's: it is that policy's distance from the reference.
    """
    if coef is None or batch.ref_logprobs is None or batch.old_logprobs is None:
        return None
    mask = batch.response_mask
    given = {"log_ratio": batch.old_logprobs - batch.ref_logprobs, "response_mask": mask, "group_ids": group_index(rollouts)}
    if (penalty := config.divergence.penalty(**given)) is not None:
        return DivergencePart(
            penalty=coef * penalty, is_all=False, metrics={"divergence/penalty_mean": float(penalty[mask].mean())}
        )
    assert batch.rewards is not None  # collate put them there
    if (target := config.divergence.target(**given, rewards=batch.rewards, coef=coef)) is not None:
        metrics = {"target/log_partition": float(target.log_partition.mean()), "target/gap": float(target.gap.mean())}
        return DivergencePart(penalty=target.penalty, is_all=True, metrics=metrics)
    return None


def with_advantages(
    config: RunConfig,
    batch: TrainBatch,
    rollouts: Sequence[Rollout],
    weights: Mapping[str, float] | None = None,
    *,
    divergence: DivergencePart | None = None,
    owners: Sequence[int] = (),
) -> tuple[TrainBatch, dict[str, float]]:
    """A batch of rollouts with its advantages [B, T], and what goes with them: a critic's targets, weights, a second advantage.

    `weights`: of the run's objectives; one that is not there weighs 1. The divergence's part comes last, behind every
    normalisation, so that its coefficient means the same in each batch. The last rows are parts of other rows' episodes, those of
    `owners`, and have their advantage.
    """
    assert batch.rewards is not None  # collate put them there
    groups, mask = group_index(rollouts), batch.response_mask
    rewards, whole = shaped_rewards(config, rollouts, weights), slice(batch.num_rows - len(owners))
    old_values = None if batch.old_values is None else batch.old_values[whole]
    components = {}
    if "reward_components" in config.advantage.needs:
        components["reward_components"] = reward_components(config, rollouts[whole])
    estimate = config.advantage(
        token_rewards=rewards[whole], response_mask=mask[whole], group_ids=groups[whole], values=old_values, **components
    )
    advantages, metrics = estimate.advantages, {}
    if owners:
        of_episode = first_advantages(advantages, mask[whole])[torch.tensor(owners)]
        advantages = torch.cat([advantages, of_episode.unsqueeze(-1) * mask[batch.num_rows - len(owners) :]])
    given = {"response_mask": mask, "rewards": batch.rewards, "group_ids": groups}
    if (by_row := config.advantage_weights(advantages=advantages, **given)) is not None:
        advantages = advantages * by_row.unsqueeze(-1)
        metrics |= {"advantage_weights/mean": float(by_row.mean()), "advantage_weights/max": float(by_row.max())}
    of_divergence = config.divergence_weights(advantages=advantages, **given)
    if of_divergence is not None:
        metrics["divergence_weights/mean"] = float(of_divergence.mean())
    if divergence is not None:
        penalty = divergence.penalty if of_divergence is None else divergence.penalty * of_divergence.unsqueeze(-1)
        advantages = -penalty if divergence.is_all else advantages - penalty
        metrics |= divergence.metrics
    share = episode_share(mask, owners) if owners else None
    batch = replace(batch, advantages=advantages, returns=estimate.returns, divergence_weight=of_divergence, episode_share=share)
    entropy = answer_entropy(config.prompt_advantage.answers([rollout.text for rollout in rollouts]), groups)
    if (blend := config.prompt_advantage(advantages=advantages, entropy=entropy, **given)) is not None:
        metrics |= {"copo/h_mean": float(entropy.mean()), "copo/s_mean": float(blend.weight.mean())}
        batch = replace(batch, prompt_advantages=blend.advantages, local_weight=blend.weight)
    return reweighted(config.objective_weights, batch, rollouts, weights or {}), metrics


def episode_share(response_mask: Tensor, owners: Sequence[int]) -> Tensor:
    """[B] float32: a row's share of its episode's tokens. The last rows belong to the episodes of the rows `owners`."""
    num_main = len(response_mask) - len(owners)
    episode = torch.cat([torch.arange(num_main), torch.tensor(owners)])
    tokens = response_mask.sum(-1).double()
    whole = torch.zeros(num_main, dtype=torch.float64).index_add(0, episode, tokens)
    return (tokens / whole[episode].clamp(min=1)).float()


def episode_parts(config: RunConfig, rollouts: Sequence[Rollout]) -> list[tuple[Rollout, int]]:
    """Earlier turns that are rows of their own, each with the row of its episode, whose advantage it takes. Raises ConfigError
    where something that is chosen would count an episode several times, or has an advantage for each token."""
    parts = [(part, row) for row, rollout in enumerate(rollouts) for part in rollout.parts]
    if not parts:
        return []
    why = "the model's chat template rewrites earlier turns, so an episode becomes several rows"
    if not config.compares_groups:
        raise ConfigError(f"advantage={choice_of('advantage', config.advantage)}: {why} with one advantage. Write advantage=grpo.")
    divergence = config.divergence
    if isinstance(divergence, Penalty) and divergence.place is not Place.loss:
        raise ConfigError(
            f"divergence.place={divergence.place.name}: {why}, and would count as often. Write divergence.place=loss."
        )
    for group in ("advantage_weights", "divergence_weights", "prompt_advantage", "objective_weights", "tempering", "imitation"):
        if (chosen := choice_of(group, getattr(config, group))) != "none":
            raise ConfigError(f"{group}={chosen}: {why}, and would count as often. Write {group}=none, or another chat template.")
    return parts


def correct(correction: Correction, batch: TrainBatch) -> tuple[TrainBatch, dict[str, Metric]]:
    """The batch of one optimiser step with its correction's weights, and what they were.

    Asked about all rows at once: a weight may depend on other rows, and rejected tokens leave the step's denominators.
    """
    if batch.old_logprobs is None:
        return batch, {}
    given = {"old_logprobs": batch.old_logprobs, "rollout_logprobs": batch.rollout_logprobs, "response_mask": batch.response_mask}
    weights = correction(**given)
    if weights is None:
        return batch, {}
    found = correction_metrics(weights, **given)
    metrics: dict[str, Metric] = {name: Mean(*pair) for name, pair in found.means.items()}
    metrics |= {name: Max(value) for name, value in found.maxima.items()} | {
        name: Min(value) for name, value in found.minima.items()
    }
    return replace(batch, policy_weight=weights.weight, policy_mask=weights.keep), metrics


def filtered(config: RunConfig, batch: TrainBatch, truncated: Tensor) -> tuple[TrainBatch, dict[str, float]]:
    """A batch of rollouts with the tokens that are trained on, and the share that is not. Advantages stay as they are.

    truncated: [B] bool, responses that ran into the token limit.
    """
    mask = batch.response_mask
    keep = mask
    if not isinstance(config.token_filter, NoTokenFilter):
        assert batch.old_logprobs is not None  # such a filter needs old_pass or more
        keep = config.token_filter(
            old_logprobs=batch.old_logprobs,
            rollout_logprobs=batch.rollout_logprobs,
            advantages=batch.advantages,
            response_mask=mask,
            entropy=batch.old_entropy,
            expected_score=batch.old_expected_score,
        )
    if config.mask_truncated:
        keep = keep & without_truncated(mask, truncated)
    if keep is mask:
        return batch, {}
    return replace(batch, train_mask=keep), {"filter/dropped_fraction": float((mask & ~keep).sum() / mask.sum().clamp(min=1))}


def joined(tempering: Aepo, batch: TrainBatch, num_main: int, state: TemperingState) -> tuple[TrainBatch, dict[str, float]]:
    """The rows that are trained on: of those behind the first `num_main`, which are tempered, the good ones join."""
    first = first_advantages(batch.advantages, batch.response_mask)
    rows = tempering.join(first[num_main:], num_main=num_main, state=state)
    taken = len(rows.tempered)
    metrics = {"aepo/num_samples": float(taken), "aepo/frac_replaced": 1 - len(rows.main) / num_main}
    batch = batch.select([*(rows.tempered + num_main).tolist(), *rows.main.tolist()])
    mask, is_tempered = batch.response_mask, torch.zeros(batch.response_mask.shape, dtype=torch.bool)
    is_tempered[:taken] = True
    if tempering.use is TemperedUse.additive:
        return replace(batch, tempered_mask=mask & is_tempered, response_mask=mask & ~is_tempered), metrics
    assert batch.old_logprobs is not None  # `replace` needs old_pass
    # What the engine reported of them is of another temperature; the policy to compare with is the one before the update.
    sampled = torch.where(is_tempered, batch.old_logprobs, batch.rollout_logprobs)
    advantages = torch.where(is_tempered, mask.float(), batch.advantages)
    return replace(batch, rollout_logprobs=sampled, advantages=advantages), metrics


def blended(tempering: Aepo, batch: TrainBatch, tempered_old_logprobs: Tensor, state: TemperingState) -> TrainBatch:
    """With advantages that lean towards what the policy would do at another temperature."""
    assert batch.old_logprobs is not None  # it needs old_pass
    assert batch.rewards is not None
    advantages = tempering.blend(
        batch.advantages,
        old_logprobs=batch.old_logprobs,
        tempered_old_logprobs=tempered_old_logprobs,
        rewards=batch.rewards,
        response_mask=batch.response_mask,
        state=state,
    )
    return replace(batch, advantages=advantages)


def narrow(batch: TrainBatch) -> TrainBatch:
    """The batch of one optimiser step without the tokens that a filter dropped: they leave every term and denominator.

    After the correction, whose statistics are of all that was sampled.
    """
    if batch.train_mask is None:
        return batch
    keep = None if batch.policy_mask is None else batch.policy_mask & batch.train_mask
    return replace(batch, response_mask=batch.train_mask, policy_mask=keep, train_mask=None)


def weigh(token_weight: TokenWeight, batch: TrainBatch) -> tuple[TrainBatch, dict[str, Metric]]:
    """The batch of one optimiser step with its tokens' weights, where they are about the whole step."""
    if not token_weight.whole_batch:
        return batch, {}
    assert batch.old_logprobs is not None  # such a weight needs old_pass or more
    weight = token_weight(
        logprobs=batch.old_logprobs,
        old_logprobs=batch.old_logprobs,
        advantages=batch.advantages,
        response_mask=batch.response_mask,
        entropy=batch.old_entropy,
        expected_score=batch.old_expected_score,
    )
    if weight is None:
        return batch, {}
    count = float(batch.response_mask.sum())
    found = weight[batch.response_mask]
    metrics: dict[str, Metric] = {} if not count else {"token_weight/mean": Mean(float(found.double().sum()), count)}
    metrics |= {} if not count else {"token_weight/min": Min(float(found.min())), "token_weight/max": Max(float(found.max()))}
    return _weighed(batch, weight), metrics


def balance(batch: TrainBatch) -> TrainBatch:
    """The batch of one optimiser step with its objectives' weights on its rows' policy loss, where they act there."""
    if batch.objective_weight is None:
        return batch
    return _weighed(batch, batch.objective_weight.unsqueeze(-1).expand(batch.response_mask.shape))


def _weighed(batch: TrainBatch, weight: Tensor) -> TrainBatch:
    """With one more weight [B, T] on the policy term."""
    whole = weight if batch.policy_weight is None else weight * batch.policy_weight
    keep = batch.response_mask if batch.policy_mask is None else batch.policy_mask
    return replace(batch, policy_weight=whole, policy_mask=keep)


def choose(selector: Selector, batch: TrainBatch, seed: int) -> tuple[TrainBatch, dict[str, Metric]]:
    """The batch of one optimiser step with the tokens that its selector picks, where it picks among all of them."""
    if not selector.whole_batch:
        return batch, {}
    assert batch.old_logprobs is not None  # such a selector needs old_pass
    chosen = selector.choose(
        logprobs=batch.old_logprobs,
        advantages=batch.advantages,
        response_mask=batch.response_mask,
        generator=torch.Generator().manual_seed(seed),
    )
    share = Mean(float(chosen.sum()), float(batch.response_mask.sum()))
    return replace(batch, chosen=chosen), {"selector/fraction": share}


def with_effective_sample_size(metrics: dict[str, float]) -> dict[str, float]:
    """A ratio of two means, so it is taken when they are complete."""
    if "is/square_mean" in metrics:
        metrics["is/ess"] = effective_fraction(metrics["is/mean"], metrics.pop("is/square_mean"))
    return metrics
