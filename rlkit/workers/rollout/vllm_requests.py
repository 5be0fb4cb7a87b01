"""What every vLLM engine of rlkit asks of vLLM, and how it reads the answers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlkit.types import Completion, FinishReason, SampleRequest, SamplingSpec
from rlkit.workers.rollout.engine import EngineSpec

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.outputs import CompletionOutput, RequestOutput

# Read by vLLM when it is imported, so they are set before.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CONFIGURE_LOGGING": os.environ.get("VLLM_CONFIGURE_LOGGING", "1"),
}
UNSYNCED = "default"  # vLLM's own name for the weights that it loaded from disk
MIN_BATCHED_TOKENS = 8192  # of one engine step: with room for all of a step's short prompts, they are prefilled together


def can_sleep(spec: EngineSpec) -> bool:
    """The CPU build has nothing to give back."""
    from vllm.platforms import current_platform

    return spec.shares_device and current_platform.is_cuda_alike()


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """Of `LLM` and of `AsyncEngineArgs` alike."""
    return {
        "model": spec.model_path,
        "dtype": spec.dtype,
        "trust_remote_code": spec.trust_remote_code,
        "skip_tokenizer_init": True,
        "max_model_len": spec.max_model_tokens,
        "max_num_seqs": spec.max_num_seqs,
        # A seeded request whose prompt is split over two scheduler steps crashes the CPU sampler of vLLM 0.32, so
        # prompts are never split, and a step has room for any of them.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(MIN_BATCHED_TOKENS, spec.max_model_tokens),
        "kv_cache_memory_bytes": spec.kv_cache_mib << 20,
        "block_size": 32,  # the default of 128 would never share a prompt shorter than that
        "enforce_eager": spec.enforce_eager,
        "enable_sleep_mode": can_sleep(spec),
        "generation_config": "vllm",  # the model's own file must not change how training samples
        "logprobs_mode": "processed_logprobs",  # after temperature: what the learner computes too
        "seed": 0,
        "tensor_parallel_size": spec.tensor_parallel_size,
        "distributed_executor_backend": executor(spec),
    }


def executor(spec: EngineSpec) -> str:
    """How vLLM runs its workers. Said outright: inside a placement group it would take Ray even for processes on one CPU."""
    from vllm.platforms import current_platform

    if spec.tensor_parallel_size == 1:
        return "uni"
    return "ray" if current_platform.is_cuda_alike() else "mp"


def worker_environment(spec: EngineSpec) -> dict[str, str]:
    """What vLLM reads where its workers are processes of their own: their cores, or their bundles of the placement group."""
    size = spec.tensor_parallel_size
    cores = sorted(os.sched_getaffinity(0))
    bounds = [round(part * len(cores) / size) for part in range(size + 1)]
    shares = [cores[low:high] or [cores[low % len(cores)]] for low, high in itertools.pairwise(bounds)]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, share)) for share in shares),
        "VLLM_RAY_BUNDLE_INDICES": ",".join(map(str, range(size))),
        "VLLM_RAY_PER_WORKER_GPUS": str(spec.device_share),
    }


def sampling_params(request: SampleRequest, sampling: SamplingSpec) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_tokens if request.max_tokens is None else request.max_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        seed=request.seed,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def scoring_params() -> SamplingParams:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)


def tokens_prompt(token_ids: Sequence[int], salt: str) -> TokensPrompt:
    """The salt keeps blocks that older weights computed from being shared, even if a reset of the cache is refused."""
    return {"prompt_token_ids": list(token_ids), "cache_salt": salt}


def completion(sample_id: str, request_output: RequestOutput, version: int) -> Completion:
    """`version`: of tokens that vLLM does not label, since it labels none before the first sync."""
    (output,) = request_output.outputs
    assert output.logprobs is not None  # asked for with logprobs=0
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True) if step]
    return Completion(
        sample_id=sample_id,
        response_ids=np.asarray(output.token_ids, dtype=np.int64),
        rollout_logprobs=np.asarray(logprobs, dtype=np.float32),
        policy_version=_versions(output, version),
        finish_reason=FinishReason(output.finish_reason),
    )


def _versions(output: CompletionOutput, version: int) -> np.ndarray:
    """[T] int64: a response that a sync overtook has tokens of several versions."""
    versions = np.full(len(output.token_ids), version, dtype=np.int64)
    for span in output.weight_versions or ():
        if span.version != UNSYNCED:
            versions[span.start : span.end] = int(span.version)
    return versions


def scores(sequence: Sequence[int], output: RequestOutput) -> np.ndarray:
    """[len - 1] float32, of a request with `scoring_params`."""
    assert output.prompt_logprobs is not None  # asked for with prompt_logprobs=0
    found = [position[token].logprob for position, token in zip(output.prompt_logprobs[1:], sequence[1:], strict=True) if position]
    return np.asarray(found, dtype=np.float32)


def layer_arrays(captured: Mapping[str, tuple[Sequence[int], bytes]]) -> dict[str, np.ndarray]:
    """What `SyncExtension.rlkit_stop_capture` returned."""
    return {name: np.frombuffer(data, dtype=np.float32).reshape(shape) for name, (shape, data) in captured.items()}
