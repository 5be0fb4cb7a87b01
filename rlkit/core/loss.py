"""The fixed chain from one microbatch's log-probabilities to its named loss terms."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlkit.core.divergences import Divergence
from rlkit.core.entropy import EntropyTerm
from rlkit.core.imitation import Imitation, NoImitation
from rlkit.core.objectives import Objective, Surrogate
from rlkit.core.ratios import Correction, Weights
from rlkit.core.reduce import Aggregation, LossTerm
from rlkit.core.selectors import Selector
from rlkit.core.values import Critic, NoCritic, TrainedCritic


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTerms:
    """One microbatch's loss terms, "policy" first, and what its metrics are computed from."""

    terms: list[LossTerm]
    surrogate: Surrogate  # after the selector, before the correction's weight
    keep: Tensor  # [B, T] bool, the policy term's mask: response_mask without the tokens a correction rejected


@dataclass(kw_only=True, slots=True)
class Strategy:
    """The chosen parts of a run's loss. No part knows another, so none can drop another's term."""

    objective: Objective
    selector: Selector
    correction: Correction
    divergence: Divergence
    entropy: EntropyTerm
    aggregation: Aggregation  # of every term but those of imitation and values, which are means over tokens
    imitation: Imitation = field(default_factory=NoImitation)
    critic: Critic = field(default_factory=NoCritic)

    @property
    def needs(self) -> frozenset[str]:
        """What must be computed for any of the parts."""
        parts = (self.objective, self.selector, self.correction, self.divergence, self.entropy, self.imitation, self.critic)
        return frozenset().union(*(part.needs for part in parts))

    def masks(self, *, response_mask: Tensor, keep: Tensor | None = None, rewards: Tensor | None = None) -> dict[str, Tensor]:
        """Name of every possible term -> the tokens [B, T] bool that its denominators count, over a whole optimiser step."""
        masks = dict.fromkeys(("divergence", "entropy", "value"), response_mask) | {
            "policy": response_mask if keep is None else keep
        }
        if rewards is not None and (imitated := self.imitation.mask(rewards=rewards, response_mask=response_mask)) is not None:
            masks["imitation"] = imitated
        return masks

    def terms(
        self,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        rollout_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        divergence_coef: float | None,
        entropy_coef: float | None,
        behaviour_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        entropy: Tensor | None = None,
        exact_divergence: Tensor | None = None,
        rewards: Tensor | None = None,
        values: Tensor | None = None,
        old_values: Tensor | None = None,
        returns: Tensor | None = None,
        weights: Weights | None = None,
        chosen: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> StepTerms:
        """Objective -> selector -> correction, then the other terms beside them. All tensors [B, T]; rewards [B].

        A choice of `none` builds no term; its coefficient is None. The others' coefficients come from their controllers. The
        correction's weight multiplies the policy term only, and only that term loses the tokens it rejects: divergence and
        entropy stay on the whole response_mask. behaviour_logprobs, of the policy that sampled, are old_logprobs unless
        given: pass rollout_logprobs for a stale or replayed batch. weights are the correction's where it was asked about the
        whole optimiser step, which it must be if it is a `whole_batch` one; so are the selector's chosen tokens. generator is
        for a selector that chooses within the microbatch.
        """
        surrogate = self.objective(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, response_mask=response_mask)
        surrogate = self.selector(
            surrogate,
            logprobs=logprobs,
            old_logprobs=old_logprobs,
            advantages=advantages,
            response_mask=response_mask,
            chosen=chosen,
            generator=generator,
        )
        if weights is None:
            weights = self.correction(old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs, response_mask=response_mask)
        keep, policy_loss = response_mask, surrogate.loss
        if weights is not None:
            keep, policy_loss = weights.keep, surrogate.loss * weights.weight.masked_fill(~weights.keep, 0.0)
        divergence_loss = self.divergence.loss(
            logprobs=logprobs,
            behaviour_logprobs=old_logprobs if behaviour_logprobs is None else behaviour_logprobs,
            ref_logprobs=ref_logprobs,
            response_mask=response_mask,
            exact_values=exact_divergence,
        )
        terms = [self._term("policy", policy_loss, keep, 1.0)]
        if divergence_loss is not None:
            terms.append(self._term("divergence", divergence_loss, response_mask, divergence_coef))
        if (entropy_loss := self.entropy.loss(entropy=entropy)) is not None:
            terms.append(self._term("entropy", entropy_loss, response_mask, entropy_coef))
        if rewards is not None:
            imitation = self.imitation.term(logprobs=logprobs, rewards=rewards, response_mask=response_mask)
            terms += [imitation] if imitation is not None else []
        if isinstance(self.critic, TrainedCritic):
            assert values is not None, "a critic needs its values"
            assert old_values is not None, "a critic needs the values that the advantages were computed from"
            assert returns is not None, "a critic needs returns"
            loss = self.critic.loss(values=values, old_values=old_values, returns=returns, response_mask=response_mask)
            terms.append(
                LossTerm(name="value", loss=loss, mask=response_mask, coef=self.critic.coef, aggregation=Aggregation.token_mean)
            )
        return StepTerms(terms=terms, surrogate=surrogate, keep=keep)

    def _term(self, name: str, loss: Tensor, mask: Tensor, coef: float | None) -> LossTerm:
        assert coef is not None, f"the {name} term is on: pass {name}_coef"
        return LossTerm(name=name, loss=loss, mask=mask, coef=coef, aggregation=self.aggregation)
