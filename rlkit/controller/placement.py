"""Where a run's workers sit: which part of a node's cores, and which devices (`cluster.placement`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlkit.config import RunConfig
from rlkit.settings import Placement

# Of a device, for an engine, a learner's rank, a reference scorer and reward models together. Ray only counts with it.
COLOCATED_SHARE = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """A worker's place. Workers that name one group share a Ray placement group, whose bundles have a device each."""

    share: tuple[int, int] = (0, 1)  # it is number i of n that work at the same time, and gets the i-th part of the cores
    group: str
    group_size: int = 1  # bundles of the group, all on one node
    bundles: tuple[int, ...] = (0,)  # that are this worker's
    workers_per_bundle: int = 1  # that may ever sit there
    device_share: float = 1.0  # of each of its bundles' devices, where there are any
    # Whether its threads sleep at once where they wait for each other. Those of workers that compute at the same time on the same
    # cores must; otherwise a learner is a tenth slower for it.
    yields_cores: bool = False


def engine_seat(config: RunConfig, index: int, *, purpose: str = "training") -> Seat:
    """An engine's devices are on one node: its tensor-parallel workers talk to each other at every layer."""
    size = config.rollout.devices_per_engine
    is_shared = config.placement is Placement.colocated and purpose == "training"
    num_workers = 3 + len(config.reward.model_paths) if is_shared else 1
    return Seat(
        share=(index, config.rollout.num_engines),
        group=f"{purpose} engine {index}",
        group_size=size,
        bundles=tuple(range(size)),
        workers_per_bundle=num_workers,
        device_share=COLOCATED_SHARE / num_workers if is_shared else 1.0,
        yields_cores=config.max_staleness > 0,
    )


def rank_seat(config: RunConfig, index: int) -> Seat:
    share = (index, config.learner.num_ranks)
    if config.placement is Placement.separate:
        return Seat(share=share, group=f"learner rank {index}", yields_cores=config.max_staleness > 0)
    return _beside_an_engine(config, index, share)


def scorer_seat(config: RunConfig) -> Seat:
    if config.placement is Placement.separate:
        return Seat(group="reference scorer", yields_cores=config.max_staleness > 0)
    return _beside_an_engine(config, 0, (0, 1))


def reward_model_seat(config: RunConfig, name: str) -> Seat:
    """`name`: the worker's, which tells several models apart."""
    if config.placement is Placement.separate:
        return Seat(group=name, yields_cores=config.max_staleness > 0)
    return _beside_an_engine(config, 0, (0, 1))


def _beside_an_engine(config: RunConfig, device: int, share: tuple[int, int]) -> Seat:
    engine, bundle = divmod(device, config.rollout.devices_per_engine)
    return replace(engine_seat(config, engine), share=share, bundles=(bundle,))
