"""Rollouts to padded batches and back to microbatches, without losing or inventing a token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlkit.data.collate import collate, group_index, minibatches, response_mask, split_ranks, token_rewards
from rlkit.errors import DataError
from rlkit.types import Origin


def test_a_batch_is_right_padded_prompt_then_response(make_rollout):
    rollouts = [make_rollout(0, [5, 6], [7, 8, 9], logprobs=[-1, -2, -3]), make_rollout(1, [4, 4, 4], [0])]
    batch = collate(rollouts, torch.tensor([[1.0] * 3, [2.0] * 3]))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 4, 4, 0, 0]]
    assert batch.response_mask.tolist() == [[True, True, True], [True, False, False]]  # token 0 is a real token, not padding
    assert batch.rollout_logprobs.tolist() == [[-1, -2, -3], [-1, 0, 0]]
    assert batch.lengths.tolist() == [5, 4]


def test_only_the_policys_own_tokens_are_in_the_mask(make_rollout):
    rollout = make_rollout(0, [5], [7, 8, 9])
    rollout = replace(rollout, origin=np.array([Origin.policy, Origin.environment, Origin.policy]))
    assert response_mask([rollout]).tolist() == [[True, False, True]]


def test_groups_and_rewards_follow_their_rows(make_rollout):
    rollouts = [replace(make_rollout(i, [3], [4, 5]), group_id=g) for i, g in enumerate("abab")]
    rollouts[2] = replace(rollouts[2], token_rewards=np.array([0.5, 1.0], dtype=np.float32))
    assert group_index(rollouts).tolist() == [0, 1, 0, 1]
    assert token_rewards(rollouts)[2].tolist() == [0.5, 1.0]


def test_selecting_rows_trims_to_the_longest_of_them(make_batch):
    batch = make_batch(rows=5)
    rows = batch.response_lengths.argsort()[:2].tolist()
    part = batch.select(rows)
    assert part.response_mask.shape == (2, int(batch.response_lengths[rows].max()))
    assert part.input_ids.shape[1] == int(batch.lengths[rows].max())
    assert part.sample_ids == tuple(batch.sample_ids[row] for row in rows)
    assert batch.select([]).num_rows == 0


def test_ranks_and_minibatches_share_out_every_row_once(make_batch):
    batch = make_batch(rows=11)
    for parts in (split_ranks(batch, 3), minibatches(batch, 3, seed=1)):
        names = [name for part in parts for name in part.sample_ids]
        assert sorted(names) == sorted(batch.sample_ids)
        assert max(part.num_rows for part in parts) - min(part.num_rows for part in parts) <= 1
    first, again, other = (minibatches(batch, 3, seed=seed)[0].sample_ids for seed in (1, 1, 2))
    assert first == again != other
    assert split_ranks(batch.select([0]), 3)[2].num_rows == 0  # a rank may have nothing


def test_a_batch_whose_parts_disagree_is_refused(make_batch):
    batch = make_batch()
    with pytest.raises(DataError, match=r"TrainBatch\.advantages is "):
        replace(batch, advantages=batch.advantages[:, :-1])
