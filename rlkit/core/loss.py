"""The fixed chain from one microbatch's log-probabilities to its named loss terms."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlkit.core.aepo import Aepo, NoTempering, Tempering
from rlkit.core.anchors import Anchor, NoAnchor, OldPolicyAnchor
from rlkit.core.copo import Blend
from rlkit.core.divergences import Divergence
from rlkit.core.entropy import EntropyState, EntropyTerm
from rlkit.core.imitation import Imitation, NoImitation
from rlkit.core.objectives import Objective, Surrogate
from rlkit.core.ratios import Correction, Weights
from rlkit.core.reduce import Aggregation, LossTerm
from rlkit.core.rehearsal import NoRehearsal, Rehearsal
from rlkit.core.selectors import Selector
from rlkit.core.values import Critic, NoCritic, TrainedCritic
from rlkit.core.weights import NoTokenWeight, TokenWeight


@dataclass(frozen=True, kw_only=True, slots=True)
class Knobs:
    """What is decided about one optimiser step outside its loss: by controllers, and from the batches before."""

    divergence_coef: float | None = None  # None: no such term
    entropy_coef: float | None = None
    clip_high: float | None = None  # the objective's upper threshold; None: its own setting, or it has none
    entropy_state: EntropyState | None = None  # of the batch of rollouts; None: the term remembers nothing
    entropy_measured: float | None = None  # what the entropy term's `measure` said of the step
    imitation_weight: float = 1.0  # of the imitation term among the run's objectives


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
    token_weight: TokenWeight = field(default_factory=NoTokenWeight)
    tempering: Tempering = field(default_factory=NoTempering)
    aggregation: Aggregation  # of every term but those of imitation and values, which are means over tokens
    imitation: Imitation = field(default_factory=NoImitation)
    rehearsal: Rehearsal = field(default_factory=NoRehearsal)
    critic: Critic = field(default_factory=NoCritic)
    anchor: Anchor = field(default_factory=NoAnchor)

    @property
    def needs(self) -> frozenset[str]:
        """What must be computed for any of the parts."""
        parts = (
            self.objective,
            self.selector,
            self.token_weight,
            self.correction,
            self.divergence,
            self.entropy,
            self.imitation,
            self.critic,
            self.tempering,
            self.anchor,
        )
        return frozenset().union(*(part.needs for part in parts))

    def masks(
        self,
        *,
        response_mask: Tensor,
        keep: Tensor | None = None,
        rewards: Tensor | None = None,
        tempered_mask: Tensor | None = None,
        rehearsal_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Name of every possible term -> the tokens [B, T] bool that its denominators count, over a whole optimiser step."""
        masks = dict.fromkeys(("divergence", "anchor", "entropy", "value"), response_mask) | {
            "policy": response_mask if keep is None else keep
        }
        if rewards is not None and (imitated := self.imitation.mask(rewards=rewards, response_mask=response_mask)) is not None:
            masks["imitation"] = imitated
        if tempered_mask is not None:
            masks["aepo"] = tempered_mask
        if rehearsal_mask is not None:
            masks["rehearsal"] = rehearsal_mask
        return masks

    def terms(
        self,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        rollout_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        knobs: Knobs,
        behaviour_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        entropy: Tensor | None = None,
        nucleus_entropy: Tensor | None = None,
        old_entropy: Tensor | None = None,
        old_expected_score: Tensor | None = None,
        turns: Tensor | None = None,
        exact_divergence: Tensor | None = None,
        rewards: Tensor | None = None,
        values: Tensor | None = None,
        old_values: Tensor | None = None,
        returns: Tensor | None = None,
        weights: Weights | None = None,
        chosen: Tensor | None = None,
        blend: Blend | None = None,
        divergence_weight: Tensor | None = None,
        tempered_mask: Tensor | None = None,
        rehearsal_mask: Tensor | None = None,
        stored_logprobs: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> StepTerms:
        """Objective -> blend -> selector -> token weight -> correction, then the other terms beside them.

        All tensors [B, T]; rewards and divergence_weight, which multiplies the divergence of whole responses, [B].

        A choice of `none` builds no term; its coefficient is None. The others' coefficients come from their controllers, and so
        does the threshold in the place of the objective's own. The correction's weight multiplies the policy term only, and only
        that term loses the tokens it rejects: divergence and entropy stay on the whole response_mask. behaviour_logprobs, of the
        policy that sampled, are old_logprobs unless
        given: pass rollout_logprobs for a stale or replayed batch. weights are the correction's where it was asked about the
        whole optimiser step, which it must be if it is a `whole_batch` one, times a token weight that was asked about it too;
        so are the selector's chosen tokens. blend brings a second advantage, tempered_mask the
        tokens of the tempering's own term, rehearsal_mask those of stored answers. generator is
        for a selector that chooses within the microbatch.
        """
        tokens = {"logprobs": logprobs, "old_logprobs": old_logprobs, "response_mask": response_mask}
        objective = self.objective if knobs.clip_high is None else replace(self.objective, clip_high=knobs.clip_high)
        surrogate = objective(advantages=advantages, **tokens)
        if blend is not None:
            surrogate = blend(surrogate, objective(advantages=blend.advantages, **tokens))
        surrogate = self.selector(surrogate, advantages=advantages, chosen=chosen, generator=generator, **tokens)
        if weights is None:
            weights = self.correction(old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs, response_mask=response_mask)
        keep, policy_loss = response_mask, surrogate.loss
        if not self.token_weight.whole_batch:
            weight = self.token_weight(
                logprobs=logprobs.detach(),
                old_logprobs=old_logprobs,
                advantages=advantages,
                response_mask=response_mask,
                entropy=entropy if old_entropy is None else old_entropy,
                expected_score=old_expected_score,
            )
            policy_loss = policy_loss if weight is None else policy_loss * weight
        if weights is not None:
            keep, policy_loss = weights.keep, policy_loss * weights.weight.masked_fill(~weights.keep, 0.0)
        divergence_loss = self.divergence.loss(
            logprobs=logprobs,
            behaviour_logprobs=old_logprobs if behaviour_logprobs is None else behaviour_logprobs,
            ref_logprobs=ref_logprobs,
            response_mask=response_mask,
            exact_values=exact_divergence,
        )
        terms = [self._term("policy", policy_loss, keep, 1.0)]
        if divergence_loss is not None:
            if divergence_weight is not None:
                divergence_loss = divergence_loss * divergence_weight.unsqueeze(-1)
            terms.append(self._term("divergence", divergence_loss, response_mask, knobs.divergence_coef))
        anchored = self.anchor.loss(logprobs=logprobs, old_logprobs=old_logprobs, response_mask=response_mask)
        if anchored is not None:
            assert isinstance(self.anchor, OldPolicyAnchor)
            terms.append(self._term("anchor", anchored, response_mask, self.anchor.coef))
        entropy_loss = self.entropy.loss(
            entropy=entropy,
            nucleus_entropy=nucleus_entropy,
            response_mask=response_mask,
            turns=turns,
            state=knobs.entropy_state,
            measured=knobs.entropy_measured,
        )
        if entropy_loss is not None:
            terms.append(self._term("entropy", entropy_loss, response_mask, knobs.entropy_coef, self.entropy.aggregation))
        if rewards is not None:
            imitation = self.imitation.term(logprobs=logprobs, rewards=rewards, response_mask=response_mask)
            terms += [] if imitation is None else [replace(imitation, coef=imitation.coef * knobs.imitation_weight)]
        if tempered_mask is not None:
            assert isinstance(self.tempering, Aepo)
            terms.append(self.tempering.term(logprobs=logprobs, mask=tempered_mask))
        if rehearsal_mask is not None:
            assert stored_logprobs is not None, "stored answers come with their log-probs"
            terms.append(self.rehearsal.term(logprobs=logprobs, stored_logprobs=stored_logprobs, mask=rehearsal_mask))
        if isinstance(self.critic, TrainedCritic):
            assert values is not None, "a critic needs its values"
            assert old_values is not None, "a critic needs the values that the advantages were computed from"
            assert returns is not None, "a critic needs returns"
            loss = self.critic.loss(values=values, old_values=old_values, returns=returns, response_mask=response_mask)
            terms.append(
                LossTerm(name="value", loss=loss, mask=response_mask, coef=self.critic.coef, aggregation=Aggregation.token_mean)
            )
        return StepTerms(terms=terms, surrogate=surrogate, keep=keep)

    def _term(self, name: str, loss: Tensor, mask: Tensor, coef: float | None, aggregation: Aggregation | None = None) -> LossTerm:
        assert coef is not None, f"the {name} term is on: pass {name}_coef"
        return LossTerm(name=name, loss=loss, mask=mask, coef=coef, aggregation=aggregation or self.aggregation)
