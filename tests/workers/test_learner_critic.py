"""The critic inside the learner: what its loss moves, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch

from rlkit.compose import compose
from rlkit.core.loss import Knobs
from rlkit.core.reduce import Denominators
from rlkit.core.values import Backbone
from rlkit.workers.learner import full_tensor

SETTINGS = [
    "advantage=gae",
    "critic=value_model",
    "critic.learning_rate=1e-2",
    "optimizer.learning_rate=1e-2",
    "max_response_tokens=16",
]


@pytest.fixture
def begin(learner, random_model):
    def start(*overrides: str):
        learner.begin(compose([f"model.path={random_model(tied=True)}", *SETTINGS, *overrides]))
        return learner

    return start


@pytest.fixture
def batch(make_batch):
    """With a return of 1 where the advantage is positive, and 0 elsewhere."""
    made = make_batch()
    fields = {name: getattr(made, name) for name in made.__slots__}
    return type(made)(**fields | {"returns": (made.advantages > 0).float(), "old_values": torch.zeros(made.advantages.shape)})


def step(learner, batch):
    counted = Denominators.count(batch.response_mask, max_response_tokens=16)
    denominators = dict.fromkeys(("policy", "divergence", "entropy", "value"), counted)
    return learner.update(batch, denominators=denominators, knobs=Knobs())


def weights(learner) -> dict[str, torch.Tensor]:
    return {name: full_tensor(parameter).clone() for name, parameter in learner._named_parameters()}


def moved(learner, batch, steps: int = 1) -> set[str]:
    """Names of the parameters that the steps changed."""
    before = weights(learner)
    for _ in range(steps):
        step(learner, batch)
    return {name for name, tensor in weights(learner).items() if not tensor.equal(before[name])}


@pytest.mark.parametrize("backbone", Backbone, ids=lambda backbone: backbone.name)
def test_values_approach_the_returns(begin, batch, backbone):
    learner = begin(f"critic.backbone={backbone.name}", "critic.value_clip=null", "optimizer.learning_rate=1e-6")
    mask = batch.response_mask
    assert learner.values(batch)["old_values"][mask].eq(0).all()
    assert learner.values(batch)["old_values"][~mask].eq(0).all()
    for _ in range(30):
        stats = step(learner, batch)
    error = (learner.values(batch)["old_values"] - batch.returns)[mask].square().mean()
    assert error < 0.5 * batch.returns[mask].square().mean()
    assert stats.metrics["critic/explained_variance"].value > 0.2


def test_a_critic_of_its_own_and_the_policy_do_not_move_each_other(begin, batch):
    """Without advantages the objective has no gradient, so whatever moves is moved by the value loss."""
    still = type(batch)(
        **{name: getattr(batch, name) for name in batch.__slots__} | {"advantages": torch.zeros(batch.advantages.shape)}
    )
    for backbone in ("own", "detached"):
        learner = begin(f"critic.backbone={backbone}", "optimizer=sgd")
        names = moved(learner, still, steps=2)  # a head that starts at 0 passes nothing on to its layers in the first
        assert names
        assert all(name.startswith("critic.") for name in names), backbone
    shared = moved(begin("critic.backbone=shared", "optimizer=sgd"), still, steps=2)
    assert any(not name.startswith("critic.") for name in shared)


def test_while_the_critic_warms_up_the_policy_stands_still(begin, batch):
    learner = begin("critic.warmup_steps=2")
    assert all(name.startswith("critic.") for name in moved(learner, batch))
    assert all(name.startswith("critic.") for name in moved(learner, batch))
    assert any(not name.startswith("critic.") for name in moved(learner, batch))


def test_the_engine_is_sent_the_policy_alone(begin, random_model):
    learner = begin("critic=double_softmin", "critic.backbone=own")
    names = {name for index in range(learner.num_parts()) for name in learner.export_part(index, 0).tensors}
    assert names == {name for name, _ in learner.policy.model.named_parameters()}


@pytest.mark.parametrize("critic", ["value_model", "double_softmin"])
@pytest.mark.parametrize("backbone", ["own", "detached"])
def test_a_restored_critic_goes_on_bit_for_bit(begin, batch, tmp_path, critic, backbone):
    overrides = [f"critic={critic}", f"critic.backbone={backbone}", "optimizer=adamw"]
    learner = begin(*overrides)
    step(learner, batch)
    learner.save(str(tmp_path))
    step(learner, batch)
    expected, values = weights(learner), learner.values(batch)
    learner = begin(*overrides)
    learner.restore(str(tmp_path))
    step(learner, batch)
    assert all(tensor.equal(expected[name]) for name, tensor in weights(learner).items())
    assert learner.values(batch)["old_values"].equal(values["old_values"])


def test_microbatches_leave_the_critics_step_unchanged(begin, batch):
    after = []
    for tokens in (8192, 32):
        learner = begin("optimizer=sgd", f"learner.tokens_per_microbatch={tokens}", "max_prompt_tokens=8", "learner.layout=padded")
        step(learner, batch)
        after.append(weights(learner))
    for name, tensor in after[0].items():
        torch.testing.assert_close(after[1][name], tensor, atol=1e-6, rtol=1e-4)
