"""The contract of the engine interface, held against every implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlkit.data.models.loading import load_model
from rlkit.types import Completion, FinishReason, SampleRequest, SamplingSpec

DEADLINE_S = 300.0
PROMPTS = ((5, 6, 7), (8, 9, 10, 11, 12), (20,) * 9, (33, 34))

KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("vllm", "vllm_async")] + ["transformers"]


def requests(count: int = 4) -> list[SampleRequest]:
    return [SampleRequest(sample_id=str(i), prompt_ids=PROMPTS[i % len(PROMPTS)], seed=100 + i) for i in range(count)]


def spec(**changes) -> SamplingSpec:
    return SamplingSpec(**({"max_tokens": 12, "stop_token_ids": (2,)} | changes))


def reference_logprobs(model, prompt: tuple[int, ...], response: np.ndarray, temperature: float) -> np.ndarray:
    ids = torch.tensor([[*prompt, *response.tolist()]])
    with torch.no_grad():
        logprobs = (model(ids).logits[0].float() / temperature).log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).squeeze(1).numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reported_logprobs_are_those_of_a_forward_pass_at_the_sampling_temperature(engine_of, random_model, kind, temperature):
    completions = engine_of(kind, tied=True).call("generate", requests(), spec(temperature=temperature)).result(DEADLINE_S)
    model = load_model(random_model(tied=True), dtype=torch.float32)
    for request, completion in zip(requests(), completions, strict=True):
        expected = reference_logprobs(model, request.prompt_ids, completion.response_ids, temperature)
        np.testing.assert_allclose(completion.rollout_logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seeded_sample_does_not_depend_on_what_it_is_batched_with(engine_of, kind):
    engine = engine_of(kind, tied=True)
    together = engine.call("generate", requests(16), spec()).result(DEADLINE_S)
    alone = engine.call("generate", requests(16)[5:6], spec()).result(DEADLINE_S)
    assert together[5].response_ids.tolist() == alone[0].response_ids.tolist()
    assert len({tuple(completion.response_ids.tolist()) for completion in together[::4]}) > 1  # same prompt, other seeds


@pytest.mark.parametrize("kind", KINDS)
def test_the_finish_reason_tells_a_stop_token_from_the_limit(engine_of, kind):
    completions = engine_of(kind, tied=True).call("generate", requests(64), spec(max_tokens=24)).result(DEADLINE_S)
    reasons = {completion.finish_reason for completion in completions}
    assert reasons == {FinishReason.stop, FinishReason.length}
    for completion in completions:
        ids = completion.response_ids.tolist()
        assert (2 in ids) == (completion.finish_reason is FinishReason.stop)
        assert ids.count(2) <= 1
        if completion.finish_reason is FinishReason.stop:
            assert ids[-1] == 2  # the stop token was sampled, so it is part of the response
        else:
            assert len(ids) == 24


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_may_truncate_the_distribution(engine_of, kind):
    greedy = spec(top_k=1)
    first, second = (engine_of(kind, tied=True).call("generate", requests(8)[i:], greedy).result(DEADLINE_S) for i in (0, 4))
    assert [c.response_ids.tolist() for c in first[4:]] == [c.response_ids.tolist() for c in second]
    assert first[0].response_ids.tolist() == first[4].response_ids.tolist()  # same prompt, other seed, top-1


@pytest.mark.parametrize("kind", KINDS)
def test_score_gives_the_logprobs_of_given_tokens(engine_of, random_model, kind):
    sequence = (5, 17, 40, 41, 8)
    scores = engine_of(kind, tied=True).call("score", [sequence]).result(DEADLINE_S)
    model = load_model(random_model(tied=True), dtype=torch.float32)
    np.testing.assert_allclose(scores[0], reference_logprobs(model, sequence[:1], np.array(sequence[1:]), 1.0), atol=1e-4)


def advance_to_the_end(engine, wanted: int) -> dict[str, Completion]:
    done: dict[str, Completion] = {}
    for _ in range(1000):
        done |= {completion.sample_id: completion for completion in engine.call("advance", [], spec()).result(DEADLINE_S)}
        if len(done) >= wanted:
            return done
    raise AssertionError(f"{len(done)} of {wanted} samples finished")


@pytest.mark.parametrize("kind", KINDS)
def test_samples_handed_in_one_by_one_are_those_of_one_call(engine_of, kind):
    """Also while other work passes: a score does not swallow what finishes meanwhile."""
    engine = engine_of(kind, tied=True)
    together = engine.call("generate", requests(8), spec(max_tokens=40)).result(DEADLINE_S)
    done: dict[str, Completion] = {}
    for request in requests(8):
        done |= {c.sample_id: c for c in engine.call("advance", [request], spec(max_tokens=40)).result(DEADLINE_S)}
        engine.call("score", [(5, 6, 7)]).result(DEADLINE_S)
    if len(done) < 8:
        done |= advance_to_the_end(engine, 8 - len(done))
    assert [done[c.sample_id].response_ids.tolist() for c in together] == [c.response_ids.tolist() for c in together]


@pytest.mark.parametrize("kind", KINDS)
def test_aborted_samples_are_gone_and_the_engine_goes_on(engine_of, kind):
    engine = engine_of(kind, tied=True)
    engine.call("advance", requests(4), spec(max_tokens=60, stop_token_ids=())).result(DEADLINE_S)
    engine.call("abort").result(DEADLINE_S)
    (completion,) = engine.call("generate", requests(1), spec()).result(DEADLINE_S)
    assert completion.sample_id == "0"
    assert engine.call("advance", [], spec()).result(DEADLINE_S) == []
