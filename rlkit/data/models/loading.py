"""Finds, loads and saves models in Hugging Face format."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from rlkit.errors import ConfigError, ResourceError
from rlkit.settings import Dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHIPPED = Path(__file__).parent  # built-in models that travel in the package


def cache_dir() -> Path:
    """Where converted and downloaded models are kept: $RLKIT_CACHE, or ~/.cache/rlkit."""
    return Path(os.environ.get("RLKIT_CACHE", Path.home() / ".cache" / "rlkit"))


def resolve(path: str, *, key: str = "model.path") -> str:
    """A model as a folder: a built-in model's name, a folder, or a hub id (downloaded, or found in the hub's cache).

    `key`: the setting that named it. Raises ConfigError or ResourceError with what to do instead.
    """
    if path == "tiny":
        return str(SHIPPED / "tiny")
    if path == "smollm2_135m":
        folder = cache_dir() / "models" / "smollm2_135m"
        if not (folder / "config.json").exists():
            raise ResourceError(f"{key}=smollm2_135m is not on this machine yet: run `rlkit model fetch smollm2_135m` once.")
        return str(folder)
    if (Path(path) / "config.json").exists():
        return str(Path(path).resolve())
    if path.count("/") != 1 or path.startswith((".", "/", "~")) or Path(path).exists():
        raise ConfigError(
            f"{key}={path}: no config.json there. Write a folder in Hugging Face format, a hub id such as "
            "Qwen/Qwen3-0.6B, tiny, or smollm2_135m."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ResourceError(
            f"{key}={path}: not a folder here, and the hub could not provide it ({type(error).__name__}). "
            "Check the name and the connection, or write a folder."
        ) from error


def load_model(folder: str, *, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model in `folder`, without gradients or dropout until asked."""
    from transformers import AutoModelForCausalLM  # takes seconds to import, and the controller holds no model

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=trust_remote_code, attn_implementation="sdpa"
    )
    if getattr(model.config, "final_logit_softcapping", None):
        raise ConfigError(f"model.path={folder}: its logits are soft-capped, which the chunked output head does not compute.")
    return model.eval()


def load_tokenizer(folder: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def checkpoint_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """Of every tensor of the checkpoint in `folder`, by name, from the headers of its files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118  no iterator
    return shapes


def checkpoint_tensors(folder: str, names: Iterable[str]) -> dict[str, Tensor]:
    """These tensors of the checkpoint in `folder`, and no others: a whole model need not fit beside one that runs."""
    tensors: dict[str, Tensor] = {}
    left = set(names)
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            here = left & set(handle.keys())
            tensors |= {name: handle.get_tensor(name) for name in here}
            left -= here
    if left:
        raise ConfigError(f"{folder}: its *.safetensors files lack {min(left)}. Save the whole model again.")
    return tensors


def num_parameters(folder: str) -> int:
    """Of the checkpoint in `folder`."""
    return sum(math.prod(shape) for shape in checkpoint_shapes(folder).values())


def context_length(folder: str, *, trust_remote_code: bool = False) -> int | None:
    """Positions that the model was built for, or None where its config does not say."""
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code), "max_position_embeddings", None)


def stop_token_ids(folder: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's own, and all that the model's generation_config names."""
    ids: set[int] = set()
    if isinstance(tokenizer.eos_token_id, int):
        ids.add(tokenizer.eos_token_id)
    file = Path(folder) / "generation_config.json"
    if file.exists():
        eos = json.loads(file.read_text()).get("eos_token_id")
        ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if not ids:
        raise ConfigError(f"model.path={folder}: no end-of-sequence token in its tokenizer or generation_config.json. Add one.")
    return tuple(sorted(ids))


def copy_tokenizer_files(source: str, target: Path) -> None:
    """Everything in a model folder but its weights, their index and its config: tokenizer, chat template, generation settings."""
    for file in Path(source).iterdir():
        is_weights = file.name.startswith("model") or file.suffix in {".safetensors", ".gguf", ".bin"}
        if file.is_file() and not is_weights and file.name != "config.json":
            shutil.copyfile(file, target / file.name)


def slow_arithmetic(dtype: Dtype) -> str | None:
    """What to say where this machine computes in `dtype` without instructions for it."""
    capability = torch.backends.cpu.get_cpu_capability()
    if dtype is not Dtype.bfloat16 or torch.cuda.is_available() or "AVX512" in capability:
        return None
    return (
        f"model.dtype=bfloat16: this processor ({capability}) has no bfloat16 arithmetic, and products of matrices are up to a "
        "hundred times slower than in float32. Write model.dtype=float32 unless memory forbids it."
    )
