"""Weights for a vLLM in another process, by way of files in shared memory. Runs inside every vLLM worker.

Importing it makes the transfer known to vLLM; `ShmExtension` is the `worker_extension_cls` through which workers do so.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlkit.errors import SyncError
from rlkit.workers.rollout.vllm_async import OWNER
from rlkit.workers.rollout.vllm_extension import SyncExtension, repack_tied_head
from rlkit.workers.weight_sync import digest, pack

BACKEND = "rlkit_shm"


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on beforehand."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """Some whole layers of one version."""

    path: str  # of a safetensors file
    version: int
    digests: dict[str, str]  # name -> digest, of every tensor in it


class ShmTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Loads files that the engine's own actor wrote; a whole version between a start and a finish."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._receiving: int | None = None

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """See `ShmInitInfo`."""

    def start_weight_update(self) -> None:
        self._receiving = None
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        """Raises SyncError for a file of another version, or one whose bytes are not those that were sent."""
        version = update_info.version
        if self._receiving not in (None, version):
            raise SyncError(f"Weight sync {self._receiving}: a part of version {version} came in between.")
        self._receiving = version
        with safe_open(update_info.path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
        for name in update_info.digests.keys() | tensors.keys():
            if name not in tensors or digest(pack(tensors[name])) != update_info.digests.get(name):
                raise SyncError(f"Weight sync {version}: {name} in {update_info.path} is not what was written.")
        self.model.load_weights(tensors.items())  # pyright: ignore[reportCallIssue]  # vLLM's models have it

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model, self.device)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


class ShmExtension(SyncExtension):
    """`SyncExtension`, in a module whose import registers the transfer in the worker's process."""


def die_with(owner: int) -> None:
    """End this process when that one ends. vLLM's workers look at their parent, which may take its time to die itself."""
    try:
        descriptor = os.pidfd_open(owner)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return

    def watch() -> None:
        select.select([descriptor], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="dies with its owner", daemon=True).start()


WeightTransferEngineFactory.register_engine(BACKEND, ShmTransferEngine)
if (owner := int(os.environ.get(OWNER, os.getpid()))) != os.getpid():
    die_with(owner)
