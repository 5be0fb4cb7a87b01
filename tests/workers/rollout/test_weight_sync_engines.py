"""Real learner, real engines: every parameter group must arrive, and a sync that did not happen must be noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from rlkit.compose import compose
from rlkit.controller.placement import Seat
from rlkit.errors import SyncError, WorkerError
from rlkit.types import Completion, SampleRequest, SamplingSpec
from rlkit.workers.learner import Learner, local_tensor
from rlkit.workers.rollout.engine import EngineSpec
from rlkit.workers.rollout.vllm_async import PREFIX, SHARED_MEMORY, AsyncVllmRolloutEngine, sweep_shared_memory
from rlkit.workers.weight_sync import TOLERANCES, Manifest, WeightPart, check_behaviour, sync_weights

DEADLINE_S = 300.0
PROBES = [tuple(int(t) for t in row) for row in np.random.default_rng(0).integers(3, 96, (4, 32))]
KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("vllm", "vllm_async")] + ["transformers"]


class OneEngine:
    """`EngineSide` over one handle."""

    def __init__(self, handle):
        self._handle = handle

    def receive(self, part):
        self._handle.call("receive", part).result(DEADLINE_S)

    def commit(self, manifest):
        self._handle.call("commit", manifest).result(DEADLINE_S)

    def score_each(self, sequences):
        return [self._handle.call("score", sequences).result(DEADLINE_S)]

    def layer_outputs(self, engine, sequence):
        return self._handle.call("layer_outputs", sequence).result(DEADLINE_S)


@pytest.fixture(autouse=True)
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a large model's: these are so small that one part would hold them."""
    monkeypatch.setattr("rlkit.workers.weight_sync.PART_BYTES", 1)


def begin(learner: Learner, folder: str) -> None:
    learner.begin(compose([f"model.path={folder}"]))


def groups(learner: Learner) -> list[str]:
    """One name per kind of tensor: every projection and norm of the last layer, embedding, final norm, head."""
    names = [name for name, _ in learner.policy.model.named_parameters()]
    return [name for name in names if ".layers.0." not in name]


def perturb(learner: Learner, name: str) -> None:
    parameter = dict(learner.policy.model.named_parameters())[name]
    with torch.no_grad():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.mul_(1 + 0.05 * noise)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_parameter_group_reaches_the_engine_and_a_missing_sync_is_noticed(engine_of, random_model, learner, kind, tied):
    begin(learner, random_model(tied=tied))
    engine = OneEngine(engine_of(kind, tied=tied))
    check = {"probes": PROBES, "tolerance": TOLERANCES["float32"]}
    sync_weights(learner, engine, version=0, **check)
    for version, name in enumerate(groups(learner), start=1):
        perturb(learner, name)
        with pytest.raises(SyncError, match="does not hold the learner's weights"):  # nothing was sent
            check_behaviour(learner, engine, version=version, **check)
        report = sync_weights(learner, engine, version=version, **check)
        assert report.max_abs <= 1e-4, name
    assert ("lm_head.weight" in groups(learner)) != tied


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_check_names_the_first_layer_that_differs(engine_of, random_model, learner, kind):
    begin(learner, random_model(tied=True))
    engine = OneEngine(engine_of(kind, tied=True))
    check = {"probes": PROBES, "tolerance": TOLERANCES["float32"]}
    sync_weights(learner, engine, version=0, **check)
    perturb(learner, "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(SyncError, match=r"first difference: layers\.1 "):
        check_behaviour(learner, engine, version=1, **check)
    sync_weights(learner, engine, version=1, **check)
    perturb(learner, "model.norm.weight")
    with pytest.raises(SyncError, match="final norm or lm_head"):
        check_behaviour(learner, engine, version=2, **check)


@pytest.mark.parametrize("kind", KINDS)
def test_an_incomplete_or_torn_sync_is_refused_and_leaves_the_old_weights(engine_of, random_model, learner, kind):
    begin(learner, random_model(tied=True))
    engine = OneEngine(engine_of(kind, tied=True))
    check = {"probes": PROBES, "tolerance": TOLERANCES["float32"]}
    sync_weights(learner, engine, version=0, **check)
    for index in range(learner.num_parts() - 1):  # the last layer never comes
        engine.receive(learner.export_part(index, 1))
    with pytest.raises(SyncError, match=r"lacks 9 of the 20 .* first model\.layers\.1\."):
        engine.commit(learner.manifest(1))
    for index in range(learner.num_parts()):
        engine.receive(learner.export_part(index, 1))
    torn = learner.manifest(1).digests | {"model.norm.weight": "0" * 32}
    with pytest.raises(SyncError, match=r"bytes of model\.norm\.weight are not those"):
        engine.commit(Manifest(version=1, digests=torn))
    check_behaviour(learner, engine, version=0, **check)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_reach_the_engine_merged_and_a_forgotten_merge_is_noticed(engine_of, random_model, learner, kind, monkeypatch):
    learner.begin(compose([f"model.path={random_model(tied=True)}", "learner=lora", "learner.lora_rank=4"]))
    engine = OneEngine(engine_of(kind, tied=True))
    check = {"probes": PROBES, "tolerance": TOLERANCES["float32"]}
    sync_weights(learner, engine, version=0, **check)
    with torch.no_grad():  # a fresh B is zero
        for name, parameter in learner.policy.model.named_parameters():
            if ".layers.1." in name and ".lora_B." in name:
                local_tensor(parameter).normal_(std=0.05, generator=torch.Generator().manual_seed(7))
    with monkeypatch.context() as patch:
        patch.setattr("rlkit.data.models.lora.merge", lambda weight, **adapter: weight)
        with pytest.raises(SyncError, match=r"first difference: layers\.1 .* does not hold the learner's weights"):
            sync_weights(learner, engine, version=1, **check)
    report = sync_weights(learner, engine, version=2, **check)
    assert report.max_abs <= 1e-4


RELOAD_WITHOUT_THE_FIX = """
import sys
import numpy as np
import torch
from rlkit.data.models.loading import load_model
from rlkit.workers.rollout.engine import EngineSpec
from rlkit.workers.rollout.vllm_engine import VllmRolloutEngine
from rlkit.workers.weight_sync import Manifest, WeightPart, digest, pack

class Unfixed(VllmRolloutEngine):
    def _finish_reload(self):
        pass

folder = sys.argv[1]
engine = Unfixed(EngineSpec(kind="vllm", model_path=folder, dtype="float32", trust_remote_code=False, max_model_tokens=64,
                            max_num_seqs=4, kv_cache_mib=16))
before = engine.score([tuple(range(3, 40))])[0]
tensors = {name: pack(tensor) for name, tensor in load_model(folder, dtype=torch.float32).named_parameters()}
tensors["model.embed_tokens.weight"] = pack(torch.randn(96, 64, generator=torch.Generator().manual_seed(1)) * 0.2)
engine.receive(WeightPart(version=1, tensors=tensors))
engine.commit(Manifest(version=1, digests={name: digest(tensor) for name, tensor in tensors.items()}))
stale = engine.score([tuple(range(3, 40))])[0]
VllmRolloutEngine._finish_reload(engine)
fixed = engine.score([tuple(range(3, 40))])[0]
print("moved by the fix:", float(np.abs(fixed - stale).max()))
"""


@pytest.mark.slow
def test_the_tied_head_workaround_is_still_needed(random_model):
    """vLLM's own reload leaves a tied head's repacked copy stale on the CPU. When this fails, delete rlkit_finish_reload."""
    command = [sys.executable, "-c", RELOAD_WITHOUT_THE_FIX, random_model(tied=True)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.rsplit("moved by the fix:", 1)[1]) > 0.1


def synced_while_sampling(learner, handle, folder: str, requests: list[SampleRequest], sampling: SamplingSpec) -> list[Completion]:
    """The samples of an engine that is handed version 8 while they are under way; 7 was before."""
    begin(learner, folder)
    engine = OneEngine(handle)
    sync_weights(learner, engine, version=7, probes=PROBES, tolerance=TOLERANCES["float32"])
    done = handle.call("advance", requests, sampling).result(DEADLINE_S)
    for name in groups(learner):
        perturb(learner, name)
    sync_weights(learner, engine, version=8, probes=PROBES, tolerance=TOLERANCES["float32"])
    deadline = time.monotonic() + DEADLINE_S
    while len(done) < len(requests) and time.monotonic() < deadline:
        done += handle.call("advance", [], sampling).result(DEADLINE_S)
    assert {completion.sample_id for completion in done} == {request.sample_id for request in requests}
    for completion in done:
        assert completion.policy_version.tolist() == sorted(completion.policy_version)
        assert set(completion.policy_version) <= {7, 8}
    return done


def under_way(count: int) -> list[SampleRequest]:
    return [SampleRequest(sample_id=f"under way {i}", prompt_ids=(5, 6, 7 + i % 80), seed=i) for i in range(count)]


@pytest.mark.slow
def test_a_sync_between_two_tokens_is_seen_by_the_samples_under_way(learner, engine_of, random_model):
    """Every token carries the version that sampled it: those before the sync the old one, those after it the new one."""
    sampling = SamplingSpec(max_tokens=60, stop_token_ids=())
    done = synced_while_sampling(learner, engine_of("vllm", tied=True), random_model(tied=True), under_way(4), sampling)
    for completion in done:  # as long as the model makes it, and sixteen tokens of it before the sync
        assert completion.policy_version.tolist() == [7] * 16 + [8] * (len(completion.response_ids) - 16)
    assert any(len(completion.response_ids) > 16 for completion in done)


@pytest.mark.slow
def test_an_engine_that_samples_on_by_itself_is_synced_in_the_middle_of_responses(learner, engine_of, random_model):
    """More samples than it decodes at once, so that some are in their middle whenever the sync comes."""
    sampling = SamplingSpec(max_tokens=85, stop_token_ids=())
    handle, folder = engine_of("vllm_async", tied=True), random_model(tied=True)
    done = synced_while_sampling(learner, handle, folder, under_way(600), sampling)
    assert any(set(completion.policy_version) == {7, 8} for completion in done)
    completion = next(one for one in done if set(one.policy_version) == {7, 8})
    prompt = next(request.prompt_ids for request in under_way(600) if request.sample_id == completion.sample_id)
    (scores,) = learner.score([(*prompt, *completion.response_ids.tolist())])  # by the weights of version 8
    expected = scores[len(prompt) - 1 :]
    late = completion.policy_version == 8
    np.testing.assert_allclose(completion.rollout_logprobs[late], expected[late], atol=1e-4)


def shared_memory() -> set[str]:
    return {folder.name for folder in SHARED_MEMORY.glob(f"{PREFIX}*")}


@pytest.mark.slow
def test_two_tensor_parallel_workers_hold_the_learners_weights_refuse_torn_ones_and_end_with_their_engine(
    learner, random_model, ray_cluster, wait_until
):
    """What the actor checked was written by itself; a file may still be damaged on its way. Half a model must never sample."""
    folder = random_model(tied=True, num_key_value_heads=2)
    spec = EngineSpec(
        kind="vllm_async",
        model_path=folder,
        dtype="float32",
        trust_remote_code=False,
        max_model_tokens=64,
        max_num_seqs=8,
        kv_cache_mib=16,
        tensor_parallel_size=2,
    )
    target = f"{TearsFiles.__module__}:{TearsFiles.__qualname__}"
    handle = ray_cluster.worker(("torn", spec), "engine that tears", target, spec, seat=Seat(group="torn"))
    begin(learner, folder)
    for name in groups(learner):
        perturb(learner, name)
    engine = OneEngine(handle)
    report = sync_weights(learner, engine, version=0, probes=PROBES, tolerance=TOLERANCES["float32"])
    assert report.max_abs <= 1e-4
    processes = handle.call("processes").result(DEADLINE_S)
    assert len(processes) >= 3  # vLLM's engine and its two workers
    with pytest.raises(
        SyncError, match=r"^engine that tears: Weight sync 1 failed inside the engine, which cannot be used any more"
    ):
        sync_weights(learner, engine, version=1, probes=PROBES, tolerance=TOLERANCES["float32"])
    with pytest.raises(WorkerError, match="cannot be used any more"):
        handle.call("generate", under_way(1), SamplingSpec(max_tokens=4, stop_token_ids=())).result(DEADLINE_S)
    assert not shared_memory()
    # Whoever lost it has been stopped, and so have the processes below it.
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))


class TearsFiles(AsyncVllmRolloutEngine):
    """From version 1 on, one byte of every file is another than the one that was sent."""

    def receive(self, part: WeightPart) -> None:
        super().receive(part)
        if part.version >= 1:
            file, _ = self._parts[-1]
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)

    def processes(self) -> list[int]:
        """That this actor started, and those that they started."""
        parents = {
            int(file.parent.name): int(file.read_text().rpartition(")")[2].split()[1]) for file in Path("/proc").glob("[0-9]*/stat")
        }
        found = {os.getpid()}
        for _ in range(4):
            found |= {pid for pid, parent in parents.items() if parent in found}
        return sorted(found - {os.getpid()})


def shared_memory_segment(size: int) -> SharedMemory:
    """As vLLM makes them, but not removed with this process."""
    segment = SharedMemory(create=True, size=size)
    resource_tracker.unregister(segment._name, "shared_memory")  # pyright: ignore[reportAttributeAccessIssue]
    return segment


def test_weights_of_engines_that_were_killed_in_a_sync_are_swept_and_those_of_living_ones_are_not():
    dead = subprocess.Popen(["true"])
    dead.wait()
    orphan, own = SHARED_MEMORY / f"{PREFIX}{dead.pid}-1", SHARED_MEMORY / f"{PREFIX}{os.getpid()}-1"
    for folder in (orphan, own):
        folder.mkdir()
        (folder / "0-0.safetensors").write_bytes(b"weights")
    left, mapped = (shared_memory_segment(size=64) for _ in range(2))
    left.close()  # nobody maps it any more
    os.utime(SHARED_MEMORY / left.name, (0, 0))
    os.utime(SHARED_MEMORY / mapped.name, (0, 0))
    try:
        sweep_shared_memory()
        assert not orphan.exists()
        assert own.exists()
        assert not (SHARED_MEMORY / left.name).exists()
        assert (SHARED_MEMORY / mapped.name).exists()
    finally:
        shutil.rmtree(own)
        mapped.close()
        (SHARED_MEMORY / mapped.name).unlink()
