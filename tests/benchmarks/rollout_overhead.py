"""rlkit's generation beside the same vLLM engine called directly.

    python tests/benchmarks/rollout_overhead.py --rounds 5 --out rollout_overhead.json

Both hold the tiny model with the same settings on the same cores and generate the same samples, one after the other: rlkit through
its fleet, a Ray actor and back as completions; the bare engine in this process as vLLM's own outputs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

SHAPES = {"512 x 16": (512, 16), "32 x 64": (32, 64), "64 x 100": (64, 100)}  # samples x tokens at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="rollout_overhead.json")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))  # as the actor's
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from rlkit.compose import compose
    from rlkit.controller.cluster import open_cluster
    from rlkit.controller.fleet import Engines, engine_spec
    from rlkit.controller.turns import SideBySide
    from rlkit.data.expressions import rows
    from rlkit.data.models.loading import load_tokenizer, resolve
    from rlkit.types import SampleRequest, SamplingSpec
    from rlkit.workers.rollout.vllm_engine import VllmRolloutEngine

    config = compose(["max_response_tokens=100"])
    tokenizer = load_tokenizer(resolve("tiny"))
    prompts = [tuple(tokenizer.encode(row["prompt"])) for row in rows("train")]
    bare = VllmRolloutEngine(engine_spec(config))._llm  # the engine itself, made with rlkit's settings
    results = {}
    with open_cluster(config.cluster) as cluster:
        engines = Engines(config, cluster, SideBySide())
        for name, (samples, tokens) in SHAPES.items():
            seconds: dict[str, list[float]] = {"bare": [], "rlkit": []}
            for number in range(arguments.rounds + 1):
                requests = [
                    SampleRequest(sample_id=f"{number}/{i}", prompt_ids=prompts[(i // 16 + number) % len(prompts)], seed=i)
                    for i in range(samples)
                ]
                sampling = SamplingSpec(max_tokens=tokens, stop_token_ids=())
                began = time.monotonic()
                completions = engines.generate(requests, sampling).result()
                seconds["rlkit"].append(time.monotonic() - began)
                params = [
                    SamplingParams(
                        max_tokens=tokens, seed=i, logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
                    )
                    for i in range(samples)
                ]
                began = time.monotonic()
                outputs = bare.generate([{"prompt_token_ids": list(r.prompt_ids)} for r in requests], params, use_tqdm=False)
                seconds["bare"].append(time.monotonic() - began)
                assert sum(len(c.response_ids) for c in completions) == sum(len(o.outputs[0].token_ids) for o in outputs)
            medians = {system: statistics.median(times[1:]) for system, times in seconds.items()}
            results[name] = medians | {"ratio": medians["bare"] / medians["rlkit"]}
            times = "   ".join(f"{system} {value:.3f} s" for system, value in medians.items())
            print(f"{name:<10} {times}   {results[name]['ratio']:.2f} of the bare rate")
    Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
