"""vLLM in this process: the engine that a Ray actor wraps.

The synchronous engine runs inside the actor itself (no process of its own), so that weights are loaded from shared memory
without serialising them, generation is deterministic, and nothing survives when the actor is killed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from rlkit.errors import ResourceError
from rlkit.types import Completion, SampleRequest, SamplingSpec
from rlkit.workers.native_transfer import Announcement, Incoming, TensorInfo, check_device
from rlkit.workers.rollout import vllm_requests as ask
from rlkit.workers.rollout.engine import EngineSpec, expected_tensors
from rlkit.workers.weight_sync import Manifest, PackedTensor, WeightPart, check_complete, digests, unpack

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

STEPS_PER_ADVANCE = 16  # a weight sync waits at most for so many


class VllmRolloutEngine:
    """Implements `Engine`."""

    def __init__(self, spec: EngineSpec):
        os.environ.update(ask.ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
        if spec.tensor_parallel_size > 1:
            os.environ.update(ask.worker_environment(spec))
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        self.version = -1
        shapes = expected_tensors(spec.model_path)
        self._expected_names = frozenset(shapes)
        self._transport = spec.weight_transport
        self._incoming = Incoming({name: TensorInfo(dtype=spec.dtype, shape=shape) for name, shape in shapes.items()})
        self._asleep: set[str] = set()  # of what `wake` takes
        self._staged: dict[str, PackedTensor] = {}
        self._outputs: dict[str, RequestOutput] = {}  # finished, not yet asked for
        self._under_way: set[str] = set()  # samples that `advance` took
        self._loads = 0
        self._can_sleep = ask.can_sleep(spec)
        self._llm = LLM(
            **ask.engine_arguments(spec),
            weight_transfer_config=None if self._transport == "host" else WeightTransferConfig(backend=self._transport),
            worker_extension_cls="rlkit.workers.rollout.vllm_extension.SyncExtension",
        )

    def generate(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> list[Completion]:
        self._take(requests, sampling)
        outputs = self._finish([request.sample_id for request in requests])
        return [self._completion(request.sample_id, output) for request, output in zip(requests, outputs, strict=True)]

    def advance(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> list[Completion]:
        self._take(requests, sampling)
        self._under_way.update(request.sample_id for request in requests)
        for _ in range(STEPS_PER_ADVANCE):
            self._step()
            if not self._under_way.isdisjoint(self._outputs):
                break
        done = [sample_id for sample_id in self._outputs if sample_id in self._under_way]
        self._under_way.difference_update(done)
        return [self._completion(sample_id, self._outputs.pop(sample_id)) for sample_id in done]

    def abort(self) -> None:
        self._llm.llm_engine.abort_request(list(self._under_way))
        self._under_way.clear()
        self._outputs.clear()

    def _take(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> None:
        for request in requests:
            prompt = ask.tokens_prompt(request.prompt_ids, self._salt)
            self._llm.llm_engine.add_request(request.sample_id, prompt, ask.sampling_params(request, sampling))

    def _step(self) -> None:
        """One token for every request under way."""
        for output in self._llm.llm_engine.step():
            if output.finished:
                self._outputs[output.request_id] = cast("RequestOutput", output)

    def _finish(self, request_ids: Sequence[str]) -> list[RequestOutput]:
        """Step until these are done. Others that end meanwhile wait for the next `advance`."""
        while not all(request_id in self._outputs for request_id in request_ids):
            self._step()
        return [self._outputs.pop(request_id) for request_id in request_ids]

    @property
    def _salt(self) -> str:
        return f"{self._loads}:{self.version}"

    def _completion(self, sample_id: str, output: RequestOutput) -> Completion:
        return ask.completion(sample_id, output, self.version)

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        names = [f"score/{number}" for number in range(len(sequences))]
        for name, sequence in zip(names, sequences, strict=True):
            self._llm.llm_engine.add_request(name, ask.tokens_prompt(sequence, self._salt), ask.scoring_params())
        return [ask.scores(sequence, output) for sequence, output in zip(sequences, self._finish(names), strict=True)]

    def receive(self, part: WeightPart) -> None:
        self._staged.update(part.tensors)

    def commit(self, manifest: Manifest) -> None:
        staged, self._staged = self._staged, {}
        check_complete(manifest, digests(staged), self._expected_names)
        self._llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": ((name, unpack(packed)) for name, packed in staged.items())}
        )
        self._llm.llm_engine.set_weight_version(str(manifest.version))
        self._serve(manifest.version)

    def _serve(self, version: int) -> None:
        """The weights of this version are loaded."""
        self._finish_reload()
        self._llm.reset_prefix_cache()
        self._loads += 1
        self.version = version

    def _finish_reload(self) -> None:
        self._llm.collective_rpc("rlkit_finish_reload")

    # What a native transfer asks of it: `transfer_ranks` first, then the calls of `native_transfer.EngineClient`.

    def transfer_ranks(self) -> int:
        """Of this engine's processes, how many receive weights. Raises ResourceError where a native transport cannot work."""
        from vllm.platforms import current_platform
        from vllm.v1.engine.core_client import InprocClient

        check_device(self._transport, "the rollout engine", is_gpu=current_platform.is_cuda_alike())
        if self._transport == "ipc" and not isinstance(self._llm.llm_engine.engine_core, InprocClient):
            # The handles are Python objects, which vLLM would unpickle there only with VLLM_ALLOW_INSECURE_SERIALIZATION.
            raise ResourceError(
                "rollout.weight_transport=ipc: vLLM's core runs in a process of its own, to which it cannot hand the memory. "
                "Write rollout=vllm, or rollout.weight_transport=nccl or host."
            )
        return self._llm.llm_engine.vllm_config.parallel_config.world_size

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Meet a learner. The communicator with the learner of an earlier run goes first."""
        self._llm.shutdown_weight_transfer_engine()
        self._llm.init_weight_transfer_engine({"init_info": init_info})
        self._incoming.open()

    def start_weight_update(self, announcement: Announcement) -> None:
        self._incoming.start(announcement, is_asleep="weights" in self._asleep)
        self._llm.start_weight_update()

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        self._incoming.receive(update_info)
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, version: int) -> None:
        self._incoming.finish(version)
        self._llm.finish_weight_update(weight_version=str(version))
        self._serve(version)

    def layer_outputs(self, sequence: tuple[int, ...]) -> dict[str, np.ndarray]:
        self._llm.collective_rpc("rlkit_start_capture")
        try:
            self.score([sequence])
        finally:
            captured = self._llm.collective_rpc("rlkit_stop_capture")[0]
        return ask.layer_arrays(captured)

    def sleep(self) -> None:
        if self._can_sleep:
            self._llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}

    def wake(self, what: Literal["weights", "kv_cache"]) -> None:
        if self._can_sleep:
            self._llm.wake_up(tags=[what])
            self._asleep.discard(what)
