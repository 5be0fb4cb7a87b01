"""Randomness of its own for a trainer that seeds the global generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def own_randomness(num_threads: int | None = None) -> Iterator[None]:
    """Lets the trainer seed the global generators, and gives the caller its own back. `num_threads`: None as they are."""
    python, threads = random.getstate(), torch.get_num_threads()
    legacy = np.random.get_state()  # noqa: NPY002  the generator that the trainer seeds
    try:
        # The order of a sum depends on the number of threads, and so do the last bits of the weights.
        torch.set_num_threads(threads if num_threads is None else num_threads)
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
