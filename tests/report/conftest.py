"""Run folders as training leaves them, written by the real tracker: few prompts, figures that tests can work out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from rlkit.compose import compose
from rlkit.controller.evaluate import Evaluation
from rlkit.controller.tracking import Tracker

NUM_SAMPLES = 4


def made_up(
    num_correct: Sequence[int], *, n: int = NUM_SAMPLES, dataset: str = "a", first: int = 0, num_failed: int = 0
) -> Evaluation:
    """Prompts p0, p1, ... with so many right answers among n samples, each reward 0 or 1."""
    return Evaluation(
        prompt_ids=tuple(f"p{i}" for i in range(first, first + len(num_correct))),
        row_digests=tuple(f"{dataset}{i}" for i in range(first, first + len(num_correct))),
        sample_rewards=tuple((1.0,) * c + (0.0,) * (n - c) for c in num_correct),
        num_correct=np.array(num_correct),
        distinct=np.minimum(np.array(num_correct, dtype=float), 2.0),
        num_failed=num_failed,
        ks=(1, n),
    )


@pytest.fixture
def evaluation() -> Callable[..., Evaluation]:
    """A function (right answers of each prompt) -> evaluation."""
    return made_up


@pytest.fixture
def make_run(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Path]:
    """A function that writes a run folder: `evaluations` are those after each step of that number."""

    def make(
        folder: str, *overrides: str, evaluations: dict[int, Evaluation], num_steps: int = 20, kl: float | None = None
    ) -> Path:
        base = ["cluster=inprocess", "rollout=transformers"]
        if "evaluation=none" not in overrides:
            base += [f"evaluation.samples_per_prompt={NUM_SAMPLES}", f"evaluation.ks=[1,{NUM_SAMPLES}]"]
        config = compose([*base, f"num_steps={num_steps}", *overrides, f"run_dir='{folder}'"])
        with Tracker(Path(folder), config) as tracker:
            for step in range(num_steps + 1):
                if step:
                    at = kl if kl is None else kl * step / num_steps
                    divergence = {} if at is None else {"kl/ref_token_mean": at, "kl/ref_sequence": 10 * at}
                    metrics = {"reward/mean": 0.02 * step, "entropy/mean": 1 - 0.02 * step, "length/mean": 10.0}
                    tracker.step(step, {**metrics, **divergence}, {})
                if step in evaluations:
                    found = evaluations[step]
                    tracker.store_evaluation(step, found.to_json())
                    tracker.evaluation(step, found.metrics())
        capsys.readouterr()
        return Path(folder)

    return make
