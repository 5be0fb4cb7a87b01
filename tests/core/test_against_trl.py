"""The losses and gradients of TRL's GRPO trainer, computed by TRL's own code, against ours on the same tensors."""

import ast
import inspect
import math
import textwrap
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from rlkit.core.divergences import Divergence, Estimator, NoDivergence, ReverseKL
from rlkit.core.entropy import EntropyBonus, EntropyTerm, NoEntropy
from rlkit.core.logprobs import token_statistics
from rlkit.core.loss import Knobs, Strategy
from rlkit.core.objectives import CISPO, GSPO, ClippedSurrogate, Objective
from rlkit.core.ratios import Correction, IcePop, Level, MaskedIS, NoCorrection, TruncatedIS, Weights
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.core.selectors import NoSelector

ROWS, WIDTH, BUDGET = 6, 9, 12
AGGREGATIONS = {
    "grpo": Aggregation.seq_mean_token_mean,
    "bnpo": Aggregation.token_mean,
    "dapo": Aggregation.token_mean,
    "dr_grpo": Aggregation.const_norm,
    "cispo": Aggregation.token_mean,
}
every_loss_type = pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])  # of the clipped surrogate


@pytest.fixture(scope="module")
def trl():
    """TRL's trainer and its fused head. Its engine client would import vLLM, half a minute on one core, for nothing used here."""
    import_utils = pytest.importorskip("trl.import_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_utils, "is_vllm_available", lambda *args, **kwargs: False)
        from trl.trainer.grpo_trainer import GRPOTrainer
        from trl.trainer.utils import add_fused_lm_head
    return SimpleNamespace(trainer=GRPOTrainer, add_fused_lm_head=add_fused_lm_head)


def batch(seed, *, with_gap=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(scale, *shape):
        return scale * torch.randn(*(shape or (ROWS, WIDTH)), generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, WIDTH + 1, (ROWS, 1), generator=generator)
    lengths[0] = WIDTH
    mask = torch.arange(WIDTH) < lengths
    if with_gap:
        mask[0, 3:5] = False
    old_logprobs = -draw(1.0).abs() - 0.05
    return SimpleNamespace(
        response_mask=mask,
        old_logprobs=old_logprobs,
        logprobs=(old_logprobs + draw(0.35)).requires_grad_(),
        ref_logprobs=old_logprobs + draw(0.5),
        rollout_logprobs=old_logprobs + draw(0.4),
        advantages=draw(1.0, ROWS),
        entropy=draw(1.0).abs().requires_grad_(),
    )


def their_loss(
    trl,
    given,
    *,
    loss_type,
    rows=slice(None),
    num_items=None,
    steps=1,
    beta=0.0,
    weighted_kl=False,
    level="token",
    epsilon_low=0.2,
    epsilon_high=0.2,
    delta=None,
    weights=None,
    entropy_coef=0.0,
):
    """GRPOTrainer._compute_loss on rows of a batch, with a stand-in that holds the settings a trainer would have."""
    mask = given.response_mask[rows].long()
    alone = SimpleNamespace(num_processes=1, sync_gradients=True, reduce=lambda x, reduction: x, gather=lambda x: x)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (given.logprobs[rows], given.entropy[rows], None),
        args=SimpleNamespace(use_bias_correction_kl=weighted_kl, delta=delta, steps_per_generation=steps),
        accelerator=alone,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=steps,
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        max_completion_length=BUDGET,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=entropy_coef != 0.0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.int64),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": given.advantages[rows],
        "old_per_token_logps": given.old_logprobs[rows],
        "ref_per_token_logps": given.ref_logprobs[rows],
        "num_items_in_batch": torch.tensor(float(num_items or mask.sum())),
    }
    if weights is not None:
        inputs["importance_sampling_ratio"] = weights[rows]
    loss = trl.trainer._compute_loss(trainer, None, inputs)
    return loss, trainer._metrics["train"]


def strategy_of(
    loss_type,
    *,
    objective: Objective | None = None,
    correction: Correction | None = None,
    divergence: Divergence | None = None,
    entropy: EntropyTerm | None = None,
):
    return Strategy(
        objective=objective or ClippedSurrogate(),
        selector=NoSelector(),
        correction=correction or NoCorrection(),
        divergence=divergence or NoDivergence(),
        entropy=entropy or NoEntropy(),
        aggregation=AGGREGATIONS[loss_type],
    )


def our_loss(strategy, given, *, rows=slice(None), divergence_coef=None, entropy_coef=None):
    """One microbatch's share of the whole batch's loss; masked cells of every input are NaN, which TRL's could not be."""

    def rows_of(x):
        x = x[:, None].expand(ROWS, WIDTH) if x.dim() == 1 else x
        return x.masked_fill(~given.response_mask, float("nan"))[rows]

    step = strategy.terms(
        logprobs=rows_of(given.logprobs),
        old_logprobs=rows_of(given.old_logprobs),
        rollout_logprobs=rows_of(given.rollout_logprobs),
        advantages=rows_of(given.advantages),
        response_mask=given.response_mask[rows],
        ref_logprobs=None if divergence_coef is None else rows_of(given.ref_logprobs),
        entropy=None if entropy_coef is None else rows_of(given.entropy),
        knobs=Knobs(divergence_coef=divergence_coef, entropy_coef=entropy_coef),
    )
    denominators = Denominators.count(given.response_mask, max_response_tokens=BUDGET)
    shares = [t.coef * reduce(t.loss, t.mask, aggregation=t.aggregation, denominators=denominators) for t in step.terms]
    return torch.stack(shares).sum(), step


def assert_same(mine, theirs, leaves):
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) for loss in (mine, theirs)]
    for my_gradient, their_gradient in zip(*gradients, strict=True):
        assert their_gradient is not None
        assert their_gradient.ne(0).any()
        torch.testing.assert_close(my_gradient, their_gradient, rtol=0, atol=1e-12)


@every_loss_type
@pytest.mark.parametrize("with_gap", [False, True], ids=["", "tool output inside"])
@pytest.mark.parametrize("seed", range(3))
def test_the_clipped_loss_is_trls(trl, loss_type, with_gap, seed):
    given = batch(seed, with_gap=with_gap)
    theirs, metrics = their_loss(trl, given, loss_type=loss_type)
    mine, step = our_loss(strategy_of(loss_type), given)
    assert_same(mine, theirs, [given.logprobs])
    clip_fraction = (step.surrogate.clipped & given.response_mask).sum() / given.response_mask.sum()
    assert clip_fraction > 0.05  # enough tokens are clipped for the comparison to mean something
    assert clip_fraction.item() == pytest.approx(metrics["clip_ratio/region_mean"][0])


@every_loss_type
@pytest.mark.parametrize(
    ("weighted_kl", "estimator"), [(False, Estimator.k3), (True, Estimator.k3_weighted)], ids=["k3", "k3 times the ratio"]
)
def test_the_clipped_loss_with_trls_kl_term_is_trls(trl, loss_type, weighted_kl, estimator):
    given = batch(3)
    theirs, _ = their_loss(trl, given, loss_type=loss_type, beta=0.3, weighted_kl=weighted_kl)
    mine, _ = our_loss(strategy_of(loss_type, divergence=ReverseKL(estimator=estimator)), given, divergence_coef=0.3)
    assert_same(mine, theirs, [given.logprobs])
    without, _ = our_loss(strategy_of(loss_type), given)
    assert abs(mine.item() - without.item()) > 1e-3


@every_loss_type
def test_a_higher_upper_bound_and_the_dual_clip_are_trls(trl, loss_type):
    # TRL's delta caps the unclipped ratio: for delta > 1 + epsilon_high that is the dual clip with dual_clip = delta.
    given = batch(4)
    theirs, _ = their_loss(trl, given, loss_type=loss_type, epsilon_high=0.28, delta=1.4)
    mine, _ = our_loss(strategy_of(loss_type, objective=ClippedSurrogate(clip_high=0.28, dual_clip=1.4)), given)
    assert_same(mine, theirs, [given.logprobs])
    single, _ = our_loss(strategy_of(loss_type, objective=ClippedSurrogate(clip_high=0.28)), given)
    assert mine.item() != single.item()


class Given(Correction):
    """Weights computed elsewhere."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, *, old_logprobs, rollout_logprobs, response_mask):
        return Weights(weight=self.weight, keep=response_mask)


@every_loss_type
def test_weights_for_the_engines_mismatch_multiply_what_trls_multiply(trl, loss_type):
    # TRL multiplies the policy's loss, then adds the KL term: so do we.
    given = batch(5)
    weights = (given.old_logprobs - given.rollout_logprobs).exp().clamp(max=3.0).detach()
    theirs, _ = their_loss(trl, given, loss_type=loss_type, beta=0.2, weights=weights)
    strategy = strategy_of(loss_type, correction=Given(weights), divergence=ReverseKL(estimator=Estimator.k3))
    mine, _ = our_loss(strategy, given, divergence_coef=0.2)
    assert_same(mine, theirs, [given.logprobs])


def their_weights(trl, given, *, mode, floor, cap):
    """The importance weights of TRL's rollout step, by the very lines of its method: alone they need no model and no engine."""
    method = ast.parse(textwrap.dedent(inspect.getsource(trl.trainer._generate_and_score_completions)))
    (block,) = (
        node
        for node in ast.walk(method)
        if isinstance(node, ast.If) and any(ast.unparse(line).startswith("per_token_logps_diff =") for line in node.body)
    )
    trainer = SimpleNamespace(
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=floor,
        vllm_importance_sampling_clip_max=cap,
    )
    scope = {
        "self": trainer,
        "torch": torch,
        "math": math,
        "completion_mask": given.response_mask.long(),
        "tool_mask": None,
        "old_per_token_logps": given.old_logprobs,
        "sampling_per_token_logps": given.rollout_logprobs,
    }
    exec(compile(ast.Module([block], []), "trl", "exec"), scope)
    return scope["vllm_importance_sampling_ratio"]


CORRECTIONS = [
    ("token_truncate", TruncatedIS(cap=1.3)),
    ("token_truncate", TruncatedIS(floor=0.8, cap=1.3)),
    ("sequence_truncate", TruncatedIS(level=Level.sequence, cap=1.3)),
    ("sequence_mask", MaskedIS(cap=1.3)),
    ("sequence_mask", MaskedIS(floor=0.8, cap=3.0)),
    ("token_mask", MaskedIS(level=Level.token, cap=1.3)),
    ("token_mask", IcePop(floor=0.8, cap=1.3)),
]


@every_loss_type
@pytest.mark.parametrize(("mode", "correction"), CORRECTIONS, ids=[f"{mode} {c.floor} {c.cap}" for mode, c in CORRECTIONS])
def test_corrections_for_the_engines_mismatch_are_trls(trl, loss_type, mode, correction):
    given = batch(5, with_gap=True)
    given.rollout_logprobs[1, 0] = math.nan  # a token that the engine could not score
    weights = their_weights(trl, given, mode=mode, floor=correction.floor or None, cap=correction.cap)
    mine = correction(old_logprobs=given.old_logprobs, rollout_logprobs=given.rollout_logprobs, response_mask=given.response_mask)
    torch.testing.assert_close(mine.weight[given.response_mask], weights.expand(ROWS, WIDTH)[given.response_mask])
    assert (mine.below | mine.above).any()  # a bound acts on some
    assert not (mine.below | mine.above)[given.response_mask].all()  # and not on all

    theirs, _ = their_loss(trl, given, loss_type=loss_type, beta=0.2, weights=weights)
    strategy = strategy_of(loss_type, correction=correction, divergence=ReverseKL(estimator=Estimator.k3))
    assert_same(our_loss(strategy, given, divergence_coef=0.2)[0], theirs, [given.logprobs])


@pytest.mark.parametrize("bounds", [(0.02, 0.03), (3e-4, 4e-4)], ids=["some rows clipped", "the published bounds"])
@pytest.mark.parametrize("seed", range(3))
def test_gspo_is_trls(trl, bounds, seed):
    given, (low, high) = batch(seed, with_gap=True), bounds
    theirs, metrics = their_loss(trl, given, loss_type="grpo", level="sequence", epsilon_low=low, epsilon_high=high)
    mine, step = our_loss(strategy_of("grpo", objective=GSPO(clip_low=low, clip_high=high)), given)
    assert_same(mine, theirs, [given.logprobs])
    clipped_rows = step.surrogate.clipped.any(-1)
    assert clipped_rows.any()
    assert clipped_rows.double().mean().item() == pytest.approx(metrics["clip_ratio/region_mean"][0])


@pytest.mark.parametrize("mode", ["sequence_truncate", "sequence_mask"])
def test_gspo_with_a_correction_of_whole_responses_is_trls(trl, mode):
    given = batch(1)
    correction = (TruncatedIS if mode == "sequence_truncate" else MaskedIS)(level=Level.sequence, cap=1.3)
    weights = their_weights(trl, given, mode=mode, floor=None, cap=1.3)
    theirs, _ = their_loss(trl, given, loss_type="grpo", level="sequence", weights=weights)
    strategy = strategy_of("grpo", objective=GSPO(clip_low=0.2, clip_high=0.2), correction=correction)
    assert_same(our_loss(strategy, given)[0], theirs, [given.logprobs])


def test_gspo_with_a_correction_of_tokens_has_trls_value_and_gives_each_token_its_own_weight(trl):
    # TRL has one loss per row, and so each token gets its row's mean weight. Both gradients sum to the same over a row.
    given = batch(1)
    weights = their_weights(trl, given, mode="token_truncate", floor=None, cap=2.0)
    theirs, _ = their_loss(trl, given, loss_type="grpo", level="sequence", weights=weights)
    mine, _ = our_loss(strategy_of("grpo", objective=GSPO(clip_low=0.2, clip_high=0.2), correction=TruncatedIS()), given)
    torch.testing.assert_close(mine, theirs)
    my_gradient, their_gradient = (torch.autograd.grad(loss, given.logprobs)[0] for loss in (mine, theirs))
    mean_weight = (weights * given.response_mask).sum(-1, keepdim=True) / given.response_mask.sum(-1, keepdim=True)
    torch.testing.assert_close(my_gradient, their_gradient / mean_weight * weights)
    assert (my_gradient - their_gradient).abs().max() > 1e-3


@pytest.mark.parametrize("cap", [1.2, 5.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "with weights for the mismatch"])
def test_cispo_is_trls(trl, cap, weighted):
    # TRL's epsilon_high is the cap itself, not its distance from 1.
    given = batch(2, with_gap=True)
    weights = their_weights(trl, given, mode="token_truncate", floor=None, cap=2.0) if weighted else None
    theirs, _ = their_loss(trl, given, loss_type="cispo", epsilon_high=cap, beta=0.1, weights=weights)
    strategy = strategy_of(
        "cispo",
        objective=CISPO(clip_high=cap - 1),
        correction=TruncatedIS() if weighted else None,
        divergence=ReverseKL(estimator=Estimator.k3),
    )
    mine, step = our_loss(strategy, given, divergence_coef=0.1)
    assert_same(mine, theirs, [given.logprobs])
    assert step.surrogate.clipped[given.response_mask].any() == (cap < 5)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_with_entropy_bonus_and_kl_the_whole_loss_is_trls(trl, loss_type):
    # TRL always takes the token mean of the entropy, so only the token-mean losses have one aggregation for all terms.
    given = batch(6)
    theirs, _ = their_loss(trl, given, loss_type=loss_type, beta=0.1, entropy_coef=0.05)
    strategy = strategy_of(loss_type, divergence=ReverseKL(estimator=Estimator.k3), entropy=EntropyBonus())
    mine, _ = our_loss(strategy, given, divergence_coef=0.1, entropy_coef=0.05)
    assert_same(mine, theirs, [given.logprobs, given.entropy])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])  # bnpo averages microbatch means: the trap ours avoids
def test_accumulated_over_microbatches_the_gradients_are_trls(trl, loss_type):
    given = batch(7)
    parts, num_items = [slice(0, 2), slice(2, 4), slice(4, 6)], int(given.response_mask.sum())
    strategy = strategy_of(loss_type, divergence=ReverseKL(estimator=Estimator.k3))
    shares = [their_loss(trl, given, loss_type=loss_type, rows=rows, num_items=num_items, steps=3, beta=0.1)[0] for rows in parts]
    mine = [our_loss(strategy, given, rows=rows, divergence_coef=0.1)[0] for rows in parts]
    whole = torch.stack(mine).sum()
    assert_same(whole, torch.stack(shares).sum(), [given.logprobs])
    assert_same(whole, our_loss(strategy, given, divergence_coef=0.1)[0], [given.logprobs])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_from_hidden_states_to_parameters_the_gradient_is_trls(trl, temperature):
    # A whole model: TRL's forward, fused head and loss on one side; hidden states, token_statistics and terms on the other.
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config)
    given, num_prompt = batch(8), 3
    generator = torch.Generator().manual_seed(9)
    prompt_ids = torch.randint(50, (ROWS, num_prompt), generator=generator)
    response_ids = torch.randint(50, (ROWS, WIDTH), generator=generator)
    input_ids = torch.cat([prompt_ids, response_ids], 1)
    attention_mask = torch.cat([torch.ones_like(prompt_ids), given.response_mask.long()], 1)

    def forward():  # TRL's own, without its profiler
        trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext))
        method = trl.trainer._get_per_token_logps_and_entropies.__wrapped__
        return method(trainer, model, input_ids, attention_mask, WIDTH, compute_entropy=True)

    mask, mine_given = given.response_mask, SimpleNamespace(**vars(given))
    hidden = model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, num_prompt - 1 : -1]
    stats = token_statistics(
        hidden[mask], model.lm_head.weight, response_ids[mask], temperature=temperature, chunk_tokens=7, with_entropy=True
    )
    assert stats.entropy is not None
    mine_given.logprobs = torch.zeros(ROWS, WIDTH).masked_scatter(mask, stats.logprobs)
    mine_given.entropy = torch.zeros(ROWS, WIDTH).masked_scatter(mask, stats.entropy)
    trl.add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    given.logprobs, given.entropy, _ = forward()
    torch.testing.assert_close(mine_given.logprobs[mask], given.logprobs[mask])
    torch.testing.assert_close(mine_given.entropy[mask], given.entropy[mask])

    for name, scale in (("old_logprobs", 0.3), ("ref_logprobs", 0.2)):
        frozen = given.logprobs.detach() + scale * torch.randn(ROWS, WIDTH, generator=generator)
        setattr(given, name, frozen)
        setattr(mine_given, name, frozen)
    strategy = strategy_of("dapo", divergence=ReverseKL(estimator=Estimator.k3), entropy=EntropyBonus())
    mine, _ = our_loss(strategy, mine_given, divergence_coef=0.1, entropy_coef=0.02)
    theirs, _ = their_loss(trl, given, loss_type="dapo", beta=0.1, entropy_coef=0.02)

    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    parameters = list(model.parameters())
    my_gradients, their_gradients = (torch.autograd.grad(loss, parameters) for loss in (mine, theirs))
    largest = max(gradient.abs().max().item() for gradient in their_gradients)
    assert largest > 1e-3
    for my_gradient, their_gradient in zip(my_gradients, their_gradients, strict=True):
        torch.testing.assert_close(my_gradient, their_gradient, rtol=1e-4, atol=1e-5 * largest)  # float32, as TRL's head insists
