"""Ranks and engines as one: what the controller sees must not depend on how many there are."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from rlkit.compose import compose
from rlkit.controller.fleet import Engines, Learners
from rlkit.controller.placement import Seat
from rlkit.controller.turns import SideBySide
from rlkit.core.loss import Knobs
from rlkit.errors import WorkerError
from rlkit.types import SampleRequest, SamplingSpec
from rlkit.workers.weight_sync import TOLERANCES, sync_weights

SETTINGS = ["optimizer=sgd", "optimizer.learning_rate=0.5", "max_response_tokens=16", "aggregation=token_mean"]
SETTINGS += ["max_prompt_tokens=8", "learner.tokens_per_microbatch=24"]  # so that ranks differ in their number of microbatches


def exported(learner: Learners, cluster) -> dict[str, torch.Tensor]:
    from rlkit.workers.weight_sync import unpack

    tensors = {}
    for index in range(learner.num_parts()):
        part = learner.export_part(index, 0).result(300)
        tensors |= {name: unpack(packed).clone() for name, packed in part.tensors.items()}
    return tensors


LEARNERS = {"fsdp": [], "lora": ["learner.lora_rank=1", "learner.lora_alpha=4"]}  # of A's one row, the second rank has none


@pytest.mark.slow
def test_two_ranks_step_as_one(ray_cluster, random_model, make_batch, tmp_path):
    batch, before, after, following = make_batch(rows=7), {}, {}, {}
    settings = {
        kind: [f"model.path={random_model(tied=True)}", f"learner={kind}", *own, *SETTINGS] for kind, own in LEARNERS.items()
    }
    for ranks in (1, 2):
        for kind in LEARNERS:
            learner = Learners(compose([*settings[kind], f"learner.num_ranks={ranks}"]), ray_cluster, SideBySide())
            before[kind] = exported(learner, ray_cluster)
            for _ in range(3):
                stats = learner.update(batch, Knobs())
            after[kind, ranks] = exported(learner, ray_cluster), stats
            (tmp_path / kind).mkdir(exist_ok=True)
            learner.save(str(tmp_path / kind))
            learner.update(batch, Knobs())
            following[kind] = exported(learner, ray_cluster)
    for kind in LEARNERS:
        (one, stats), (two, other_stats) = after[kind, 1], after[kind, 2]
        for name in one:
            moved = (one[name] - before[kind][name]).norm()
            assert (one[name] - two[name]).norm() <= 3e-5 * moved + 1e-7, name
            assert moved > 1e-2 or (kind == "lora" and "_proj" not in name), name
        for name, metric in stats.metrics.items():
            assert other_stats.metrics[name].value == pytest.approx(metric.value, rel=1e-4, abs=1e-6), name
        # What two ranks saved, one goes on with: the same weights to the last bit, and the same next step.
        single = Learners(compose(settings[kind]), ray_cluster, SideBySide())
        (tmp_path / kind / "state" / "learner-0-of-1.safetensors").unlink()  # of the one rank before
        single.restore(str(tmp_path / kind))
        restored = exported(single, ray_cluster)
        assert all(restored[name].equal(two[name]) for name in two)
        single.update(batch, Knobs())
        next_one, next_two = exported(single, ray_cluster), following[kind]
        for name in two:
            assert (next_one[name] - next_two[name]).norm() <= 3e-5 * (next_two[name] - two[name]).norm() + 1e-7, name


@pytest.mark.slow
def test_a_rank_whose_fellows_are_gone_is_not_asked_to_meet_new_ones(ray_cluster):
    """As in a sweep over numbers of ranks: it would wait for them where they never come."""
    keys = [("fellow", index) for index in range(2)]

    def start() -> list:
        return [ray_cluster.worker(key, f"fellow {key[1]}", "builtins:dict", seat=Seat(group=f"fellow {key[1]}")) for key in keys]

    first = start()
    ray_cluster.meeting_point(keys)
    assert start() == first  # both are there, and know each other
    first[0].kill()
    ray_cluster.meeting_point(keys)
    assert not first[1].is_alive


@pytest.mark.slow
def test_two_engines_hold_the_same_weights_answer_in_order_and_do_not_outlive_a_sync_that_one_of_them_hangs_in(
    ray_cluster, random_model
):
    settings = ["rollout.num_engines=2", "max_response_tokens=8", "rollout.deadline_s=20"]
    config = compose([f"model.path={random_model(tied=True)}", *settings])
    engines, learner = Engines(config, ray_cluster, SideBySide()), Learners(config, ray_cluster, SideBySide())
    probes = [(5, 6, 7, 8), (30, 31, 32)]
    report = sync_weights(learner, engines, version=3, probes=probes, tolerance=TOLERANCES["float32"])
    assert report.max_abs <= 1e-4
    requests = [SampleRequest(sample_id=str(i), prompt_ids=(5 + i, 6), seed=i) for i in range(7)]
    completions = engines.generate(requests, SamplingSpec(max_tokens=8, stop_token_ids=(2,))).result()
    assert [completion.sample_id for completion in completions] == [str(i) for i in range(7)]
    assert all((completion.policy_version == 3).all() for completion in completions)

    class StopsHalfway(Learners):
        """Its last part is sent when an engine has just stopped answering."""

        def export_part(self, index, version):
            if index == self.num_parts() - 1:
                os.kill(int(ray_cluster.places()["rollout engine 1"].rpartition(":")[2]), signal.SIGSTOP)
            return super().export_part(index, version)

    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"rollout engine 1 did not finish receive within 20 s and was killed\."):
        sync_weights(
            StopsHalfway(config, ray_cluster, SideBySide()), engines, version=4, probes=probes, tolerance=TOLERANCES["float32"]
        )
    assert time.monotonic() - began < 80
