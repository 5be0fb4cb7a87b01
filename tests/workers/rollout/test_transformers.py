"""What only the transformers engine has: a batch that shrinks, and a cache that grows without copies."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer

from rlkit.types import SampleRequest, SamplingSpec
from rlkit.workers.rollout.engine import EngineSpec
from rlkit.workers.rollout.transformers import GrowingLayer, TransformersRolloutEngine


def test_a_growing_layer_holds_what_a_dynamic_one_holds():
    generator = torch.Generator().manual_seed(0)
    growing, dynamic = GrowingLayer(), DynamicLayer()
    for step in range(40):
        rows, width = (4 if step < 20 else 2), (5 if step == 0 else 1)
        if step == 20:
            for layer in (growing, dynamic):
                layer.batch_select_indices(torch.tensor([2, 0]))
        new = torch.randn(2, rows, 3, width, 8, generator=generator)
        for found, wanted in zip(growing.update(*new), dynamic.update(*new), strict=True):
            assert torch.equal(found, wanted)
        assert growing.get_seq_length() == dynamic.get_seq_length()


def test_a_response_that_has_ended_costs_nothing_more(random_model, monkeypatch):
    engine = TransformersRolloutEngine(
        EngineSpec(
            kind="transformers",
            model_path=random_model(tied=True),
            dtype="float32",
            trust_remote_code=False,
            max_model_tokens=64,
            max_num_seqs=16,
        )
    )
    sizes: list[int] = []
    forward = engine._model.forward

    def watched(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine._model, "forward", watched)
    requests = [SampleRequest(sample_id=str(i), prompt_ids=(5, 6, 7 + i), seed=i) for i in range(8)]
    stops = tuple(range(3, 30))  # of 96 tokens: most responses end early
    completions = engine.generate(requests, SamplingSpec(max_tokens=30, stop_token_ids=stops))
    lengths = [len(completion.response_ids) for completion in completions]
    assert len(set(lengths)) > 1
    assert sizes == [sum(length > place for length in lengths) for place in range(max(lengths))]
