"""What a dry run prints."""

from rlkit.compose import compose
from rlkit.schedule import schedule


def test_the_schedule_counts_prompts_samples_tokens_updates_and_workers():
    config = compose(
        [
            "experiment=grpo_published",
            "num_steps=10",
            "prompts_per_step=8",
            "group_size=4",
            "optimizer_steps_per_batch=2",
            "max_prompt_tokens=24",
            "max_response_tokens=16",
            "evaluation.every=5",
        ]
    )
    text = schedule(config, num_parameters=1_000_000)
    assert "8 prompts x 4 responses = 32 samples, at most 24 + 16 tokens each: 1,280 tokens" in text  # 32 * 40
    assert "2 optimiser steps per batch (2 mini-batches of 4 prompts, 1 epoch)" in text
    assert "10 steps, 320 samples, 20 optimiser steps; checkpoints at the end" in text
    assert "256 held-out prompts x 16 samples, before and after, and every 5 steps" in text
    assert "1 engine (vllm), 1 learner rank, 2 reward processes, 1 reference; cluster=local, placement=separate" in text
    # float32: 4 bytes a parameter and 512 MiB of cache; 16 bytes and 256 MiB of logits; 4 bytes and 256 MiB
    assert "about 516 MiB per engine, 271 MiB and activations per learner rank, 260 MiB for the reference (1.0 M" in text
    assert "estimator: k3" in text  # the settings follow as YAML


def test_no_reference_where_no_strategy_needs_one():
    assert "reference;" not in schedule(compose(["evaluation=none"]), num_parameters=1)


def test_a_reward_model_takes_the_place_of_reward_processes():
    text = schedule(compose(["reward=model", "reward.path=x"]), num_parameters=2**20, num_reward_parameters=2**20)
    assert "1 learner rank, 1 reward model; cluster=local" in text
    assert "4 MiB for reward models (1.0 M" in text
    both = compose(["reward=weighted", "reward.fns={a:format}", "reward.models={b:x,c:y}"])
    assert "2 reward processes, 2 reward models;" in schedule(both, num_parameters=1)


def test_adapters_leave_the_frozen_model_its_weights_alone():
    text = schedule(compose(["learner=lora", "model.dtype=bfloat16", "learner.num_ranks=2"]), 40 * 2**20, 2**20)
    # of each rank: half of 2 bytes a parameter, half of 16 bytes for each of the adapters', all weights gathered, 256 MiB of logits
    assert "384 MiB and activations per learner rank (41.9 M parameters, and 1.05 M of adapters)" in text  # 40 + 8 + 80 + 256
