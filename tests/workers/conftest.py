"""A learner in this process, and batches for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rlkit.data.collate import collate
from rlkit.types import FinishReason, Origin, RewardStatus, Rollout, TrainBatch


@pytest.fixture(scope="session")
def learner():
    """One rank. Call `begin` with the settings a test needs: it forgets everything before."""
    from rlkit.controller.cluster import free_local_address
    from rlkit.workers.learner import Learner, Rank

    return Learner(Rank(index=0, count=1, address=free_local_address()))


def make_rollout(index: int, prompt: list[int], response: list[int], *, logprobs: list[float] | None = None) -> Rollout:
    length = len(response)
    return Rollout(
        sample_id=f"sample-{index}",
        group_id="group",
        prompt_id="prompt",
        attempt=0,
        source="test",
        prompt_ids=tuple(prompt),
        response_ids=np.array(response, dtype=np.int64),
        rollout_logprobs=np.array(logprobs if logprobs is not None else [-1.0] * length, dtype=np.float32),
        policy_version=np.zeros(length, dtype=np.int64),
        turn_index=np.zeros(length, dtype=np.int64),
        origin=np.full(length, Origin.policy, dtype=np.int64),
        token_rewards=np.zeros(length, dtype=np.float32),
        text="",
        finish_reason=FinishReason.stop,
        reward=0.0,
        reward_components={},
        status=RewardStatus.ok,
    )


@pytest.fixture
def make_batch() -> Callable[..., TrainBatch]:
    """A function (seed, rows) -> batch of ragged rows over the random model's vocabulary, with random advantages."""

    def build(seed: int = 0, rows: int = 6) -> TrainBatch:
        rng = np.random.default_rng(seed)
        rollouts = [
            make_rollout(i, rng.integers(3, 96, rng.integers(2, 6)).tolist(), rng.integers(3, 96, rng.integers(1, 14)).tolist())
            for i in range(rows)
        ]
        width = max(len(rollout.response_ids) for rollout in rollouts)
        advantages = torch.from_numpy(rng.normal(size=(rows, 1)).astype(np.float32)).expand(rows, width).contiguous()
        return collate(rollouts, advantages)

    return build
