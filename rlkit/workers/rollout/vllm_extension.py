"""Runs inside every vLLM worker (`worker_extension_cls`). Its names must not be those of vLLM's own worker methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def repack_tied_head(model: Any, device: torch.device) -> bool:
    """Rebuild the packed copy of a tied output head after a reload. Returns whether there was one to rebuild.

    vLLM 0.32's CPU layers keep a repacked copy of their weight. A reload repacks the layers it loads, but a tied head
    is not in the checkpoint, so its copy stays the old one and the engine goes on sampling from a stale head.
    tests/workers/rollout/test_weight_sync_engines.py tells when this is no longer needed.
    """
    tied = getattr(model.config, "tie_word_embeddings", False)
    head = getattr(model, "lm_head", None)
    if not tied or head is None or device.type != "cpu":
        return False
    head.quant_method.process_weights_after_loading(head)
    return True


class SyncExtension:
    """What a weight sync needs that vLLM does not offer."""

    def rlkit_finish_reload(self) -> bool:
        """See `repack_tied_head`."""
        # mixed into vLLM's worker
        return repack_tied_head(self.model_runner.get_model(), self.device)  # pyright: ignore[reportAttributeAccessIssue]

    def rlkit_start_capture(self) -> None:
        """Record the outputs of the embedding and of each decoder layer until `rlkit_stop_capture`."""
        model = self.model_runner.get_model().model  # pyright: ignore[reportAttributeAccessIssue]
        self._captured: dict[str, np.ndarray] = {}
        self._hooks = [model.embed_tokens.register_forward_hook(self._recorder("embed_tokens"))]
        for index, layer in enumerate(model.layers):
            self._hooks.append(layer.register_forward_hook(self._recorder(f"layers.{index}")))

    def rlkit_stop_capture(self) -> dict[str, tuple[list[int], bytes]]:
        """Shapes and bytes, which any engine's channel carries; `vllm_requests.layer_arrays` reads them."""
        for hook in self._hooks:
            hook.remove()
        return {name: (list(array.shape), array.tobytes()) for name, array in self._captured.items()}

    def _recorder(self, name: str):
        def record(module, inputs, output) -> None:
            # vLLM's decoder layers return the layer's output and the residual apart; their sum is what transformers returns.
            hidden = output[0] + output[1] if isinstance(output, tuple) else output
            self._captured[name] = hidden.detach().to(torch.float32).cpu().numpy()

        return record
