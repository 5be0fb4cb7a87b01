"""vLLM in this process: the engine that a Ray actor wraps.

The synchronous engine runs inside the actor itself (no process of its own), so that weights are loaded from shared memory
without serialising them, generation is deterministic, and nothing survives when the actor is killed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from rlkit.types import Completion, SampleRequest, SamplingSpec
from rlkit.workers.rollout import vllm_requests as ask
from rlkit.workers.rollout.engine import EngineSpec, checkpoint_names
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

        self.version = -1
        self._expected_names = checkpoint_names(spec.model_path)
        self._staged: dict[str, PackedTensor] = {}
        self._outputs: dict[str, RequestOutput] = {}  # finished, not yet asked for
        self._under_way: set[str] = set()  # samples that `advance` took
        self._loads = 0
        self._can_sleep = ask.can_sleep(spec)
        self._llm = LLM(**ask.engine_arguments(spec), worker_extension_cls="rlkit.workers.rollout.vllm_extension.SyncExtension")

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
        self._finish_reload()
        self._llm.reset_prefix_cache()
        self._loads += 1
        self.version = manifest.version
        self._llm.llm_engine.set_weight_version(str(manifest.version))

    def _finish_reload(self) -> None:
        self._llm.collective_rpc("rlkit_finish_reload")

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

    def wake(self, what: Literal["weights", "kv_cache"]) -> None:
        if self._can_sleep:
            self._llm.wake_up(tags=[what])
