"""Adapters: where they are put, and that they begin as nothing, the same for one seed."""

from __future__ import annotations

import pytest
import torch

from rlkit.data.models.loading import load_model
from rlkit.data.models.lora import adapted_shapes, add_adapters, checkpoint_weights, num_adapter_parameters
from rlkit.errors import ConfigError
from rlkit.settings import LoraLearner
from rlkit.workers.rollout.engine import expected_tensors


def adapted(folder: str, settings: LoraLearner, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    model = load_model(folder, dtype=dtype)
    add_adapters(model, settings, seed)
    return model


def trained(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "mlp.down_proj"], ["layers.1.self_attn.v_proj"]])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_layers_that_are_adapted_are_known_from_the_models_files(random_model, tied, targets):
    """Names, and the count that a dry run shows; the output head is never among them."""
    folder, settings = random_model(tied=tied), LoraLearner(lora_rank=3, target_modules=targets)
    model = adapted(folder, settings)
    weights = checkpoint_weights(model)
    assert weights.keys() == expected_tensors(folder).keys()
    assert {name for name, (_, adapter) in weights.items() if adapter} == adapted_shapes(folder, settings).keys()
    assert num_adapter_parameters(folder, settings) == sum(parameter.numel() for parameter in trained(model).values())
    assert len(adapted_shapes(folder, settings)) == {1: 14, 2: 4}[len(targets)] if "layers" not in targets[0] else 1


def test_a_target_that_no_layer_has_is_refused_with_those_there_are(random_model):
    for target in ("qproj", "lm_head", "proj", "embed_tokens"):
        with pytest.raises(
            ConfigError, match=rf"no linear layer of .* is called {target}\. Write \[all-linear\], or some of \[down_"
        ):
            adapted_shapes(random_model(tied=False), LoraLearner(target_modules=["q_proj", target]))


def test_adapters_follow_from_the_seed_and_leave_the_global_generator_alone(random_model):
    folder, settings = random_model(tied=True), LoraLearner(lora_rank=4)
    state = torch.get_rng_state()
    first, again, other = (trained(adapted(folder, settings, seed=seed)) for seed in (5, 5, 6))
    assert torch.get_rng_state().equal(state)
    assert all(again[name].equal(tensor) for name, tensor in first.items())
    assert [name for name, tensor in first.items() if not other[name].equal(tensor)] == [
        name for name in first if ".lora_A." in name
    ]
    assert not any(tensor.any() for name, tensor in first.items() if ".lora_B." in name)


def test_a_bfloat16_model_stays_so_under_float32_adapters_and_starts_as_itself(random_model):
    model = adapted(random_model(tied=True), LoraLearner(), dtype=torch.bfloat16)
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    ids = torch.tensor([[5, 17, 40, 41, 8]])
    plain = load_model(random_model(tied=True), dtype=torch.bfloat16)
    with torch.no_grad():
        assert model(ids).logits.equal(plain(ids).logits)
