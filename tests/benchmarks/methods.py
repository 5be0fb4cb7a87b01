"""The learner's step with each method beside the plain objective's: the same model, samples and process, in turns (ABAB).

    python tests/benchmarks/methods.py --rounds 3 --out methods.json

SmolLM2-135M, 8 responses of 48 tokens to one prompt, float32. Both sides measure entropy. What a method needs before the step (a
pass of the policy or of the reference, weights, choices) is not in it. Methods with a critic are left out. `exact_*` compare with
a reference over the whole vocabulary, another product with an output head: up to 1.6 is expected of them, 1.1 of the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

METHODS = {
    "dr_grpo": ["advantage=dr_grpo", "aggregation=const_norm"],
    "reinforce": ["objective=reinforce"],
    "gspo": ["objective=gspo"],
    "gmpo": ["objective=gmpo"],
    "cispo": ["objective=cispo"],
    "tis": ["correction=tis"],
    "icepop": ["correction=icepop"],
    "rejection": ["correction=rejection"],
    "entropy_bonus": ["entropy=bonus"],
    "siren": ["entropy=siren"],
    "epo": ["entropy=epo"],
    "clip_cov": ["selector=clip_cov"],
    "kl_cov": ["selector=kl_cov", "objective=unclipped"],
    "steer": ["token_weight=steer"],
    "high_entropy": ["token_weight=high_entropy"],
    "clip_b": ["token_filter=clip_b"],
    "clip_v": ["token_filter=clip_v"],
    "copo": ["prompt_advantage=copo"],
    "js_sampled": ["divergence=jensen_shannon"],
    **{f"exact_{name}": [f"divergence={name}", "divergence.estimator=exact"] for name in ("reverse_kl", "jensen_shannon", "alpha")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--out", default="methods.json")
    arguments = parser.parse_args()

    from rlkit.compose import compose
    from rlkit.controller.preparation import choose, correct, filtered, narrow, weigh
    from rlkit.controller.progress import Progress
    from rlkit.core.copo import NoPromptAdvantage
    from rlkit.core.loss import Knobs
    from rlkit.core.reduce import Denominators
    from rlkit.types import TrainBatch
    from rlkit.workers.handle import Rank
    from rlkit.workers.learner import Learner

    def settings(*overrides: str):
        common = ["model.dtype=float32", "optimizer.learning_rate=1e-6", "max_response_tokens=48"]
        return compose([f"model={arguments.model}", *common, *overrides])

    learner = Learner(Rank(index=0, count=1))
    learner.begin(settings())
    rng = np.random.default_rng(0)
    rows, prompt, length = 8, 35, 48
    ids = torch.from_numpy(rng.integers(5, learner.policy.vocab_size, (rows, prompt + length)))
    ids[:, :prompt] = ids[0, :prompt]
    sampled = TrainBatch(
        sample_ids=tuple(map(str, range(rows))),
        input_ids=ids,
        prompt_lengths=torch.full((rows,), prompt),
        response_lengths=torch.full((rows,), length),
        response_mask=torch.ones(rows, length, dtype=torch.bool),
        advantages=torch.from_numpy(rng.normal(size=(rows, 1)).astype(np.float32)).expand(rows, length).contiguous(),
        rollout_logprobs=torch.zeros(rows, length),
        rewards=torch.from_numpy(rng.integers(0, 2, rows).astype(np.float32)),
        turns=torch.zeros(rows, length, dtype=torch.int64),
    )

    def prepared(config) -> tuple[TrainBatch, Knobs]:
        learner.config, learner.strategy = config, config.strategy
        batch = replace(sampled, **learner.measure(sampled))
        assert batch.old_logprobs is not None
        batch = replace(batch, rollout_logprobs=batch.old_logprobs + 0.01)
        if not isinstance(config.prompt_advantage, NoPromptAdvantage):
            batch = replace(batch, prompt_advantages=-batch.advantages, local_weight=torch.full((rows,), 0.5))
        if "ref_logprobs" in config.needs:
            learner.set_reference_head(learner.policy.head.weight.detach().numpy())
            hidden = torch.randn(rows, length, learner.policy.head.weight.shape[1])
            batch = replace(
                batch, ref_logprobs=batch.rollout_logprobs + 0.1, ref_hidden=hidden if "ref_hidden" in config.needs else None
            )
        progress = Progress.start(config).having_seen(config, batch)
        batch, _ = filtered(config, batch, torch.zeros(rows, dtype=torch.bool))
        batch, _ = correct(config.correction, batch)
        batch, _ = weigh(config.token_weight, narrow(batch))
        batch, _ = choose(config.selector, batch, seed=0)
        measured = config.entropy.measure(nucleus_entropy=batch.old_nucleus_entropy, response_mask=batch.response_mask)
        if measured is not None:
            measured += 0.1
        return batch, Knobs(divergence_coef=0.05, entropy_coef=0.01, entropy_state=progress.entropy, entropy_measured=measured)

    def seconds(config, batch: TrainBatch, knobs: Knobs) -> float:
        learner.config, learner.strategy = config, config.strategy
        masks = learner.strategy.masks(response_mask=batch.response_mask, keep=batch.policy_mask, rewards=batch.rewards)
        denominators = {name: Denominators.count(mask, max_response_tokens=length) for name, mask in masks.items()}
        began = time.perf_counter()
        learner.update(batch, denominators=denominators, knobs=knobs)
        return time.perf_counter() - began

    results: dict[str, dict] = {}
    plain = (settings(), *prepared(settings()))
    seconds(*plain)
    for name in arguments.methods:
        config = settings(*METHODS[name])
        method = (config, *prepared(config))
        seconds(*method)
        pairs = [(seconds(*plain), seconds(*method)) for _ in range(arguments.rounds)]
        ratio = statistics.median(b / a for a, b in pairs)
        results[name] = {"ratio": round(ratio, 3), "pairs": [[round(a, 3), round(b, 3)] for a, b in pairs]}
        print(f"{name:<16}{ratio:6.3f}   {results[name]['pairs']}", flush=True)
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
