"""Real engines, built once: vLLM in Ray actors, transformers in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlkit.controller.fleet import ENGINE_CLASSES
from rlkit.controller.local import InProcessCluster
from rlkit.controller.placement import Seat
from rlkit.workers.handle import Handle
from rlkit.workers.rollout.engine import EngineSpec


@pytest.fixture(scope="session")
def in_process_cluster() -> InProcessCluster:
    return InProcessCluster()


@pytest.fixture
def engine_of(random_model, in_process_cluster, request) -> Callable[..., Handle]:
    """A function (kind, tied) -> engine of the random model."""

    def get(kind: str, *, tied: bool) -> Handle:
        spec = EngineSpec(
            kind=kind,
            model_path=random_model(tied=tied),
            dtype="float32",
            trust_remote_code=False,
            max_model_tokens=96,
            max_num_seqs=64,
            kv_cache_mib=16,
        )
        cluster = request.getfixturevalue("ray_cluster") if kind != "transformers" else in_process_cluster
        return cluster.worker(
            ("test engine", spec), f"{kind} engine", ENGINE_CLASSES[kind], spec, seat=Seat(group=f"{kind}, tied={tied}")
        )

    return get
