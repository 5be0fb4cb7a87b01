"""Peak memory of the output head, forward and backward, by number of tokens: chunked, the same with an exact divergence from a
reference over the whole vocabulary, and with all logits at once.

    python tests/benchmarks/head_memory.py --out head_memory.json

Every measurement is a process of its own: the largest resident size that it reached, less what it held before the head ran and
the size of the tensors that grow with the tokens whatever the head does (hidden states and their gradient).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

VOCABULARY, HIDDEN, BUDGET_MIB = 49152, 576, 256
TOKENS = (1024, 2048, 4096, 8192, 16384)
TOO_LARGE = 4096  # above it the logits at once do not fit beside everything else


def peak_mib(tokens: int, kind: str) -> float:
    import torch

    from rlkit.core.divergences import JensenShannon
    from rlkit.core.logprobs import chunk_size, token_statistics

    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    hidden.grad = torch.zeros_like(hidden)
    head = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    head.grad = torch.zeros_like(head)
    targets = torch.randint(0, VOCABULARY, (tokens,))
    divergence = JensenShannon() if kind == "exact_divergence" else None
    ref_hidden, ref_head = (torch.randn(tokens, HIDDEN), torch.randn(VOCABULARY, HIDDEN)) if divergence else (None, None)

    def run(count: int, size: int) -> None:
        found = token_statistics(
            hidden[:count],
            head,
            targets[:count],
            temperature=1.0,
            chunk_tokens=size,
            divergence=divergence,
            ref_hidden=None if ref_hidden is None else ref_hidden[:count],
            ref_head=ref_head,
        )
        loss = found.logprobs.sum()
        (loss if found.divergence is None else loss + found.divergence.sum()).backward()

    run(2, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    buffers = 1 if divergence is None else 2  # as the learner counts them
    run(tokens, tokens if kind == "whole" else chunk_size(VOCABULARY * buffers, memory_bytes=BUDGET_MIB << 20))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return grown - hidden.numel() * 4 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="head_memory.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # tokens, and one of the kinds
    arguments = parser.parse_args()
    if arguments.one:
        print(peak_mib(int(arguments.one[0]), arguments.one[1]))
        return
    results: dict[str, dict[int, float]] = {"chunked": {}, "exact_divergence": {}, "whole": {}}
    print(f"vocabulary {VOCABULARY}, hidden {HIDDEN}, learner.head_memory_mib={BUDGET_MIB}")
    for tokens in TOKENS:
        for kind, figures in results.items():
            if kind == "whole" and tokens > TOO_LARGE:
                continue
            command = [sys.executable, __file__, "--one", str(tokens), kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            figures[tokens] = round(float(done.stdout), 1)
        print(f"{tokens:>6} tokens   " + "   ".join(f"{kind} {f[tokens]:8.1f} MiB" for kind, f in results.items() if tokens in f))
    Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
