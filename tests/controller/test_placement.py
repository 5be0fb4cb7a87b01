"""Seats: on a cluster with devices (a fake one, which records what Ray is asked for), and on this machine's Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rlkit.compose import compose
from rlkit.controller import cluster
from rlkit.controller.placement import engine_seat, rank_seat, reward_model_seat, scorer_seat
from rlkit.controller.turns import ByTurns
from rlkit.errors import ConfigError, ResourceError
from rlkit.settings import LocalRay


class FakeRay:
    """Placement groups and actors of a machine with GPUs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, gpus: int = 4):
        self.gpus, self.groups, self.removed, self.actors, self.killed = gpus, [], [], [], []
        monkeypatch.setattr(ray, "init", lambda **kwargs: None)
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": float(gpus)} if gpus else {"CPU": 64.0})
        monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 60.0, "GPU": 0.0})
        monkeypatch.setattr(ray, "kill", self.killed.append)
        monkeypatch.setattr(ray, "remote", lambda cls: SimpleNamespace(options=self.options))
        monkeypatch.setattr(ray.util, "placement_group", self.placement_group)
        monkeypatch.setattr(ray.util, "remove_placement_group", self.removed.append)

    def placement_group(self, bundles: list[dict[str, float]], strategy: str) -> Any:
        def wait(limit_s: float) -> bool:
            held = sum(self.devices(other) for other in self.groups if other is not group and other not in self.removed)
            return held + self.devices(group) <= self.gpus

        group = SimpleNamespace(bundles=bundles, strategy=strategy, wait=wait)
        self.groups.append(group)
        return group

    @staticmethod
    def devices(group: Any) -> float:
        return sum(bundle.get("GPU", 0) for bundle in group.bundles)

    def options(self, **options: Any) -> Any:
        def remote(target: str, share: tuple[int, int], args: tuple, kwargs: dict) -> Any:
            actor = SimpleNamespace(target=target, **options)
            self.actors.append(actor)
            return actor

        return SimpleNamespace(remote=remote)

    def place_of(self, actor: Any) -> tuple[int, int]:
        """Number of its placement group, and its bundle."""
        strategy = actor.scheduling_strategy
        return self.groups.index(strategy.placement_group), strategy.placement_group_bundle_index


def start(ray_cluster: cluster.RayCluster, config) -> None:
    """The workers of a run."""
    for index in range(config.rollout.num_engines):
        ray_cluster.worker(("engine", index), f"rollout engine {index}", "m:Engine", seat=engine_seat(config, index))
    for index in range(config.learner.num_ranks):
        ray_cluster.worker(("rank", index), f"learner rank {index}", "m:Learner", seat=rank_seat(config, index))
    ray_cluster.worker("scorer", "reference scorer", "m:Scorer", seat=scorer_seat(config))


def test_separate_workers_have_a_device_and_a_placement_group_each(monkeypatch):
    fake = FakeRay(monkeypatch)
    start(cluster.RayCluster(LocalRay()), compose(["rollout.num_engines=1", "learner.num_ranks=2"]))
    assert [group.bundles for group in fake.groups] == [[{"CPU": 1.0, "GPU": 1.0}]] * 4
    assert [actor.num_gpus for actor in fake.actors] == [1.0] * 4
    assert [fake.place_of(actor) for actor in fake.actors] == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_colocated_ranks_sit_on_the_engines_devices_and_ray_can_count_them_all_in(monkeypatch):
    fake = FakeRay(monkeypatch, gpus=2)
    config = compose(["rollout.num_engines=2", "learner.num_ranks=2", "cluster.placement=colocated"])
    start(cluster.RayCluster(LocalRay()), config)
    assert [group.bundles for group in fake.groups] == [[{"CPU": 3.0, "GPU": 1.0}]] * 2
    assert [fake.place_of(actor) for actor in fake.actors] == [(0, 0), (1, 0), (0, 0), (1, 0), (0, 0)]
    assert sum(actor.num_gpus for actor in fake.actors if fake.place_of(actor) == (0, 0)) <= 1


def test_reward_models_have_devices_of_their_own_or_sit_on_an_engines(monkeypatch):
    models = ["reward=weighted", "reward.fns={form:format}", "reward.models={taste:a,tone:b}"]
    for placement, num_groups in (("separate", 5), ("colocated", 1)):
        fake = FakeRay(monkeypatch, gpus=5)
        ray_cluster, config = cluster.RayCluster(LocalRay()), compose([*models, f"cluster.placement={placement}"])
        start(ray_cluster, config)
        for name in ("taste", "tone"):
            ray_cluster.worker(name, name, "m:RewardModel", seat=reward_model_seat(config, name))
        assert len(fake.groups) == num_groups
        assert len(fake.actors) == 5
        assert sum(actor.num_gpus for actor in fake.actors if fake.place_of(actor) == (0, 0)) <= 1
        assert not fake.killed


def test_without_devices_none_is_asked_for(monkeypatch):
    fake = FakeRay(monkeypatch, gpus=0)
    start(cluster.RayCluster(LocalRay()), compose(["learner.num_ranks=2"]))
    assert all(group.bundles == [{"CPU": 1.0}] for group in fake.groups)
    assert all(actor.num_gpus == 0 for actor in fake.actors)


def test_too_few_devices_are_named_before_any_worker_waits_for_one(monkeypatch):
    fake = FakeRay(monkeypatch, gpus=1)
    with pytest.raises(ResourceError, match=r"^learner rank 0 needs 1 CPU and 1 GPU on one node, and 60 of 64 CPU and 0 of 1 GPU"):
        start(cluster.RayCluster(LocalRay()), compose([]))
    assert fake.removed == fake.groups[1:]  # what could not be had is not left queued


def test_a_later_run_takes_the_seat_of_a_worker_it_cannot_use(monkeypatch):
    """In a sweep over engine settings the engine before must go, or the next would wait for its device for ever."""
    fake = FakeRay(monkeypatch, gpus=2)
    ray_cluster, config = cluster.RayCluster(LocalRay()), compose([])
    first = ray_cluster.worker("a", "rollout engine 0", "m:Engine", seat=engine_seat(config, 0))
    assert ray_cluster.worker("a", "rollout engine 0", "m:Engine", seat=engine_seat(config, 0)) is first
    ray_cluster.worker("b", "rollout engine 0", "m:Engine", seat=engine_seat(config, 0))
    assert fake.killed == [fake.actors[0]]
    assert len(fake.groups) == 1
    colocated = compose(["cluster.placement=colocated"])
    ray_cluster.worker("b2", "rollout engine 0", "m:Engine", seat=engine_seat(colocated, 0))
    assert fake.killed == fake.actors[:2]
    assert fake.removed == fake.groups[:1]  # of another shape


def test_what_only_earlier_runs_used_goes_where_its_room_is_needed(monkeypatch):
    """In a sweep over the number of engines, those of the run before must not hold the devices that a reference needs now."""
    fake = FakeRay(monkeypatch, gpus=3)
    ray_cluster, two = cluster.RayCluster(LocalRay()), compose(["rollout.num_engines=2"])
    for index in (0, 1):
        ray_cluster.worker(("engine", index), f"rollout engine {index}", "m:Engine", seat=engine_seat(two, index))
    ray_cluster.worker(("rank", 0), "learner rank 0", "m:Learner", seat=rank_seat(compose([]), 0))
    with pytest.raises(ResourceError, match="reference scorer needs"):  # this run needs all three itself
        start(ray_cluster, two)
    assert not fake.killed
    ray_cluster.begin_run()
    start(ray_cluster, compose([]))
    assert fake.killed == fake.actors[:2]  # engine 0 has all of the cores now, and is another
    assert fake.groups[1] in fake.removed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["max_staleness=1"], r"^cluster.placement=colocated: engines and learner take turns .* max_staleness=1 .* Write max_stal"),
        (
            ["learner.num_ranks=2"],
            r"^learner.num_ranks=2: .* sit on the engines' devices, which are 1\. Write rollout.num_engines=2",
        ),
    ],
)
def test_what_cannot_be_colocated_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose(["cluster.placement=colocated", *overrides])


@pytest.mark.slow
def test_a_colocated_run_on_this_machine_takes_turns_and_syncs(ray_cluster, random_model):
    """No device here gives memory back; the calls are made all the same, to real workers in one placement group."""
    from rlkit.controller.fleet import Engines, Learners
    from rlkit.types import SampleRequest, SamplingSpec
    from rlkit.workers.weight_sync import TOLERANCES, sync_weights

    config = compose([f"model.path={random_model(tied=True)}", "rollout=transformers", "cluster.placement=colocated"])
    turns = ByTurns()
    engines, learner = Engines(config, ray_cluster, turns), Learners(config, ray_cluster, turns)
    for version in (0, 1):
        report = sync_weights(learner, engines, version=version, probes=[(5, 6, 7)], tolerance=TOLERANCES["float32"])
        assert report.max_abs <= 1e-4
        request = SampleRequest(sample_id="a", prompt_ids=(1, 5), seed=0)
        (completion,) = engines.generate([request], SamplingSpec(max_tokens=4, stop_token_ids=(2,))).result()
        assert (completion.policy_version == version).all()
