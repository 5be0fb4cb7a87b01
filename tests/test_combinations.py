"""Choices of several groups together: each combination trains, or is refused with the sentence that is right about it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlkit.compose import compose
from rlkit.controller.local import InProcessCluster
from rlkit.controller.loop import train
from rlkit.errors import ConfigError

SMALL = ["cluster=inprocess", "rollout=transformers", "evaluation=none", "num_steps=2", "prompts_per_step=4", "group_size=4"]
SMALL += ["tracking.save_rollouts_every=100"]

TURNS = (
    "environment=tools environment.call_format=bare environment.tools=[calculator] environment.max_turns=2 max_response_tokens=40"
)
TRAINED = [
    "objective=gspo entropy=siren control=pid control.target=0.8",
    "advantage=rloo objective=cispo correction=tis entropy=bonus control=skywork entropy.coef=0 control.target=0.9",
    "advantage=gae critic=value_model critic.backbone=shared selector=clip_cov token_filter=clip_v",
    "aggregation=const_norm divergence=reverse_kl divergence.estimator=exact safeguard=asymmetric token_weight=steer",
    "advantage=vapo critic=double_softmin imitation=positive entropy=siren epochs_per_batch=2",
    "prompt_filter=dynamic prompt_filter.max_batches=0 prompt_advantage=copo entropy=epo mask_truncated=true",
    "tempering=aepo objective=gmpo correction=icepop optimizer_steps_per_batch=2",
    "tempering=aepo tempering.use=dcpo advantage=reinforce_pp selector=kl_cov objective=unclipped",
    "correction=rejection token_weight=high_entropy token_weight.scope=micro token_filter=clip_b optimizer_steps_per_batch=2",
    "learner=lora entropy=siren entropy.scope=micro advantage_weights=stcr divergence=reverse_kl divergence_weights=dads",
    "max_staleness=1 correction=decoupled_ppo selector=clip_cov token_weight=steer entropy=bonus",
    "divergence_control=dual divergence_control.target=0.02 divergence=reverse_kl divergence.estimator=k2 objective=reinforce"
    " advantage=gpg",
    "entropy=bonus control=pid control.target=0.8 divergence=reverse_kl divergence_control=dual_log divergence_control.target=0.02"
    " optimizer_steps_per_batch=2 threshold_control=pid_log threshold_control.target=0.8",
    "objective=cispo threshold_control=doubling threshold_control.target=0.8 max_staleness=1 safeguard=asymmetric"
    " divergence=reverse_kl divergence_control=pid_log divergence_control.target=0.02",
    "replay=buffer replay.fraction=0.5 correction=tis objective=reinforce divergence=reverse_kl safeguard=entropy_gated",
    "replay=buffer replay.fraction=0.5 max_staleness=1 correction=decoupled_ppo selector=clip_cov entropy=siren",
    "replay=buffer replay.fraction=0.5 replay.score_power=1 advantage=gae critic=value_model optimizer_steps_per_batch=2",
    "replay=zero_variance objective=gspo token_filter=none entropy=epo divergence=reverse_kl divergence.estimator=exact",
    "objective_weights=recap objective_weights.apply_to=loss correction=icepop imitation=positive token_weight=steer",
    "objective_weights=recap_code reward.fn=expression_parts replay=zero_variance imitation=positive imitation.above=1.5",
    "reference=ema divergence=reverse_kl divergence.estimator=exact learner=lora max_staleness=1",
    "reference=bema reference.every=1 safeguard=entropy_gated divergence=reverse_kl anchor=old_policy epochs_per_batch=2",
    "reference=refresh reference.every=1 reference.reset_optimizer=true divergence=reverse_kl optimizer=sgd tempering=aepo",
    "divergence=js divergence.place=token_reward advantage=gae critic=value_model entropy=bonus safeguard=asymmetric",
    "divergence=fkl divergence.place=target divergence.coef=0.3 divergence_control=dual_log divergence_control.target=0.02"
    " objective=gspo",
    "divergence=rapo reference=geometric_mixture reference.path=tiny rehearsal=base_answers rehearsal.num_prompts=64"
    " rehearsal.samples_per_prompt=1 replay=buffer replay.fraction=0.5",
    "advantage=gdpo reward.fn=expression_parts replay=buffer replay.fraction=0.5 prompt_filter=dynamic prompt_filter.max_batches=0"
    " objective_weights=recap objective_weights.apply_to=loss imitation=positive imitation.above=1.5",
    "curriculum=pass_rate curriculum.min_accept=0.5 prompt_filter=dynamic prompt_filter.max_batches=0 rehearsal=base_answers"
    " rehearsal.num_prompts=64 rehearsal.samples_per_prompt=1 tempering=aepo",
    TURNS + " max_staleness=1 correction=decoupled_ppo entropy=epo divergence=reverse_kl divergence.estimator=exact",
    TURNS + " advantage=gae critic=value_model divergence=js divergence.place=token_reward shaping=overlong",
    TURNS + " replay=buffer replay.fraction=0.5 correction=tis objective=gspo tempering=none mask_truncated=true",
    TURNS + " tempering=aepo prompt_filter=dynamic prompt_filter.max_batches=0 learner=lora",
    "divergence=alpha divergence.estimator=exact divergence.top_k=8 learner=lora divergence_weights=dads max_staleness=1",
]

REFUSED = {
    "objective=gspo selector=clip_cov": "selector=clip_cov: it tells tokens apart, and objective=gspo has one ratio",
    "objective=gmpo token_weight=steer token_filter=clip_b": "token_filter=clip_b: it tells tokens apart",
    "tempering=aepo advantage=reinforce_pp": "tempering=aepo: its samples are groups of their own",
    "tempering=aepo token_filter=clip_b": "token_filter=clip_b: it looks at all responses of a batch",
    "tempering=aepo max_staleness=1": "tempering=aepo: its temperature follows from the step before",
    "prompt_filter=dynamic max_staleness=1": "prompt_filter=dynamic: how many prompts a step draws is known only after it",
    "curriculum=pass_rate max_staleness=1": "curriculum=pass_rate: which prompts a step draws follows from the step before",
    "safeguard=entropy_gated": "safeguard=entropy_gated: there is no divergence for it to act on",
    "safeguard=asymmetric divergence=reverse_kl safeguard.kl_mode=direct": "safeguard.kl_mode=direct: it needs the KL",
    "divergence_weights=dads": "divergence_weights=dads: there is no divergence for it to act on",
    "selector=kl_cov objective=clipped": "selector=kl_cov: its pull takes a clip's place",
    "divergence=reverse_kl control=pid control.target=1": "control=pid: entropy=none has no coef for it to move",
    "entropy=siren divergence_control=pid divergence_control.target=1": "divergence_control=pid: divergence=none has no coef",
    "objective=unclipped threshold_control=doubling threshold_control.target=1": "objective=unclipped has no clip_high",
    "threshold_control=skywork": "threshold_control=skywork: no such choice.",
    "divergence=js divergence.place=token_reward objective=gspo": "divergence.place=token_reward: it tells tokens apart",
    "divergence=js divergence.place=target max_staleness=1": "divergence.place=target: it weighs responses as samples of",
    "divergence=js divergence.place=target advantage_weights=stcr": "advantage_weights=stcr never acts",
    "divergence=reverse_kl divergence.place=sequence_reward prompt_advantage=copo": "prompt_advantage=copo works on one advantage",
    "divergence=fkl divergence.estimator=k3": "divergence.estimator=k3: has no meaning for forward_kl",
    "divergence=reverse_kl divergence.place=token_reward divergence.estimator=k3": "it descends reverse_kl - forward_kl",
    "reference=ema": "reference=ema: nothing that is chosen compares the policy with a reference. Write divergence=reverse_kl",
    "anchor=old_policy": "anchor=old_policy: with one optimiser step per batch the policy is the old one",
    "anchor=old_policy epochs_per_batch=2 max_staleness=1": "anchor=old_policy: it holds to the policy before the update, and max",
    "reward=environment": "reward=environment: environment=single_turn gives no reward",
    "environment=python environment.env=gone.py:World": "environment.env=gone.py:World: there is no file gone.py",
    "environment=tools environment.call_format=bare": "environment.call_format=bare: a turn does not say which of 2 tools",
    "anchor=old_policy epochs_per_batch=2 correction=bypass": "anchor=old_policy: it holds to the policy before the update",
}


@pytest.mark.slow
@pytest.mark.parametrize("overrides", TRAINED)
def test_it_trains(overrides: str, in_folder: Path):
    train(compose([*SMALL, "run_dir=run", *overrides.split()]), InProcessCluster())
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["policy/skipped_steps"] == 0
        assert all(math.isfinite(row[name]) for name in row if name.endswith("/loss"))
        assert row["sync/probe_max"] <= 1e-4
        for group, term in {"control": "entropy", "divergence_control": "divergence", "threshold_control": "threshold"}.items():
            assert (f"ctrl/{term}/setpoint" in row) == (f" {group}=" in f" {overrides}")


@pytest.mark.parametrize("overrides", REFUSED)
def test_it_is_refused_with_the_reason(overrides: str):
    with pytest.raises(ConfigError) as refusal:
        compose(overrides.split())
    assert REFUSED[overrides] in str(refusal.value)
