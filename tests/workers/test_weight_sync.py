"""The sync's own checks, on fakes: each must be able to fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlkit.errors import SyncError
from rlkit.workers import weight_sync
from rlkit.workers.weight_sync import (
    TOLERANCES,
    Manifest,
    check_behaviour,
    check_complete,
    digest,
    digests,
    first_difference,
    gaps_between,
    layer_groups,
    pack,
    unpack,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_keeps_every_bit(dtype):
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = pack(tensor)
    assert torch.equal(unpack(packed), tensor)
    packed.data.flags.writeable = False  # as it arrives from another process
    assert torch.equal(unpack(packed), tensor)


def test_the_digest_sees_one_bit_a_shape_and_a_dtype():
    tensor = torch.arange(6, dtype=torch.float32)
    changed = tensor.clone()
    changed.view(torch.int32)[3] ^= 1
    same, others = digest(pack(tensor)), [changed, tensor.view(2, 3), tensor.view(torch.int32)]
    assert digest(pack(tensor.clone())) == same
    assert all(digest(pack(other)) != same for other in others)


def test_layers_travel_whole_and_in_order_and_small_ones_together(monkeypatch):
    names = ["lm_head.weight", "model.layers.10.a", "model.layers.2.b", "model.embed_tokens.weight", "model.layers.2.a"]
    outside, second, tenth = names[0:4:3], ["model.layers.2.b", "model.layers.2.a"], ["model.layers.10.a"]
    sizes = dict.fromkeys(names, 10)
    for limit, expected in ((5, [outside, second, tenth]), (30, [outside, second + tenth]), (60, [outside + second + tenth])):
        monkeypatch.setattr(weight_sync, "PART_BYTES", limit)
        assert layer_groups(sizes) == expected


def test_rounding_may_grow_with_the_log_prob_and_nothing_else_may():
    learner = [np.array([-1.0, -10.0]), np.array([-40.0])]
    assert gaps_between(learner, learner).max() == 0
    engine = [np.array([-1.0001, -10.0001]), np.array([-40.0004])]
    np.testing.assert_allclose(gaps_between(engine, learner), [1e-4, 1e-4, 1e-4], rtol=1e-6)


def test_what_is_missing_or_extra_or_torn_is_named():
    received = digests({name: pack(torch.ones(2)) for name in ("a", "b")})
    manifest = Manifest(version=7, digests=received)
    check_complete(manifest, received, frozenset("ab"))
    with pytest.raises(SyncError, match=r"sync 7: the engine got 2 tensors and lacks 1 of the 3 .*first c"):
        check_complete(manifest, received, frozenset("abc"))
    with pytest.raises(SyncError, match="the engine got b, which"):
        check_complete(manifest, received, frozenset("a"))
    with pytest.raises(SyncError, match="bytes of b are not those"):
        check_complete(manifest, received | {"b": digest(pack(torch.zeros(2)))}, frozenset("ab"))


class Scores:
    """Learner or engine with given log-probs and layer outputs; a check sends nothing."""

    def __init__(self, scores, layers=None):
        self._scores, self._layers = np.array(scores, dtype=np.float32), layers or {}

    def score(self, sequences):
        return [self._scores]

    def score_each(self, sequences):
        return [[self._scores]]

    def layer_outputs(self, *_):
        return self._layers


def test_float32_is_held_to_the_worst_token_and_bfloat16_to_the_mean():
    def check(gap, dtype):
        learner: Any = Scores([-1.0] * 10, {"layers.0": np.ones(3)})
        engine: Any = Scores([-1.0 - gap, *[-1.0] * 9], {"layers.0": np.zeros(3)})
        return check_behaviour(
            learner,
            engine,
            version=1,
            probes=[(1, 2)],
            tolerance=TOLERANCES[dtype],
        )

    max_abs, mean_exp_abs = check(9e-5, "float32")
    assert max_abs == pytest.approx(9e-5, rel=0.01)
    assert mean_exp_abs == pytest.approx(1.000009, rel=1e-6)
    with pytest.raises(SyncError, match=r"differ .* by 0\.0002.*first difference: layers\.0"):
        check(2e-4, "float32")
    check(0.3, "bfloat16")
    with pytest.raises(SyncError, match="nothing was sampled from it"):
        check(2.0, "bfloat16")
    with pytest.raises(SyncError):
        check(float("nan"), "float32")  # no comparison with NaN may pass


def test_the_first_layer_that_differs_is_named_and_else_the_head():
    mine = {"embed_tokens": np.ones(4), "layers.0": np.ones(4), "layers.1": np.ones(4)}
    theirs = mine | {"layers.0": np.array([1.0, 1, 1, 1.1]), "layers.1": np.zeros(4)}
    assert first_difference(mine, theirs, allowed=1e-4).startswith("layers.0 ")
    assert "lm_head" in first_difference(mine, dict(mine), allowed=1e-4)
