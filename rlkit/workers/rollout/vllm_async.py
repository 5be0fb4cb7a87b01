"""vLLM in a process of its own (`AsyncLLM`), driven from a Ray actor.

It samples on between two calls and while the actor is busy, and its model may be spread over several workers. Weights reach it as
files in shared memory: only control messages fit through vLLM's own channel, and tensors in them would have to be pickled.
"""

from __future__ import annotations

import asyncio
import os
import queue
import shutil
import threading
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
from safetensors.torch import save_file

from rlkit.errors import EngineLostError, WorkerError
from rlkit.types import Completion, SampleRequest, SamplingSpec
from rlkit.workers.rollout import vllm_requests as ask
from rlkit.workers.rollout.engine import EngineSpec, expected_tensors
from rlkit.workers.weight_sync import Manifest, WeightPart, check_complete, digests, unpack

if TYPE_CHECKING:
    from vllm.inputs import TokensPrompt
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "rlkit-weights-"  # and the process id of whoever wrote the folder
YOUNG_S = 60.0
POLL_S = 0.2  # between looks at whether vLLM's process still lives
OWNER = "RLKIT_ENGINE_OWNER"  # in the environment of vLLM's workers: the process without which they have no purpose
ADVANCE_S = 0.2  # how long `advance` waits for the first finished sample
T = TypeVar("T")


class AsyncVllmRolloutEngine:
    """Implements `Engine`."""

    def __init__(self, spec: EngineSpec):
        workers = ask.worker_environment(spec)
        os.environ.update(ask.ENVIRONMENT | workers | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", OWNER: str(os.getpid())})
        self.version = -1
        self._expected_names = frozenset(expected_tensors(spec.model_path))
        self._parts: list[tuple[Path, dict[str, str]]] = []  # of the next version: file, digests of its tensors
        self._under_way: dict[str, asyncio.Task[None]] = {}  # samples that `advance` took
        self._done: queue.SimpleQueue[tuple[str, Completion | Exception]] = queue.SimpleQueue()
        self._loads = 0
        self._broken = ""
        self._can_sleep = ask.can_sleep(spec)
        sweep_shared_memory()
        self._folder = SHARED_MEMORY / f"{PREFIX}{os.getpid()}-{id(self):x}"
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="talks to vLLM", daemon=True).start()
        self._llm = self._run(self._start(spec))

    async def _start(self, spec: EngineSpec) -> AsyncLLM:
        """Inside the loop, where vLLM starts its own tasks."""
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from rlkit.workers.rollout.vllm_shm import BACKEND

        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                **ask.engine_arguments(spec),
                worker_extension_cls="rlkit.workers.rollout.vllm_shm.ShmExtension",
                weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            )
        )

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._broken:
            work.close()
            raise WorkerError(self._broken)
        outcome = asyncio.run_coroutine_threadsafe(work, self._loop)
        while True:
            try:
                return outcome.result(timeout=POLL_S)
            except TimeoutError:
                # vLLM fails the requests under way when its process dies, but not every other call.
                llm = getattr(self, "_llm", None)  # not there while it starts
                if llm is not None and llm.errored and not outcome.done():
                    outcome.cancel()
                    raise llm.dead_error from None

    # --- sampling -------------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> list[Completion]:
        async def all_of_them() -> list[Completion]:
            # Nothing is scheduled before all are there: what is decoded together would else depend on timing.
            await self._llm.pause_generation(mode="keep", clear_cache=False)
            queues = [
                await self._llm.add_request(each.sample_id, self._prompt(each.prompt_ids), ask.sampling_params(each, sampling))
                for each in requests
            ]
            await self._llm.resume_generation()
            outputs = [await last_output(outputs) for outputs in queues]
            return [ask.completion(each.sample_id, out, self.version) for each, out in zip(requests, outputs, strict=True)]

        return self._run(all_of_them())

    def advance(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> list[Completion]:
        async def take() -> None:
            for request in requests:
                self._under_way[request.sample_id] = asyncio.create_task(self._sample_in_background(request, sampling))

        self._run(take())
        found: list[tuple[str, Completion | Exception]] = []
        try:
            if self._under_way:
                found.append(self._done.get(timeout=ADVANCE_S))
            while True:
                found.append(self._done.get_nowait())
        except queue.Empty:
            pass
        completions = []
        for sample_id, outcome in found:
            self._under_way.pop(sample_id, None)
            if isinstance(outcome, Exception):
                raise outcome
            completions.append(outcome)
        return completions

    def abort(self) -> None:
        async def cancel() -> None:
            for task in self._under_way.values():
                task.cancel()
            await asyncio.gather(*self._under_way.values(), return_exceptions=True)

        self._run(cancel())
        self._under_way.clear()
        while not self._done.empty():
            self._done.get_nowait()

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        async def all_of_them() -> list[RequestOutput]:
            params = ask.scoring_params()
            return await asyncio.gather(*(self._answer(f"score/{i}", ids, params) for i, ids in enumerate(sequences)))

        return [ask.scores(sequence, output) for sequence, output in zip(sequences, self._run(all_of_them()), strict=True)]

    async def _sample_in_background(self, request: SampleRequest, sampling: SamplingSpec) -> None:
        try:
            self._done.put((request.sample_id, await self._sample(request, sampling)))
        except Exception as error:  # raised again by the next `advance`
            self._done.put((request.sample_id, error))

    async def _sample(self, request: SampleRequest, sampling: SamplingSpec) -> Completion:
        output = await self._answer(request.sample_id, request.prompt_ids, ask.sampling_params(request, sampling))
        return ask.completion(request.sample_id, output, self.version)

    async def _answer(self, name: str, token_ids: Sequence[int], params: Any) -> RequestOutput:
        """The last output of a request: the only one, as they are asked for."""
        outputs = [output async for output in self._llm.generate(self._prompt(token_ids), params, name)]
        return outputs[-1]  # vLLM ends a request with an output or an exception

    def _prompt(self, token_ids: Sequence[int]) -> TokensPrompt:
        return ask.tokens_prompt(token_ids, f"{self._loads}:{self.version}")

    # --- weights --------------------------------------------------------------------------------------------------------

    def receive(self, part: WeightPart) -> None:
        """By another name first, so that a torn file is never taken for a part."""
        self._folder.mkdir(exist_ok=True)
        file = self._folder / f"{part.version}-{len(self._parts)}.safetensors"
        unfinished = file.with_suffix(".part")
        save_file({name: unpack(packed) for name, packed in part.tensors.items()}, unfinished)
        unfinished.rename(file)
        self._parts.append((file, digests(part.tensors)))

    def commit(self, manifest: Manifest) -> None:
        parts, self._parts = self._parts, []
        try:
            received = {name: found for _, digests_of_part in parts for name, found in digests_of_part.items()}
            check_complete(manifest, received, self._expected_names)
            try:
                self._run(self._load(manifest.version, parts))
            except Exception as error:
                # vLLM leaves layers half built where an update fails: nothing may be sampled from this engine again.
                self._broken = f"Weight sync {manifest.version} failed inside the engine, which cannot be used any more: {error}"
                raise EngineLostError(self._broken) from error
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._loads += 1
        self.version = manifest.version

    async def _load(self, version: int, parts: Sequence[tuple[Path, dict[str, str]]]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        # Samples under way stay: their tokens are kept, and what the old weights computed for them is computed anew.
        await self._llm.pause_generation(mode="keep", clear_cache=True)
        await self._llm.start_weight_update()
        for file, found in parts:
            update = {"path": str(file), "version": version, "digests": found}
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update))
        await self._llm.finish_weight_update(weight_version=str(version))
        await self._llm.reset_prefix_cache()
        await self._llm.resume_generation()

    def layer_outputs(self, sequence: tuple[int, ...]) -> dict[str, np.ndarray]:
        self._run(self._llm.collective_rpc("rlkit_start_capture"))
        try:
            self.score([sequence])
        finally:
            captured = self._run(self._llm.collective_rpc("rlkit_stop_capture"))[0]
        return ask.layer_arrays(captured)

    # --- memory ---------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        if self._can_sleep:
            self._run(self._llm.sleep(level=1))

    def wake(self, what: Literal["weights", "kv_cache"]) -> None:
        if self._can_sleep:
            self._run(self._llm.wake_up(tags=[what]))


async def last_output(outputs: RequestOutputCollector) -> RequestOutput:
    while True:
        output = cast("RequestOutput", await outputs.get())
        if output.finished:
            return output


def sweep_shared_memory() -> None:
    """Remove what killed engines left: weights in the middle of a sync, and the segments through which vLLM's processes talk.

    A segment is left over when no process maps it; one that is being made just now is young.
    """
    for folder in SHARED_MEMORY.glob(f"{PREFIX}*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        if not Path("/proc", owner).exists():
            shutil.rmtree(folder, ignore_errors=True)  # it may be another user's
    mapped = mapped_files() if (segments := old_segments()) else set()
    for file in segments:
        if str(file) not in mapped:
            file.unlink(missing_ok=True)


def old_segments() -> list[Path]:
    """Shared memory of this user under the name that Python's multiprocessing gives it."""
    found = []
    for file in SHARED_MEMORY.glob("psm_*"):
        try:
            status = file.stat()
        except FileNotFoundError:  # removed while we looked
            continue
        if status.st_uid == os.getuid() and time.time() - status.st_mtime > YOUNG_S:
            found.append(file)
    return found


def mapped_files() -> set[str]:
    """Of all processes that we may look into, which are all of this user's."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            found |= {line.split()[-1] for line in maps.read_text().splitlines() if str(SHARED_MEMORY) in line}
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue
    return found
