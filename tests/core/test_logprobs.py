import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlkit.core.divergences import ReverseKL
from rlkit.core.logprobs import Crossing, Nucleus, chunk_size, token_statistics


class ForwardKL:
    """A stranger to rlkit: whatever has `between` can be computed in chunks."""

    def between(self, logprobs, ref_logprobs, embeddings):
        return (ref_logprobs.exp() * (ref_logprobs - logprobs)).sum(-1)


def statistics(**given: Any) -> Any:
    """token_statistics, with what may be None untyped: each test knows what it asked for."""
    return token_statistics(**given)


def draw(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(n=11, size=5, vocab=13, dtype=torch.float64):
    return {
        "hidden": draw(n, size, seed=1, dtype=dtype).requires_grad_(),
        "head": draw(vocab, size, seed=2, dtype=dtype).requires_grad_(),
        "head_bias": draw(vocab, seed=3, dtype=dtype).requires_grad_(),
        "targets": torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(4)),
        "ref_hidden": draw(n, size + 2, seed=5, dtype=dtype),  # a reference of another width
        "ref_head": draw(vocab, size + 2, seed=6, dtype=dtype),
    }


def by_full_softmax(*, hidden, head, head_bias, targets, ref_hidden, ref_head, temperature):
    """The same three quantities with every [n, V] tensor in plain sight."""
    logprobs = ((hidden @ head.T + head_bias) / temperature).log_softmax(-1)
    ref_logprobs = (ref_hidden @ ref_head.T / temperature).log_softmax(-1)
    entropy = torch.distributions.Categorical(logits=logprobs).entropy()
    divergence = (ref_logprobs.exp() * (ref_logprobs - logprobs)).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy, divergence


@pytest.mark.parametrize("chunk_tokens", [1, 2, 4, 11, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_equal_the_full_softmaxs_for_every_chunk_size(chunk_tokens, temperature):
    given = inputs()
    leaves = [given["hidden"], given["head"], given["head_bias"]]
    weights = draw(3, 11, seed=7)
    full = by_full_softmax(**given, temperature=temperature)
    chunked = statistics(**given, temperature=temperature, chunk_tokens=chunk_tokens, with_entropy=True, divergence=ForwardKL())
    for mine, theirs, weight in zip((chunked.logprobs, chunked.entropy, chunked.divergence), full, weights, strict=True):
        torch.testing.assert_close(mine, theirs)
        mine_grad = torch.autograd.grad((weight * mine).sum(), leaves, retain_graph=True)
        theirs_grad = torch.autograd.grad((weight * theirs).sum(), leaves, retain_graph=True)
        torch.testing.assert_close(mine_grad, theirs_grad)


@pytest.mark.parametrize("chunk_tokens", [3, 4, 100])
def test_one_backward_through_all_three_is_exact(chunk_tokens):
    given = inputs()
    leaves = [given["hidden"], given["head"], given["head_bias"]]
    weights = draw(3, 11, seed=8)
    stats = statistics(**given, temperature=0.9, chunk_tokens=chunk_tokens, with_entropy=True, divergence=ForwardKL())
    mine = (weights * torch.stack([stats.logprobs, stats.entropy, stats.divergence])).sum()
    theirs = (weights * torch.stack(by_full_softmax(**given, temperature=0.9))).sum()
    torch.testing.assert_close(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves))


@pytest.mark.parametrize("chunk_tokens", [2, 100])
def test_gradients_agree_with_finite_differences(chunk_tokens):
    given = inputs(n=5, size=3, vocab=4)
    leaves = {name: given.pop(name) for name in ("hidden", "head", "head_bias")}

    def all_three(*values):
        stats = statistics(
            **dict(zip(leaves, values, strict=True)),
            **given,
            temperature=0.8,
            chunk_tokens=chunk_tokens,
            with_entropy=True,
            divergence=ReverseKL(),
        )
        return stats.logprobs, stats.entropy, stats.divergence

    assert torch.autograd.gradcheck(all_three, tuple(leaves.values()))


def of_logits(logits, *, ref_logits=None, target=0, **settings):
    """Statistics of one position per row of `logits`: an identity head makes the hidden state the logits."""
    identity = torch.eye(logits.shape[-1], dtype=logits.dtype)
    ref = {} if ref_logits is None else {"ref_hidden": ref_logits, "ref_head": identity, "divergence": ReverseKL()}
    targets = torch.full(logits.shape[:1], target)
    return statistics(
        **{"hidden": logits, "head": identity, "targets": targets, "temperature": 1.0, "chunk_tokens": 4} | ref | settings
    )


def test_entropy_and_its_gradient_worked_out_for_three_tokens():
    probs = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    logits = probs.log().requires_grad_()
    entropy = of_logits(logits, with_entropy=True).entropy
    assert entropy.item() == pytest.approx(0.801819, abs=1e-6)
    (gradient,) = torch.autograd.grad(entropy, logits)  # -p (log p + H)
    torch.testing.assert_close(gradient, torch.tensor([[-0.311601, 0.161524, 0.150077]], dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_gradient_of_a_logprob_is_the_one_hot_target_less_the_probabilities():
    probs = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    logits = probs.log().requires_grad_()
    (gradient,) = torch.autograd.grad(of_logits(logits, target=1, temperature=1.0).logprobs, logits)
    torch.testing.assert_close(gradient, torch.tensor([[-0.7, 0.8, -0.1]], dtype=torch.float64))


def test_uniform_logits_have_the_largest_entropy_and_no_entropy_gradient():
    logits = torch.full((2, 8), 1.5, dtype=torch.float64, requires_grad=True)
    entropy = of_logits(logits, with_entropy=True).entropy
    torch.testing.assert_close(entropy, torch.full((2,), 8.0, dtype=torch.float64).log())
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(logits), rtol=0, atol=1e-12)


def test_exact_reverse_kl_and_its_gradient_worked_out_for_three_tokens():
    probs, ref = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64), torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    logits = probs.log().requires_grad_()
    divergence = of_logits(logits, ref_logits=ref.log()).divergence
    assert divergence.item() == pytest.approx(0.223805, abs=1e-6)
    (gradient,) = torch.autograd.grad(divergence, logits)
    # p (log u - KL) with log u = .916291, -.510826, -.405465
    torch.testing.assert_close(gradient, torch.tensor([[0.346243, -0.220389, -0.125854]], dtype=torch.float64), rtol=0, atol=1e-6)


def test_equal_models_are_at_distance_zero_with_zero_gradient():
    logits = draw(6, 5, seed=9).requires_grad_()
    divergence = of_logits(logits, ref_logits=logits.detach().clone()).divergence
    torch.testing.assert_close(divergence, torch.zeros_like(divergence), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(divergence.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_the_temperature_divides_the_logits_of_policy_and_reference_alike():
    logits, ref_logits = draw(3, 6, seed=10), draw(3, 6, seed=11)
    hot = of_logits(logits, ref_logits=ref_logits, with_entropy=True, temperature=2.5)
    scaled = of_logits(logits / 2.5, ref_logits=ref_logits / 2.5, with_entropy=True)
    torch.testing.assert_close((hot.logprobs, hot.entropy, hot.divergence), (scaled.logprobs, scaled.entropy, scaled.divergence))


@pytest.mark.parametrize("chunk_tokens", [2, 100])
def test_a_reference_that_shares_the_policys_head_gets_no_gradient(chunk_tokens):
    given = inputs()
    given |= {"ref_hidden": draw(11, 5, seed=12).requires_grad_()}
    gradients = []
    for ref_head in (given["head"], given["head"].detach().clone()):
        stats = statistics(**given | {"ref_head": ref_head}, temperature=1.0, chunk_tokens=chunk_tokens, divergence=ReverseKL())
        gradients.append(torch.autograd.grad(stats.divergence.sum(), given["head"], retain_graph=True)[0])
        (to_ref,) = torch.autograd.grad(stats.divergence.sum(), given["ref_hidden"], allow_unused=True)
        assert to_ref is None or to_ref.eq(0).all()
    torch.testing.assert_close(gradients[0], gradients[1])


def test_nothing_that_was_not_asked_for_is_computed():
    given = inputs()
    for name in ("ref_hidden", "ref_head"):
        given.pop(name)
    stats = statistics(**given, temperature=1.0, chunk_tokens=4)
    assert stats.entropy is None
    assert stats.divergence is None
    assert stats.expected_score is None
    assert stats.nucleus_entropy is None


@pytest.mark.parametrize("chunk_tokens", [4, 100])
def test_an_entropy_that_is_only_measured_is_the_same_number_without_a_gradient(chunk_tokens):
    given = inputs()
    settings = {"temperature": 0.9, "chunk_tokens": chunk_tokens, "with_entropy": True}
    measured, trained = (statistics(**given, **settings, divergence=None, entropy_gradient=wanted) for wanted in (False, True))
    torch.testing.assert_close((measured.logprobs, measured.entropy), (trained.logprobs, trained.entropy))
    assert not measured.entropy.requires_grad
    leaves = [given["hidden"], given["head"], given["head_bias"]]
    gradients = [torch.autograd.grad(stats.logprobs.sum(), leaves) for stats in (measured, trained)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_are_float32_and_the_softmax_is_taken_in_float32(dtype):
    given = {name: x.detach() for name, x in inputs(dtype=torch.float32).items()}
    hidden, head, targets = given["hidden"].to(dtype), given["head"].to(dtype), given["targets"]
    stats = statistics(hidden=hidden, head=head, targets=targets, temperature=0.7, chunk_tokens=4, with_entropy=True)
    logprobs = ((hidden @ head.T).double() / 0.7).log_softmax(-1)
    assert stats.logprobs.dtype == stats.entropy.dtype == torch.float32
    torch.testing.assert_close(stats.logprobs.double(), logprobs.gather(-1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.entropy.double(), -(logprobs.exp() * logprobs).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 4])
def test_no_tokens_give_empty_results_that_backward_accepts(chunk_tokens):
    given = inputs(n=0)
    asked = {"with_entropy": True, "with_expected_score": True, "nucleus": Nucleus(top_p=0.8, top_k=5), "divergence": ReverseKL()}
    stats = statistics(**given, temperature=1.0, chunk_tokens=chunk_tokens, **asked)
    assert stats.logprobs.shape == stats.entropy.shape == stats.divergence.shape == (0,)
    assert stats.expected_score.shape == stats.nucleus_entropy.shape == (0,)
    (stats.logprobs.sum() + stats.entropy.sum() + stats.divergence.sum() + stats.nucleus_entropy.sum()).backward()
    # On several ranks every one must take part in the head's gradient, the idle one with zeros.
    torch.testing.assert_close(given["head"].grad, torch.zeros_like(given["head"]))


def test_very_peaked_logits_give_finite_values_and_gradients():
    logits = torch.tensor([[1e4, 0.0, -1e4], [300.0, -300.0, 0.0]], requires_grad=True)
    stats = of_logits(logits, ref_logits=torch.zeros(2, 3), with_entropy=True)
    torch.testing.assert_close(stats.entropy, torch.zeros(2))
    torch.testing.assert_close(stats.divergence, torch.full((2,), 3.0).log())  # KL(a point || uniform)
    (gradient,) = torch.autograd.grad((stats.logprobs + stats.entropy + stats.divergence).sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros(2, 3))


def test_entropy_does_not_lose_its_digits_to_a_large_common_offset():
    # logsumexp(z) - sum(p z) subtracts two numbers of the offset's size: in float32 at 1e4 that leaves an error of 1e-3.
    logits = torch.tensor([[0.0, -1.0, -2.0, -3.0]])
    shifted = of_logits(logits + 10_000.0, with_entropy=True).entropy
    torch.testing.assert_close(shifted, of_logits(logits, with_entropy=True).entropy, rtol=0, atol=1e-5)


def test_the_expected_score_and_the_scores_worked_out_for_three_tokens():
    probs = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    logits = probs.log().expand(3, 3).clone().requires_grad_()
    stats = of_logits(logits, with_entropy=True, with_expected_score=True, target=0)
    torch.testing.assert_close(stats.expected_score, torch.full((3,), 0.170808, dtype=torch.float64), rtol=0, atol=1e-6)
    scores = probs * (probs.log() + stats.entropy[0])  # S_v
    torch.testing.assert_close(scores, torch.tensor([0.311601, -0.161524, -0.150077], dtype=torch.float64), rtol=0, atol=1e-6)
    assert (probs * (scores - stats.expected_score[0])).sum().item() == pytest.approx(0.0, abs=1e-12)
    assert not stats.expected_score.requires_grad


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("entropy", [{}, {"with_entropy": True}, {"with_entropy": True, "entropy_gradient": False}], ids=str)
def test_the_expected_score_is_the_mean_score_of_a_sampled_token_whatever_else_is_asked_for(chunk_tokens, entropy):
    given = inputs()
    asked = {"temperature": 0.7, "chunk_tokens": chunk_tokens, "divergence": ForwardKL(), "with_expected_score": True}
    stats = statistics(**given, **asked, **entropy)
    logprobs = ((given["hidden"] @ given["head"].T + given["head_bias"]) / 0.7).log_softmax(-1).detach()
    scores = logprobs.exp() * (logprobs - (logprobs.exp() * logprobs).sum(-1, keepdim=True))
    torch.testing.assert_close(stats.expected_score, (logprobs.exp() * scores).sum(-1))


def test_uniform_logits_score_nothing():
    stats = of_logits(torch.full((2, 8), 1.5, dtype=torch.float64), with_expected_score=True)
    torch.testing.assert_close(stats.expected_score, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


def nucleus_entropy(probs, *, top_k=10_000, **nucleus: Any):
    logits = torch.tensor([probs], dtype=torch.float64).log().requires_grad_()
    return logits, of_logits(logits, nucleus=Nucleus(top_k=top_k, **nucleus)).nucleus_entropy


@pytest.mark.parametrize(
    ("top_p", "crossing", "kept"),
    [
        (0.8, Crossing.included, 3),  # .5 + .25 < .8 <= .5 + .25 + .15
        (0.8, Crossing.excluded, 2),
        (0.45, Crossing.included, 1),
        (0.45, Crossing.excluded, 0),
        (1.0, Crossing.included, 4),
    ],
)
def test_the_nucleus_of_four_tokens_worked_out_by_hand(top_p, crossing, kept):
    expected = {4: 1.207974, 3: 0.980990, 2: 0.636514, 1: 0.0, 0: 0.0}[kept]
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):  # where the tokens are in the vocabulary does not matter
        probs = [[0.5, 0.25, 0.15, 0.1][index] for index in order]
        logits, entropy = nucleus_entropy(probs, top_p=top_p, crossing=crossing)
        assert entropy.item() == pytest.approx(expected, abs=1e-6)
        (gradient,) = torch.autograd.grad(entropy, logits)
        inside = torch.tensor([[index < kept for index in order]])
        # Only rounded to 0: what leaves through the normaliser cancels what the tokens inside get.
        assert gradient[~inside].abs().le(1e-15).all()
        assert gradient[inside].abs().ge(1e-3).any() == (kept > 1)


def test_the_nucleus_holds_at_most_top_k_tokens():
    _, entropy = nucleus_entropy([0.5, 0.25, 0.15, 0.1], top_p=0.99, top_k=2)
    assert entropy.item() == pytest.approx(0.636514, abs=1e-6)  # of (2/3, 1/3)


@pytest.mark.parametrize("chunk_tokens", [2, 100])
@pytest.mark.parametrize("crossing", list(Crossing), ids=lambda crossing: crossing.name)
def test_the_nucleus_entropys_gradient_agrees_with_finite_differences(chunk_tokens, crossing):
    given = inputs(n=5, size=3, vocab=6)
    leaves = {name: given.pop(name) for name in ("hidden", "head", "head_bias")}
    given = {"targets": given["targets"], "temperature": 0.8, "chunk_tokens": chunk_tokens}
    nucleus = Nucleus(top_p=0.9, top_k=5, crossing=crossing)

    def compute(*values):
        stats = statistics(**dict(zip(leaves, values, strict=True)), **given, nucleus=nucleus)
        return stats.logprobs, stats.nucleus_entropy

    assert compute(*leaves.values())[1].gt(0.1).sum() >= 2  # not all of one token
    assert torch.autograd.gradcheck(compute, tuple(leaves.values()))


def test_a_nucleus_of_everything_has_the_whole_distributions_entropy_and_gradient():
    logits = draw(4, 9, seed=13).requires_grad_()
    stats = of_logits(logits, with_entropy=True, nucleus=Nucleus(top_p=1.1, top_k=9))
    torch.testing.assert_close(stats.nucleus_entropy, stats.entropy)
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (stats.nucleus_entropy, stats.entropy)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("crossing", list(Crossing), ids=lambda crossing: crossing.name)
def test_very_peaked_logits_have_a_nucleus_without_entropy_or_gradient(crossing):
    logits = torch.tensor([[1e4, 0.0, -1e4], [300.0, -300.0, 0.0]], requires_grad=True)
    entropy = of_logits(logits, nucleus=Nucleus(top_p=0.8, top_k=3, crossing=crossing)).nucleus_entropy
    torch.testing.assert_close(entropy, torch.zeros(2))
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros(2, 3))


class AllocationMeter(TorchDispatchMode):
    """Bytes of the largest tensor made inside, and the most that was alive at once; backward counts too."""

    def __init__(self):
        super().__init__()
        self.largest = self.live = self.peak = 0
        self.known = set()

    def _forget(self, key, size):
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.live += size
                self.largest, self.peak = max(self.largest, size), max(self.peak, self.live)
                weakref.finalize(storage, self._forget, key, size)
        return out


VOCAB, SIZE, CHUNK = 512, 4, 16
MEASURED = [
    ["logprobs"],
    ["logprobs", "entropy"],
    ["logprobs", "entropy", "divergence"],
    ["logprobs", "expected_score", "nucleus_entropy"],
]


def measure(n, compute):
    given = inputs(n=n, size=SIZE, vocab=VOCAB, dtype=torch.float32)
    given = {k: given[k] for k in ("hidden", "head", "targets")} | {
        "ref_hidden": draw(n, SIZE).float(),
        "ref_head": draw(VOCAB, SIZE).float(),
    }
    with AllocationMeter() as meter:
        compute(**given).backward()
    return meter


def chunked(what):
    asks_entropy, asks_divergence = "entropy" in what, "divergence" in what
    nucleus = Nucleus(top_p=0.8, top_k=VOCAB // 16) if "nucleus_entropy" in what else None

    def compute(**given):
        if not asks_divergence:
            given = {name: given[name] for name in ("hidden", "head", "targets")}
        stats = statistics(
            **given,
            temperature=0.9,
            chunk_tokens=CHUNK,
            with_entropy=asks_entropy,
            with_expected_score="expected_score" in what,
            nucleus=nucleus,
            divergence=ReverseKL() if asks_divergence else None,
        )
        return sum(getattr(stats, name).sum() for name in what)

    return compute


def unchunked(*, hidden, head, targets, **_):
    return (hidden @ head.T).log_softmax(-1).gather(-1, targets[:, None]).sum()


@pytest.mark.parametrize("what", MEASURED, ids="+".join)
def test_memory_does_not_grow_with_tokens_times_vocabulary_in_forward_or_backward(what):
    few, many = 4 * CHUNK, 20 * CHUNK
    block, extra = 4 * CHUNK * VOCAB, many - few
    small, large = measure(few, chunked(what)), measure(many, chunked(what))
    assert large.largest <= block
    grown = (large.peak - small.peak) / extra  # bytes per further token
    assert grown <= 4 * 16 * SIZE  # a few hidden states' worth; one row of logits would be 4 * VOCAB = 2048
    plain = measure(many, unchunked)  # the meter does see what it is there to see
    assert plain.largest == 4 * many * VOCAB
    assert (plain.peak - measure(few, unchunked).peak) / extra >= 4 * VOCAB


@pytest.mark.parametrize(("vocab_size", "memory_bytes"), [(151_936, 2**30), (32_000, 10**9), (7, 1000), (12, 144)])
def test_a_chunk_is_the_largest_that_fits_its_memory(vocab_size, memory_bytes):
    chunk_tokens = chunk_size(vocab_size, memory_bytes=memory_bytes)
    assert type(chunk_tokens) is int
    assert chunk_tokens * vocab_size * 12 <= memory_bytes < (chunk_tokens + 1) * vocab_size * 12


def test_a_chunk_holds_at_least_one_token():
    assert chunk_size(151_936, memory_bytes=1) == 1
