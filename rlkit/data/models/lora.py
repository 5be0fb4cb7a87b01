"""Low-rank adapters on a frozen model, through PEFT: put in, merged into checkpoint tensors, saved in PEFT's own format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor, nn

from rlkit.data.models.loading import checkpoint_shapes
from rlkit.errors import ConfigError
from rlkit.settings import ALL_LINEAR, LoraLearner

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

NAME = "default"  # PEFT's, of the only adapter there is
BASE, DOWN, UP = ".base_layer.", f".lora_A.{NAME}.", f".lora_B.{NAME}."  # where PEFT keeps a layer's own weight, A and B
FOLDER = "adapter"  # of a checkpoint


@dataclass(frozen=True, slots=True)
class Adapter:
    """What it adds to a layer's weight [out, in]: scaling * up @ down."""

    down: Tensor  # [r, in], PEFT's A
    up: Tensor  # [out, r], PEFT's B; zero at the start, so that training begins with the model as it is
    scaling: float


def add_adapters(model: PreTrainedModel, settings: LoraLearner, seed: int) -> None:
    """Freeze `model` and put a float32 adapter into each layer that `settings` names: equal on every rank, by `seed`.

    In place, and the layers keep their classes' place: the decoder, its layers and the output head are found as before. The
    model must be on the CPU, where the adapters are drawn.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    targets = settings.target_modules
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # pyright: ignore[reportArgumentType]  # annotated int, and only ever divided
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds the devices' generators too
        inject_adapter_in_model(config, model, adapter_name=NAME)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # PEFT makes them as the layer is


def checkpoint_weights(model: nn.Module) -> dict[str, tuple[Tensor, Adapter | None]]:
    """Checkpoint name -> the parameter that it is read from and, where there is one, the adapter to be merged into it.

    In the model's order; works without adapters too. Parameters may be sharded: they are handed out as they are.
    """
    parameters = dict(model.named_parameters())
    weights: dict[str, tuple[Tensor, Adapter | None]] = {}
    for name, parameter in parameters.items():
        if DOWN in name or UP in name:
            continue
        adapter = None
        module, inside, kind = name.partition(BASE)
        if inside and kind == "weight":
            scaling = cast(dict[str, float], model.get_submodule(module).scaling)[NAME]  # the one that the forward pass takes
            adapter = Adapter(parameters[f"{module}{DOWN}weight"], parameters[f"{module}{UP}weight"], scaling)
        weights[name.replace(BASE, ".")] = parameter, adapter
    return weights


def merge(weight: Tensor, *, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """weight + scaling * up @ down in float32, whatever the frozen weight is kept in; rounded once, by whoever sends it."""
    return weight.float() + up.float() @ down.float() * scaling


def save_adapter(folder: Path, model: PreTrainedModel, adapters: Mapping[str, Tensor], base: str) -> None:
    """`adapters`: every trained parameter, whole, by its name in `model`. `PeftModel.from_pretrained` reads the folder.

    The order of names in its config is not left to Python's hashing: equal runs leave equal files.
    """
    folder.mkdir(exist_ok=True)
    config = copy(cast("LoraConfig", cast(dict, model.peft_config)[NAME]))
    config.target_modules = sorted(config.target_modules or ())  # pyright: ignore[reportAttributeAccessIssue]  # PEFT writes lists
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(folder))
    tensors = {f"base_model.model.{name.replace(f'.{NAME}.', '.')}": tensor for name, tensor in adapters.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def adapted_shapes(folder: str, settings: LoraLearner) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape [out, in] of every weight that gets an adapter, from the headers of the model's files.

    The embedding and the output head get none: rlkit applies the head itself, in chunks. Raises ConfigError for a target that
    no layer has, long before an engine starts.
    """
    inside = re.compile(r"\blayers\.\d+\.(?:\w+\.)*(\w+)\.weight$")
    found = {name: shape for name, shape in checkpoint_shapes(folder).items() if len(shape) == 2 and inside.search(name)}
    targets = settings.target_modules
    if targets == [ALL_LINEAR]:
        return found
    for target in targets:
        if not any(_is_named(name, target) for name in found):
            known = sorted({match.group(1) for name in found if (match := inside.search(name))})
            raise ConfigError(
                f"learner.target_modules: no linear layer of {folder} is called {target}. Write [{ALL_LINEAR}], or some of "
                f"[{','.join(known)}]."
            )
    return {name: shape for name, shape in found.items() if any(_is_named(name, target) for target in targets)}


def _is_named(name: str, target: str) -> bool:
    """As PEFT matches: the end of a module's name, in whole words."""
    return f".{name}".endswith(f".{target}.weight")


def num_adapter_parameters(folder: str, settings: LoraLearner) -> int:
    """That are trained: A [r, in] and B [out, r] of every adapted layer."""
    return sum(settings.lora_rank * sum(shape) for shape in adapted_shapes(folder, settings).values())


def base_digest(folder: str) -> str:
    """Of the model's files. A checkpoint of adapters is worth nothing on another base, and cannot tell by itself."""
    state = xxhash.xxh3_128()
    for file in sorted(Path(folder).glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                state.update(block)
    return state.hexdigest()
