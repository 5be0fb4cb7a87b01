"""vLLM's own transfer code without a GPU: its trainers, workers, factories and rendezvous are real; what stands in is the wire.

`on_this_cpu` replaces streams, the NCCL communicator and CUDA's memory handles, and nothing above them.
"""

from __future__ import annotations

import inspect
import itertools
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlkit.compose import compose
from rlkit.core.loss import Knobs
from rlkit.errors import ResourceError, SyncError, WorkerError
from rlkit.types import SampleRequest, SamplingSpec
from rlkit.workers import learner as learner_module
from rlkit.workers.learner import Learner, full_tensor
from rlkit.workers.rollout import vllm_engine
from rlkit.workers.rollout.engine import EngineSpec, expected_tensors
from rlkit.workers.rollout.vllm_engine import VllmRolloutEngine

pytestmark = pytest.mark.slow  # all of it imports vLLM

STREAM = SimpleNamespace(synchronize=lambda: None)


class Communicator:
    """Stands for PyNcclCommunicator: broadcasts through the store in which the members met."""

    def __init__(self, group: Any, device: Any):
        self.group = group

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        received = self.group.broadcast(tensor, src)
        if self.group.rank != src:
            tensor.copy_(received)

    def destroy(self) -> None: ...


def on_this_cpu(patch=setattr) -> None:
    """`patch`: of pytest's monkeypatch, or for good in a worker's process."""
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import ipc_engine, packed_tensor

    exported: dict[int, torch.Tensor] = {}

    def export(tensor: torch.Tensor) -> tuple[None, tuple]:
        exported[len(exported)] = tensor
        return None, (len(exported) - 1, None, None, None, None, None, "device of the sender")

    empty = torch.empty
    for module in (learner_module, vllm_engine):
        patch(module, "check_device", lambda kind, who, *, is_gpu: None)
    patch(pynccl, "PyNcclCommunicator", Communicator)
    patch(packed_tensor, "_get_streams", lambda device, count: (STREAM,) * count)
    patch(torch.cuda, "stream", lambda stream: nullcontext())
    patch(torch.cuda, "current_stream", lambda: STREAM)
    patch(torch.accelerator, "current_device_index", lambda: 0)
    patch(torch.accelerator, "synchronize", lambda: None)
    # CUDA's handles, which stay in this process:
    patch(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="GPU-0"))
    patch(torch.cuda, "ipc_collect", lambda: None)
    patch(torch, "empty", lambda *size, **kw: empty(*size, **({**kw, "device": "cpu"} if kw.get("device") == "cuda" else kw)))
    for module in (packed_tensor, ipc_engine):
        patch(module, "reduce_tensor", export)
    patch(torch.multiprocessing.reductions, "rebuild_cuda_tensor", lambda number, *rest: exported[number])


class Call:
    """`Pending` on a thread."""

    def __init__(self, future: Future, name: str, method: str):
        self._future, self._what = future, f"{name} did not finish {method}"

    def is_done(self) -> bool:
        return self._future.done()

    def result(self, deadline_s: float) -> Any:
        try:
            return self._future.result(timeout=deadline_s)
        except FutureTimeout:
            raise WorkerError(f"{self._what} within {deadline_s:.0f} s and was killed.") from None


class OnAThread:
    """`Handle` of an object here, which may hang."""

    def __init__(self, name: str, worker: Any):
        self.name, self._worker, self._threads = name, worker, ThreadPoolExecutor(max_workers=1)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Call:
        return Call(self._threads.submit(getattr(self._worker, method), *args, **kwargs), self.name, method)

    def kill(self) -> None: ...


@pytest.fixture
def engine_with(monkeypatch):
    """A function (spec's changes) -> rlkit's engine over vLLM's real worker-side transfer engine, and a model that only notes."""
    import vllm
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.entrypoints.rl.offline import RLOfflineMixin
    from vllm.model_executor.model_loader import reload

    on_this_cpu(monkeypatch.setattr)
    for name in ("initialize_layerwise_reload", "finalize_layerwise_reload"):
        monkeypatch.setattr(reload, name, lambda model, *rest: None)

    class Model:
        def __init__(self):
            self.weights: dict[str, torch.Tensor] = {}

        def load_weights(self, weights) -> None:
            self.weights |= {name: tensor.clone() for name, tensor in weights}

    class FakeLLM(RLOfflineMixin):
        """vLLM's calls as `LLM` has them, and one worker below."""

        def __init__(self, *, weight_transfer_config, **arguments):
            self.calls: list[str] = []
            self.llm_engine: Any = self
            self.weight_version, self.engine_core = "", None
            self.model: Any = Model()
            parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
            self.vllm_config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
            self.worker: Any = weight_transfer_config and WeightTransferEngineFactory.create_engine(
                weight_transfer_config, self.vllm_config, torch.device("cpu", 0), self.model
            )

        def collective_rpc(self, method: str, kwargs: dict | None = None) -> None:
            self.calls.append(method)
            match method:
                case "init_weight_transfer_engine":
                    assert kwargs is not None
                    self.worker.init_transfer_engine(self.worker.parse_init_info(kwargs["init_info"]))
                case "shutdown_weight_transfer_engine":
                    self.worker.shutdown()
                case "start_weight_update" | "update_weights" | "finish_weight_update":
                    getattr(self.worker, method)(**(kwargs or {}))

        def set_weight_version(self, version: str) -> None:
            self.weight_version = version

        def reset_prefix_cache(self) -> None:
            self.calls.append("reset_prefix_cache")

    monkeypatch.setitem(vars(vllm), "LLM", FakeLLM)

    spec = EngineSpec(
        kind="vllm",
        model_path="",
        dtype="float32",
        trust_remote_code=False,
        max_model_tokens=64,
        max_num_seqs=4,
        weight_transport="nccl",
    )

    def build(**changes) -> Any:
        return VllmRolloutEngine(replace(spec, **changes))

    return build


def begin(learner: Learner, folder: str, *settings: str) -> dict[str, torch.Tensor]:
    """The learner with a model, whose parameters by name are returned."""
    learner.begin(compose([f"model.path={folder}", *settings]))
    return {name: full_tensor(parameter).clone() for name, parameter in learner.policy.model.named_parameters()}


def handles(*engines: Any) -> list[OnAThread]:
    return [OnAThread(f"rollout engine {index}", engine) for index, engine in enumerate(engines)]


def test_what_is_used_of_vllm_is_there():
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.entrypoints.rl.offline import RLOfflineMixin

    from rlkit.workers.native_transfer import EngineClient

    def parameters(function) -> list[str]:
        return [name for name in inspect.signature(function).parameters if name != "self"]

    assert parameters(WeightTransferTrainerFactory.trainer_init) == ["init_info", "client", "source"]
    assert {"rank", "master_address", "master_port", "world_size", "packed", "packed_buffer_size_bytes"} <= {
        *parameters(NCCLTrainerInitInfo)
    }
    assert {"rank", "packed", "packed_buffer_size_bytes"} <= {*parameters(IPCTrainerInitInfo)}
    client = EngineClient([], [], deadline_s=1, waits_for=str)
    assert isinstance(client, VLLMWeightSyncClient)
    for name in ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"):
        assert parameters(getattr(EngineClient, name)) == parameters(getattr(VLLMWeightSyncClient, name)), name
        assert hasattr(RLOfflineMixin, name)
    assert parameters(RLOfflineMixin.shutdown_weight_transfer_engine) == []


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_is_declared_is_what_is_sent_and_what_the_checkpoint_has(learner, random_model, tied):
    from rlkit.workers.rollout.vllm_transfer import PACKED_BYTES, PolicySource

    folder = random_model(tied=tied)
    weights = begin(learner, folder)
    source = PolicySource(learner._groups(), lambda: dict(learner.policy.model.named_parameters()), torch.bfloat16)
    for _ in range(2):  # every pass is a fresh one
        sent = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]
        assert sent == [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
    names = [name for name, *_ in sent]
    assert frozenset(names) == expected_tensors(folder).keys()
    assert len(names) == len(weights) == (20 if tied else 21)
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert all(tensor.equal(weights[name].bfloat16()) for name, tensor in source)
    assert source.packed_bytes() == PACKED_BYTES


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_tensor_reaches_every_engine_through_vllm_s_own_code(learner, random_model, engine_with, monkeypatch, kind, tied):
    from rlkit.workers.rollout import vllm_transfer

    monkeypatch.setattr(vllm_transfer, "PACKED_BYTES", 40_000)  # of 300 kB
    folder = random_model(tied=tied)
    weights = begin(learner, folder)
    engines = [engine_with(model_path=folder, weight_transport=kind) for _ in range(2)]
    if kind == "nccl":
        assert [engine.transfer_ranks() for engine in engines] == [1, 1]
    learner.open_transfer(kind, handles(*engines), [1, 1])
    for version in (5, 6):
        learner.send_weights(version)
    for engine in engines:
        llm = engine._llm
        assert llm.model.weights.keys() == weights.keys()
        assert all(llm.model.weights[name].equal(tensor) for name, tensor in weights.items())
        num_updates = 1 if kind == "nccl" else llm.calls.count("update_weights") // 2
        assert (num_updates > 1) == (kind == "ipc")  # one call a buffer there
        loaded = ["start_weight_update", *["update_weights"] * num_updates, "finish_weight_update"]
        after = ["rlkit_finish_reload", "reset_prefix_cache"]
        assert llm.calls == ["shutdown_weight_transfer_engine", "init_weight_transfer_engine", *(loaded + after) * 2]
        assert (engine.version, llm.weight_version, engine._loads) == (6, "6", 2)
    with pytest.raises(SyncError, match=r"8: the engine has version 6, and 7 comes next"):
        learner.send_weights(8)
    begin(learner, folder)  # the next run's learner: its first version may be any
    learner.open_transfer(kind, handles(*engines), [1, 1])
    learner.send_weights(0)
    assert engines[0].version == 0


def test_a_tensor_that_is_missing_or_extra_is_refused_before_anything_starts(learner, random_model, engine_with):
    for tied, sentence in ((False, r"lm_head\.weight, which the model's checkpoint has not"), (True, r"first lm_head\.weight")):
        begin(learner, random_model(tied=tied))
        engine = engine_with(model_path=random_model(tied=not tied))
        learner.open_transfer("nccl", handles(engine), [1])
        with pytest.raises(SyncError, match=sentence):
            learner.send_weights(0)
        assert "start_weight_update" not in engine._llm.calls


def test_an_engine_that_fails_or_hangs_ends_the_send_though_the_broadcast_is_stuck(
    learner, random_model, engine_with, monkeypatch, stuck
):
    folder = random_model(tied=True)

    def broadcast(self, tensor, src, stream=None):
        if self.group.rank == src:
            stuck.wait(100)  # as NCCL does for ever when the other side takes no part

    monkeypatch.setattr(Communicator, "broadcast", broadcast)
    for outcome, deadline_s, sentence in (
        (lambda *_, **__: 1 // 0, 100, "failed in update_weights: .* by zero"),
        (lambda *_, **__: stuck.wait(100), 1, r"^rollout engine 0 did not finish update_weights within 1 s and was killed"),
    ):
        begin(learner, folder, f"rollout.deadline_s={deadline_s}")
        engine = engine_with(model_path=folder)
        monkeypatch.setattr(engine._llm.worker, "receive_weights", outcome)
        learner.open_transfer("nccl", handles(Failing(engine)), [1])
        began = time.monotonic()
        with pytest.raises(WorkerError, match=sentence):
            learner.send_weights(0)
        assert time.monotonic() - began < 20
    learner._sender = None


class Failing:
    """An engine whose mistakes come as a Ray actor's do."""

    def __init__(self, engine: Any):
        self._engine = engine

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any) -> Any:
            try:
                return getattr(self._engine, method)(*args)
            except ZeroDivisionError as error:
                raise WorkerError(f"rollout engine 0 failed in {method}: {error}") from error

        return call


def test_a_gather_that_hangs_is_the_learner_s_own_failure(learner, random_model, engine_with, monkeypatch, stuck):
    from rlkit.workers.rollout.vllm_transfer import PolicySource

    folder = random_model(tied=True)
    begin(learner, folder, "rollout.deadline_s=1")

    def gather(self):
        yield from itertools.islice(pairs(self), 3)
        self.gathering = "model.layers.0.mlp.up_proj.weight"
        stuck.wait(100)

    pairs = PolicySource.__iter__
    monkeypatch.setattr(PolicySource, "__iter__", gather)
    learner.open_transfer("nccl", handles(engine_with(model_path=folder)), [1])
    with pytest.raises(WorkerError, match=r"^learner rank 0 did not finish gathering model\.layers\.0\.mlp\.up_proj\.weight with"):
        learner.send_weights(0)
    learner._sender = None


def test_without_a_gpu_or_with_a_core_elsewhere_the_engine_refuses(learner, random_model, engine_with, monkeypatch):
    folder = random_model(tied=True)
    assert engine_with(model_path=folder, weight_transport="host")._llm.worker is None
    with pytest.raises(ResourceError, match=r"^rollout\.weight_transport=ipc: vLLM's core runs in a process of its own.* Write"):
        engine_with(model_path=folder, weight_transport="ipc").transfer_ranks()
    monkeypatch.undo()
    with pytest.raises(ResourceError, match=r"^rollout\.weight_transport=nccl: learner rank 0 sees no GPU.* Write rollout\.weight"):
        begin(learner, folder, "rollout.weight_transport=nccl")  # before any engine has started


def test_an_engine_whose_weights_sleep_is_not_updated(learner, random_model, engine_with):
    folder = random_model(tied=True)
    engine = engine_with(model_path=folder)
    engine._can_sleep, engine._llm.sleep, engine._llm.wake_up = True, lambda level: None, lambda tags: None
    begin(learner, folder)
    learner.open_transfer("nccl", handles(engine), [1])
    engine.sleep()
    engine.wake("kv_cache")
    with pytest.raises(SyncError, match="the engine's weights are asleep"):
        learner.send_weights(0)
    engine.wake("weights")
    learner.send_weights(0)
    assert engine.version == 0


# --- real vLLM, real actors ----------------------------------------------------------------------------------------------


class CpuLearner(Learner):
    """A learner that meets engines without a GPU."""

    def begin(self, config: Any) -> None:
        on_this_cpu()
        super().begin(config)


class CpuEngine(VllmRolloutEngine):
    """An engine that receives without a GPU."""

    def __init__(self, spec: EngineSpec):
        super().__init__(spec)
        on_this_cpu()


class CpuCluster:
    """Starts the two in the others' places."""

    def __init__(self, cluster: Any):
        self._cluster = cluster

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cluster, name)

    def worker(self, key: Any, name: str, target: str, *args: Any, **kwargs: Any) -> Any:
        cls = CpuLearner if target.endswith(":Learner") else CpuEngine
        return self._cluster.worker(("on this CPU", key), name, f"{__name__}:{cls.__name__}", *args, **kwargs)


def test_two_ranks_drive_a_real_engine_and_are_not_used_after_it_died(ray_cluster, random_model, make_batch):
    from rlkit.controller.fleet import Engines, Learners, weight_transport
    from rlkit.controller.turns import SideBySide
    from rlkit.workers.weight_sync import TOLERANCES, sync_weights

    cluster: Any = CpuCluster(ray_cluster)
    settings = ["optimizer=sgd", "optimizer.learning_rate=0.5", "max_response_tokens=16", "max_prompt_tokens=16"]
    settings += ["rollout.weight_transport=nccl", "learner.num_ranks=2"]
    config = compose([f"model.path={random_model(tied=True)}", *settings])
    engines, learner = Engines(config, cluster, SideBySide()), Learners(config, cluster, SideBySide())
    transport = weight_transport(config, learner, engines)
    probes = [tuple(int(token) for token in row) for row in np.random.default_rng(0).integers(3, 96, (4, 24))]

    def sync(version: int) -> float:
        check = {"probes": probes, "tolerance": TOLERANCES["float32"]}
        return sync_weights(learner, engines, version=version, transport=transport, **check).max_abs

    assert sync(4) <= 1e-4
    before = learner.score(probes)
    learner.update(make_batch(rows=7), Knobs())
    assert max(abs(a - b).max() for a, b in zip(before, learner.score(probes), strict=True)) > 1e-3
    assert sync(5) <= 1e-4
    request = SampleRequest(sample_id="a", prompt_ids=(5, 6), seed=0)
    (completion,) = engines.generate([request], SamplingSpec(max_tokens=8, stop_token_ids=(2,))).result()
    assert (completion.policy_version == 5).all()
    os.kill(int(ray_cluster.places()["rollout engine 0"].rpartition(":")[2]), signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"^rollout engine 0 died during start_weight_update"):
        sync(6)
    assert not {"rollout engine 0", "learner rank 0", "learner rank 1"} & ray_cluster.places().keys()
