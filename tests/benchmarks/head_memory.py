"""Peak memory of the output head, forward and backward, by number of tokens: chunked, and with all logits at once.

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


def peak_mib(tokens: int, *, chunked: bool) -> float:
    import torch

    from rlkit.core.logprobs import chunk_size, token_statistics

    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    hidden.grad = torch.zeros_like(hidden)
    head = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    head.grad = torch.zeros_like(head)
    targets = torch.randint(0, VOCABULARY, (tokens,))
    token_statistics(hidden[:2], head, targets[:2], temperature=1.0, chunk_tokens=2).logprobs.sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = chunk_size(VOCABULARY, memory_bytes=BUDGET_MIB << 20) if chunked else tokens
    token_statistics(hidden, head, targets, temperature=1.0, chunk_tokens=size).logprobs.sum().backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return grown - hidden.numel() * 4 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="head_memory.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # tokens, chunked or whole
    arguments = parser.parse_args()
    if arguments.one:
        print(peak_mib(int(arguments.one[0]), chunked=arguments.one[1] == "chunked"))
        return
    results: dict[str, dict[int, float]] = {"chunked": {}, "whole": {}}
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
