"""The learner's end of vLLM's native weight transfer. It imports vLLM, so the learner imports it only where a run asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_ip, get_open_port

from rlkit.errors import WorkerError
from rlkit.workers.handle import Handle, Rank
from rlkit.workers.native_transfer import GRACE_S, Announcement, EngineClient, Tell, TensorInfo, gathering, late, on_a_thread

PACKED_BYTES = 256 << 20  # tensors travel in buffers of this size: one on each side for ipc, two for nccl


class PolicySource(WeightSource):
    """The policy's parameters as vLLM reads them: in the engine's dtype, by layers, each whole only while it is on its way.

    Iterating is collective where the policy is sharded. One tensor is gathered at a time, and not a layer ahead: nccl packs on
    several streams by turns, and a tensor made on one and read on another would need both to know of it.
    """

    def __init__(self, groups: Sequence[Sequence[str]], parameters: Callable[[], Mapping[str, Tensor]], dtype: torch.dtype):
        """`groups`: names by layer. `parameters` is asked anew for every pass, since they may have been moved meanwhile."""
        self._names = [name for group in groups for name in group]
        self._parameters, self._dtype = parameters, dtype
        self.gathering = ""  # the tensor for which this rank waits for the others

    def metadata(self) -> list[ParamMeta]:
        parameters = self._parameters()
        return [ParamMeta(name, self._dtype, tuple(parameters[name].shape)) for name in self._names]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        parameters = self._parameters()
        for name in self._names:
            self.gathering = name
            cast = parameters[name].detach().to(self._dtype)  # before it is gathered: half the bytes in bfloat16
            whole = cast.full_tensor() if isinstance(cast, DTensor) else cast
            if whole.is_cuda:
                # The gather is only queued so far, and would be waited for inside the broadcast, where it cannot be told from
                # an engine that does not take part.
                torch.cuda.current_stream().synchronize()
            self.gathering = ""
            yield name, whole

    def announcement(self, version: int) -> Announcement:
        infos = {meta.name: TensorInfo(dtype=str(meta.dtype).removeprefix("torch."), shape=meta.shape) for meta in self.metadata()}
        return Announcement(version=version, tensors=infos)

    def packed_bytes(self) -> int:
        """Size of a buffer; ipc refuses a tensor that does not fit into one, as a large embedding may not."""
        return max(PACKED_BYTES, *(math.prod(meta.shape) * meta.dtype.itemsize for meta in self.metadata()))


def init_info(kind: str, rank: Rank, *, num_receivers: int, packed_bytes: int) -> TrainerInitInfo:
    """What vLLM builds this rank's end from."""
    match kind:
        case "nccl":
            return NCCLTrainerInitInfo(
                rank=rank.index,
                master_address=get_ip(),  # rank 0 opens the store in which all meet; the other ranks do not read it
                master_port=get_open_port(),
                world_size=1 + num_receivers,
                packed=True,
                packed_buffer_size_bytes=packed_bytes,
            )
        case "ipc":
            return IPCTrainerInitInfo(rank=rank.index, packed=True, packed_buffer_size_bytes=packed_bytes)
    raise AssertionError(f"WeightTransport.{kind} has no vLLM back end")


class Sender:
    """One learner rank's end. All ranks build it and send together; rank 0 drives the engines."""

    def __init__(
        self,
        kind: str,
        source: PolicySource,
        rank: Rank,
        device: torch.device,
        *,
        engines: Sequence[Handle],
        ranks: Sequence[int],
        deadline_s: float,
    ):
        """Meets the engines, of which each receives with so many `ranks`. Raises WorkerError past the deadline."""
        self._source, self._rank, self._device, self._deadline_s = source, rank, device, deadline_s
        self._client = EngineClient(engines, ranks, deadline_s=deadline_s, waits_for=lambda: source.gathering)
        info = init_info(kind, rank, num_receivers=sum(ranks), packed_bytes=source.packed_bytes())

        def meet(tell: Tell) -> TrainerWeightTransferEngine:
            self._client.begin(tell)
            return WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=source)

        self._trainer: TrainerWeightTransferEngine = self._run(meet, what="meeting the engines")

    def send(self, version: int) -> None:
        """Every engine serves the present weights as `version` afterwards. Raises WorkerError, SyncError among them."""

        def send(tell: Tell) -> None:
            self._client.begin(tell, self._source.announcement(version))
            self._trainer.send_weights()

        self._run(send, what=f"sending version {version}")

    def close(self) -> None:
        self._trainer.shutdown()

    def _run(self, action: Callable[[Tell], Any], *, what: str) -> Any:
        def on_device(tell: Tell) -> Any:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a thread begins on the first
            return action(tell)

        def at_the_end() -> WorkerError:
            name = self._source.gathering
            return late(self._rank.index, gathering(name) if name else what, self._deadline_s)

        return on_a_thread(on_device, deadline_s=self._deadline_s + GRACE_S, at_the_end=at_the_end)
