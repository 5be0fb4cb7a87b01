"""The learner against plain transformers and autograd: what one optimiser step does to the weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule

from rlkit.compose import compose
from rlkit.controller.preparation import choose, filtered, narrow, weigh
from rlkit.controller.progress import Progress
from rlkit.core.loss import Knobs
from rlkit.core.reduce import Denominators
from rlkit.data.models.loading import load_model
from rlkit.errors import DataError, NumericalError
from rlkit.settings import AdamW, Schedule
from rlkit.workers.learner import Learner, full_tensor, learning_rate, local_tensor, move
from rlkit.workers.weight_sync import unpack

RATE = 0.5
SGD = ["optimizer=sgd", f"optimizer.learning_rate={RATE}", "optimizer.max_grad_norm=1e9", "max_response_tokens=16"]


@pytest.fixture
def begin(learner, random_model):
    def start(*overrides: str, tied: bool = True):
        learner.begin(compose([f"model.path={random_model(tied=tied)}", *SGD, *overrides]))
        return learner

    return start


def weights(learner) -> dict[str, torch.Tensor]:
    return {name: full_tensor(parameter).clone() for name, parameter in learner.policy.model.named_parameters()}


def step(learner, batch, **knobs):
    counted = Denominators.count(batch.response_mask, max_response_tokens=16)
    denominators = dict.fromkeys(("policy", "divergence", "entropy"), counted)
    return learner.update(batch, denominators=denominators, knobs=Knobs(**knobs))


def gradient_of_one_step(learner, batch, **coefs) -> dict[str, torch.Tensor]:
    before = weights(learner)
    assert not step(learner, batch, **coefs).skipped
    return {name: (before[name] - after) / RATE for name, after in weights(learner).items()}


def vocabulary_logprobs(model, batch, row: int) -> torch.Tensor:
    """[T, V] at the row's response positions, from one unpadded forward pass."""
    prompt, response = int(batch.prompt_lengths[row]), int(batch.response_lengths[row])
    ids = batch.input_ids[row : row + 1, : prompt + response]
    return model(ids).logits[0, prompt - 1 : prompt + response - 1].log_softmax(-1)


def response_ids(batch, row: int) -> torch.Tensor:
    prompt, response = int(batch.prompt_lengths[row]), int(batch.response_lengths[row])
    return batch.input_ids[row, prompt : prompt + response]


def assert_same(mine: dict[str, torch.Tensor], model) -> None:
    for name, parameter in model.named_parameters():
        error = (mine[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 2e-5, f"{name}: relative error {error:.2g}"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_step_is_the_policy_gradient_that_autograd_gives_on_unpadded_rows(begin, random_model, make_batch, tied):
    learner, batch = begin("aggregation=seq_mean_token_mean", tied=tied), make_batch()
    mine = gradient_of_one_step(learner, batch)
    model = load_model(random_model(tied=tied), dtype=torch.float32).requires_grad_(True)
    loss = torch.zeros(())
    for row in range(batch.num_rows):  # on-policy, so the surrogate's gradient is that of -A log pi
        logprobs = vocabulary_logprobs(model, batch, row).gather(1, response_ids(batch, row).unsqueeze(1))
        loss = loss - batch.advantages[row, 0] * logprobs.mean() / batch.num_rows
    loss.backward()
    assert_same(mine, model)


def test_the_exact_divergence_and_the_entropy_bonus_descend_what_they_say(begin, random_model, make_batch):
    """Over the whole vocabulary, from the reference's hidden states, against brute force on whole logits."""
    learner = begin("divergence=reverse_kl", "divergence.estimator=exact", "entropy=bonus", "aggregation=token_mean")
    batch = make_batch()
    reference = load_model(random_model(tied=False), dtype=torch.float32)  # another model than the policy
    hidden = torch.zeros(batch.num_rows, batch.response_mask.shape[1], 64)
    with torch.no_grad():
        for row in range(batch.num_rows):
            prompt, response = int(batch.prompt_lengths[row]), int(batch.response_lengths[row])
            states = reference.model(batch.input_ids[row : row + 1, : prompt + response]).last_hidden_state[0]
            hidden[row, :response] = states[prompt - 1 : -1]
    learner.set_reference_head(reference.lm_head.weight.detach().numpy())
    batch = replace(batch, ref_hidden=hidden, advantages=torch.zeros_like(batch.advantages))
    mine = gradient_of_one_step(learner, batch, divergence_coef=0.3, entropy_coef=0.2)

    model = load_model(random_model(tied=True), dtype=torch.float32).requires_grad_(True)
    loss = torch.zeros(())
    for row in range(batch.num_rows):
        policy = vocabulary_logprobs(model, batch, row)
        ref = vocabulary_logprobs(reference, batch, row).detach()
        loss = loss + 0.3 * (policy.exp() * (policy - ref)).sum() + 0.2 * (policy.exp() * policy).sum()
    (loss / batch.response_mask.sum()).backward()
    assert_same(mine, model)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "const_norm"])
def test_microbatches_and_head_chunks_leave_the_gradient_unchanged(begin, make_batch, aggregation):
    batch = make_batch(rows=9)
    whole = gradient_of_one_step(begin(f"aggregation={aggregation}", "entropy=bonus"), batch, entropy_coef=0.1)
    learner = begin(f"aggregation={aggregation}", "entropy=bonus", "learner.tokens_per_microbatch=600")
    learner.config.learner.tokens_per_microbatch = 20  # one row or two at a time
    learner.config.learner.head_memory_mib = 0  # one token at a time
    split = gradient_of_one_step(learner, batch, entropy_coef=0.1)
    for name, gradient in whole.items():
        assert (split[name] - gradient).norm() / gradient.norm() < 2e-5, name


WHOLE_STEP = {  # strategies that are asked about a whole optimiser step or batch of rollouts -> their settings
    "siren": ["entropy=siren"],
    "epo": ["entropy=epo"],
    "steer": ["token_weight=steer"],
    "high_entropy": ["token_weight=high_entropy"],
    "clip_v": ["token_filter=clip_v", "token_filter.mu=0.1", "token_filter.max_fraction=0.5"],
    "kl_cov": ["objective=unclipped", "selector=kl_cov", "selector.token_fraction=0.2"],
}


@pytest.mark.parametrize("name", WHOLE_STEP)
def test_what_looks_at_a_whole_step_does_not_depend_on_its_microbatches(begin, make_batch, name):
    """As the loop prepares a batch: measured, filtered, weighed and chosen from before the first microbatch."""

    def gradient(*overrides: str) -> dict[str, torch.Tensor]:
        learner = begin("aggregation=token_mean", *WHOLE_STEP[name], *overrides)
        config, batch = learner.config, make_batch(rows=9)
        batch = replace(batch, turns=torch.arange(9).unsqueeze(-1).expand(batch.response_mask.shape) % 2)
        batch = replace(batch, **learner.measure(batch))
        progress = Progress.start(config).having_seen(config, batch)
        batch, _ = filtered(config, batch, torch.zeros(9, dtype=torch.bool))
        batch, _ = weigh(config.token_weight, narrow(batch))
        batch, _ = choose(config.selector, batch, seed=3)
        assert batch.old_logprobs is not None
        batch = replace(batch, old_logprobs=batch.old_logprobs + 0.05)  # else a pull back to it has no direction
        if overrides:
            config.learner.tokens_per_microbatch = 20
        measured = config.entropy.measure(nucleus_entropy=batch.old_nucleus_entropy, response_mask=batch.response_mask)
        if measured is not None:
            measured += 0.2  # H~ away from its anchor, or there is nothing to pull
        return gradient_of_one_step(learner, batch, entropy_coef=0.3, entropy_state=progress.entropy, entropy_measured=measured)

    whole, split = gradient(), gradient("learner.layout=padded")
    assert all(gradient.norm() > 0 for gradient in whole.values())
    for parameter, each in whole.items():
        assert (split[parameter] - each).norm() / each.norm() < 5e-5, parameter


def test_activation_checkpointing_leaves_the_gradient_unchanged_and_keeps_less(begin, make_batch):
    """To the last bit: each layer runs again on the same inputs. What autograd holds at the end of a forward is counted."""
    batch = make_batch(rows=9)
    gradients, kept = [], []
    for setting in ("false", "true"):
        learner = begin(f"learner.activation_checkpointing={setting}")
        gradients.append(gradient_of_one_step(learner, batch))
        held = {}

        def note(tensor: torch.Tensor, held=held) -> torch.Tensor:
            held[tensor.data_ptr()] = tensor.numel()
            return tensor

        (_, part, layout), *_ = learner._microbatches(batch)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            learner._forward(part, layout, gradient=True)
        kept.append(sum(held.values()))
    assert kept[1] < 0.6 * kept[0]
    for name, gradient in gradients[0].items():
        assert gradients[1][name].equal(gradient), name


def test_one_rank_rounds_parameters_as_fsdp_does(begin, make_batch):
    """With checkpointed activations FSDP does it, without `Learner._run`."""
    batch = make_batch(rows=9)
    found = []
    for setting in ("false", "true"):
        learner = begin("model.dtype=bfloat16", f"learner.activation_checkpointing={setting}", "learner.tokens_per_microbatch=128")
        assert isinstance(learner.policy, FSDPModule) is (setting == "true")
        found.append(gradient_of_one_step(learner, batch))
        assert all(gradient.dtype == torch.float32 for gradient in found[-1].values())
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_a_step_that_is_not_finite_moves_nothing_and_three_in_a_row_stop_the_run(begin, make_batch):
    learner, batch = begin("optimizer=adamw", "optimizer.learning_rate=0.01"), make_batch()
    step(learner, batch)  # Adam has moments now
    before = weights(learner)
    moments = [full_tensor(state["exp_avg"]).clone() for state in learner.optimizer.state.values()]
    broken = replace(batch, advantages=torch.full_like(batch.advantages, float("nan")))
    for _ in range(2):
        stats = step(learner, broken)
        assert stats.skipped
        assert stats.metrics["policy/skipped_steps"].value == 1
    after = weights(learner)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for old, state in zip(moments, learner.optimizer.state.values(), strict=True):
        assert torch.equal(old, full_tensor(state["exp_avg"]))
    with pytest.raises(NumericalError, match="3 optimiser steps in a row"):
        step(learner, broken)


def test_a_step_without_a_token_moves_nothing_whatever_adam_remembers(begin, make_batch):
    learner, batch = begin("optimizer=adamw", "optimizer.learning_rate=0.01", "optimizer.weight_decay=0.1"), make_batch()
    step(learner, batch)  # Adam has moments now
    before = weights(learner)
    stats = step(learner, replace(batch, response_mask=torch.zeros_like(batch.response_mask)))
    assert stats.metrics["policy/empty_steps"].value == 1
    assert not stats.skipped
    after = weights(learner)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "policy/empty_steps" not in step(learner, batch).metrics


def test_a_critic_of_its_own_leaves_the_device_with_the_policy():
    """The meta device stands for a GPU."""
    learner = Learner.__new__(Learner)
    learner.device, learner.reference_head = torch.device("meta"), None
    learner.policy, learner.critic = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)  # pyright: ignore[reportAttributeAccessIssue]
    learner.optimizer = torch.optim.SGD(learner.policy.parameters(), lr=0.1)
    learner.onload()
    assert learner.critic is not None
    assert {parameter.device.type for module in (learner.policy, learner.critic) for parameter in module.parameters()} == {"meta"}


def test_a_good_step_between_bad_ones_starts_the_count_again(begin, make_batch):
    learner, batch = begin(), make_batch()
    broken = replace(batch, advantages=torch.full_like(batch.advantages, float("inf")))
    for _ in range(3):
        assert step(learner, broken).skipped
        assert step(learner, broken).skipped
        assert not step(learner, batch).skipped


def test_gradient_clipping_bounds_the_step(begin, make_batch):
    learner = begin("optimizer.max_grad_norm=0.001")
    moved = gradient_of_one_step(learner, make_batch())
    assert sum(float(g.square().sum()) for g in moved.values()) ** 0.5 == pytest.approx(0.001, rel=1e-3)


def test_bfloat16_computes_with_rounded_weights_and_steps_float32_masters(begin, make_batch):
    learner, batch = begin("model.dtype=bfloat16", "optimizer.learning_rate=1e-5"), make_batch()
    learner.score([(5, 6, 7)])  # leaves FSDP's gathered, rounded parameters behind unless they are put away
    before = weights(learner)
    assert any(not torch.equal(w, w.bfloat16().float()) for w in before.values())
    step(learner, batch)
    after = weights(learner)
    moved = [(after[name] - before[name]).abs().max() / before[name].abs().max() for name in before]
    assert all(0 < float(m) < 2**-9 for m in moved)  # smaller than bfloat16 can show on these weights, and not lost


def test_a_saved_policy_loads_in_transformers_with_the_same_logprobs(begin, make_batch, tmp_path):
    learner, batch = begin(), make_batch()
    step(learner, batch)
    learner.save(str(tmp_path))
    model = load_model(str(tmp_path), dtype=torch.float32)
    sequence = (5, 17, 40, 41, 8)
    with torch.no_grad():
        logprobs = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(sequence[1:]).unsqueeze(1)).squeeze(1)
    np.testing.assert_allclose(learner.score([sequence])[0], expected.numpy(), atol=1e-5)
    assert (tmp_path / "tokenizer.json").exists()


def test_logprobs_come_back_in_the_batchs_own_rows(begin, random_model, make_batch):
    learner, batch = begin(), make_batch(rows=7)
    values = learner.measure(batch)["old_logprobs"]
    model = load_model(random_model(tied=True), dtype=torch.float32)
    for row in range(batch.num_rows):
        with torch.no_grad():
            expected = vocabulary_logprobs(model, batch, row).gather(1, response_ids(batch, row).unsqueeze(1)).squeeze(1)
        np.testing.assert_allclose(values[row, : len(expected)], expected, atol=1e-5)
        assert not values[row, len(expected) :].any()


def test_the_learning_rate_warms_up_and_follows_its_schedule():
    settings = AdamW(learning_rate=1.0, warmup_steps=2, schedule=Schedule.linear, final_fraction=0.2)
    rates = [learning_rate(settings, update, 7) for update in range(7)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    settings = AdamW(learning_rate=1.0, schedule=Schedule.cosine)
    assert [learning_rate(settings, update, 5) for update in range(5)] == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)
    assert learning_rate(AdamW(learning_rate=3.0), 99, 5) == 3.0


def test_what_takes_turns_on_a_device_moves_weights_and_optimiser_state_whole(begin, make_batch):
    """To the meta device, the only other one that every machine has."""
    learner = begin("optimizer=adamw")
    step(learner, make_batch())
    move(learner.policy, learner.optimizer, torch.device("meta"))
    states = [value for state in learner.optimizer.state.values() for name, value in state.items() if name != "step"]
    assert states
    assert {tensor.device.type for tensor in [*learner.policy.parameters(), *learner.policy.buffers(), *states]} == {"meta"}


# --- adapters ---------------------------------------------------------------------------------------------------------

LORA = ["learner=lora", "learner.lora_rank=4", "learner.lora_alpha=6"]


def stir(learner) -> None:
    """Adapters that are no longer nothing: a fresh B is zero, and A has no gradient before it moves."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in learner.policy.parameters():
            if parameter.requires_grad:
                local_tensor(parameter).add_(0.1 * torch.randn(parameter.shape, generator=generator))


def exported(learner) -> dict[str, torch.Tensor]:
    parts = [learner.export_part(index, 0) for index in range(learner.num_parts())]
    return {name: unpack(packed) for part in parts for name, packed in part.tensors.items()}


def peft_model(folder: str, saved, *, trainable: bool = False):
    from peft import PeftModel

    base = load_model(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(saved / "adapter"), is_trainable=trainable)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_adapters_get_the_gradient_that_autograd_gives_a_peft_model_and_nothing_else_moves(
    begin, random_model, make_batch, tmp_path, tied
):
    learner, batch = begin(*LORA, "aggregation=seq_mean_token_mean", tied=tied), make_batch()
    stir(learner)
    learner.save(str(tmp_path))
    before = weights(learner)
    mine = gradient_of_one_step(learner, batch)
    model = peft_model(random_model(tied=tied), tmp_path, trainable=True)
    loss = torch.zeros(())
    for row in range(batch.num_rows):
        logprobs = vocabulary_logprobs(model, batch, row).gather(1, response_ids(batch, row).unsqueeze(1))
        loss = loss - batch.advantages[row, 0] * logprobs.mean() / batch.num_rows
    loss.backward()
    theirs = {name.removeprefix("base_model.model."): parameter.grad for name, parameter in model.named_parameters()}
    assert theirs.keys() == mine.keys()
    trained = {name: gradient for name, gradient in theirs.items() if gradient is not None}
    assert len(trained) == 2 * 7 * 2  # A and B of seven layers' weights, twice
    for name, gradient in trained.items():
        assert (mine[name] - gradient).norm() / gradient.norm() < 2e-5, name
    after = weights(learner)
    assert [name for name in after if not after[name].equal(before[name])] == list(trained)


def test_what_engines_and_the_checkpoint_get_is_what_peft_merges(begin, random_model, make_batch, tmp_path):
    learner = begin(*LORA, tied=False)
    stir(learner)
    learner.save(str(tmp_path))
    sent, frozen = exported(learner), dict(load_model(random_model(tied=False), dtype=torch.float32).named_parameters())
    model = peft_model(random_model(tied=False), tmp_path)
    ids = torch.tensor([[5, 17, 40, 41, 8]])
    with torch.no_grad():
        adapted, whole = model(ids).logits[0], load_model(str(tmp_path), dtype=torch.float32)(ids).logits[0]
    torch.testing.assert_close(whole, adapted, atol=1e-4, rtol=0)
    scores = whole.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
    np.testing.assert_allclose(learner.score([tuple(ids[0].tolist())])[0], scores, atol=1e-5)
    merged = dict(model.merge_and_unload().named_parameters())
    assert sent.keys() == merged.keys() == frozen.keys()
    for name, tensor in sent.items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=0, msg=name)
        assert tensor.equal(frozen[name]) == ("_proj" not in name), name


def test_bfloat16_keeps_the_frozen_model_so_and_loses_no_step_of_the_adapters(begin, make_batch):
    learner, batch = begin(*LORA, "model.dtype=bfloat16", "optimizer.learning_rate=1e-5"), make_batch()
    stir(learner)
    learner.score([(5, 6, 7)])
    before = weights(learner)
    step(learner, batch)
    for name, tensor in weights(learner).items():
        assert tensor.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
        assert tensor.equal(before[name]) == (".lora_" not in name), name
    frozen = {name: tensor for name, tensor in before.items() if ".base_layer." in name}
    sent = exported(learner)
    assert {tensor.dtype for tensor in sent.values()} == {torch.bfloat16}
    assert not any(sent[name.replace(".base_layer.", ".")].equal(tensor) for name, tensor in frozen.items())


def test_adapters_go_on_from_a_checkpoint_bit_for_bit_and_only_on_their_own_model(begin, random_model, make_batch, tmp_path):
    learner, batch = begin(*LORA, "optimizer=adamw", "optimizer.learning_rate=0.01"), make_batch()
    for _ in range(2):
        step(learner, batch)
    learner.save(str(tmp_path))
    with safe_open(tmp_path / "state" / "learner-0-of-1.safetensors", "pt") as file:
        assert {key.rpartition(".lora_")[1] for key in file.keys()} == {".lora_"}  # noqa: SIM118  nothing of the frozen model
    step(learner, batch)
    expected, state = weights(learner), {name: tensor.clone() for name, tensor in learner._state_tensors().items()}
    learner = begin(*LORA, "optimizer=adamw", "optimizer.learning_rate=0.01", "seed=9")  # other adapters, were they not restored
    learner.restore(str(tmp_path))
    step(learner, batch)
    assert all(tensor.equal(expected[name]) for name, tensor in weights(learner).items())
    assert learner._state_tensors().keys() == state.keys()
    assert all(local_tensor(tensor).equal(local_tensor(state[name])) for name, tensor in learner._state_tensors().items())
    with pytest.raises(DataError, match=r"its adapters were trained on other weights than model\.path="):
        begin(*LORA, "optimizer=adamw", tied=False).restore(str(tmp_path))
    with pytest.raises(DataError, match=r"holds .*\.mlp\..*, which this run does not train"):
        begin(*LORA, "optimizer=adamw", "learner.target_modules=[q_proj]").restore(str(tmp_path))
