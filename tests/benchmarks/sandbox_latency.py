"""What isolation costs a program: bubblewrap beside the same limits and interpreter without it, in turns.

python tests/benchmarks/sandbox_latency.py --calls 300 --out sandbox_latency.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from rlkit.data.sandbox import Case, Program, open_sandbox
from rlkit.data.sandbox.run import Unsandboxed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--out", default="sandbox_latency.json")
    arguments = parser.parse_args()
    systems = {"bare": Unsandboxed(), "sandbox": open_sandbox()}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(arguments.calls):
        for name, system in systems.items():
            began = time.perf_counter()
            [outcome] = system.run(Program(code="print(6 * 7)"), [Case()])
            seconds[name].append(time.perf_counter() - began)
            assert outcome.stdout == "42\n", outcome
    found = {
        name: {f"p{mark}_ms": round(1000 * float(np.percentile(each, mark)), 1) for mark in (50, 90, 99)}
        for name, each in seconds.items()
    }
    for name, marks in found.items():
        print(f"{name:<8}", "  ".join(f"{mark} {value:.1f}" for mark, value in marks.items()))
    print(f"isolation at p99: {found['sandbox']['p99_ms'] - found['bare']['p99_ms']:.1f} ms")
    Path(arguments.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
