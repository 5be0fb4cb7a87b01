"""Time of the learner's forward and backward pass by layout, on this device: does the cost model choose the fastest?

    python tests/benchmarks/layouts.py --out layouts.json

Every case is a batch of ragged responses. The layouts run in turn, several rounds, in one process; a figure is the median of its
rounds. `chosen` is what learner.layout=auto takes; its regret is the chosen layout's time over the fastest's, less 1.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlkit.data.layout import LayoutKind, arrange, plan, plan_cost
from rlkit.data.models.policy import Policy
from rlkit.types import Sequences

BUDGET = 8192
KINDS = [kind for kind in LayoutKind if kind is not LayoutKind.auto]
MODELS = {  # layers, hidden, heads
    "tiny": (4, 128, 4),
    "nano": (4, 256, 4),
}
CASES = {  # groups, responses in each, prompt tokens, mean and largest response
    "uniform, short prompt": (4, 8, 13, 64, 64),
    "long tail, short prompt": (4, 8, 13, 40, 256),
    "uniform, long prompt": (4, 8, 256, 32, 32),
    "long tail, long prompt": (4, 8, 200, 40, 256),
    "many short": (32, 16, 13, 8, 16),
}


def make_batch(groups: int, size: int, prompt: int, mean: int, largest: int) -> Sequences:
    """Lengths are all alike, or exponential and cut at the largest."""
    generator = torch.Generator().manual_seed(0)
    rows, lengths = [], []
    for _ in range(groups):
        prompt_ids = torch.randint(1, 512, (prompt,), generator=generator)
        for _ in range(size):
            uniform = float(torch.rand(1, generator=generator).clamp(min=1e-6))
            length = largest if mean == largest else min(largest, 1 + int(-mean * math.log(uniform)))
            rows.append(torch.cat([prompt_ids, torch.randint(1, 512, (length,), generator=generator)]))
            lengths.append(length)
    return Sequences(
        input_ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        prompt_lengths=torch.full((len(rows),), prompt),
        response_lengths=torch.tensor(lengths),
    )


def seconds(policy: Policy, batch: Sequences, kind: LayoutKind, device: torch.device) -> float:
    began = time.monotonic()
    for _, layout in arrange(batch, token_budget=BUDGET, kind=kind, cost=policy.cost):
        policy(layout.to(device), temperature=1.0, chunk_tokens=BUDGET).logprobs.sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="layouts.json")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, dict] = {}
    for model_name, (layers, hidden, heads) in MODELS.items():
        config = LlamaConfig(
            vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=heads
        )
        policy = Policy(LlamaForCausalLM(config).train()).to(device)
        for case, shape in CASES.items():
            batch = make_batch(*shape)
            times: dict[str, list[float]] = {kind.name: [] for kind in KINDS}
            for number in range(arguments.rounds + 1):
                for kind in KINDS:
                    spent = seconds(policy, batch, kind, device)
                    if number:  # the first is for warming up
                        times[kind.name].append(spent)
            figures = {name: round(statistics.median(spent), 4) for name, spent in times.items()}
            costs = {
                k.name: plan_cost(batch, plan(batch, token_budget=BUDGET, kind=k, cost=policy.cost), policy.cost) for k in KINDS
            }
            chosen = min(costs, key=lambda name: costs[name])
            regret = figures[chosen] / min(figures.values()) - 1
            least = min(costs.values())
            results[f"{model_name}: {case}"] = {"seconds": figures, "chosen": chosen, "regret": round(regret, 3)}
            print(
                f"{model_name:<6}{case:<26}"
                + "".join(f"{name} {figures[name] * 1000:7.1f} ms (cost {costs[name] / least:4.2f})  " for name in figures)
                + f"chosen {chosen}, regret {regret:.0%}"
            )
    Path(arguments.out).write_text(json.dumps({"device": str(device), "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
