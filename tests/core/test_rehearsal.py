import pytest
import torch

from rlkit.core.reduce import Aggregation
from rlkit.core.rehearsal import BaseAnswers, Mode, NoRehearsal
from rlkit.errors import ConfigError


@pytest.mark.parametrize(
    ("mode", "up", "down"),  # at log-ratios of +.2 and -.2, worked out by hand
    [(Mode.forward_kl, 0.021403, 0.018731), (Mode.jensen_shannon, 0.011052, 0.009048), (Mode.alpha, 0.022571, 0.017755)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_a_stored_token_costs(mode, up, down):
    stored = torch.tensor([[-1.0, -1.0, -1.0, float("nan")]], dtype=torch.float64)
    logprobs = (stored + torch.tensor([[0.2, -0.2, 0.0, 1.0]], dtype=torch.float64)).requires_grad_()
    mask = torch.tensor([[True, True, True, False]])
    term = BaseAnswers(mode=mode).term(logprobs=logprobs, stored_logprobs=stored, mask=mask)
    torch.testing.assert_close(term.loss.detach(), torch.tensor([[up, down, 0.0, 0.0]], dtype=torch.float64), rtol=0, atol=1e-6)
    assert (term.coef, term.aggregation) == (0.01, Aggregation.token_mean)
    (gradient,) = torch.autograd.grad(term.loss.sum(), logprobs)
    assert gradient[0, 2:].eq(0).all()  # a policy that has not moved is not moved, token by token
    assert gradient[0, 0] > 0 > gradient[0, 1]


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.name)
def test_under_the_base_models_samples_value_and_gradient_are_the_divergences(mode):
    base = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    logprobs = logits.log_softmax(-1)
    settings = BaseAnswers(mode=mode)
    mask = torch.ones(3, 1, dtype=torch.bool)
    loss = settings.term(logprobs=logprobs[:, None], stored_logprobs=base.log()[:, None], mask=mask).loss
    found = (base[:, None] * loss).sum()
    exact = settings.divergence.exact(logprobs[None], base.log()[None]).sum()
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits, retain_graph=True)[0], torch.autograd.grad(exact, logits)[0], rtol=1e-9, atol=1e-12
    )


def test_settings_that_make_no_sense_are_refused():
    for make, words in (
        (lambda: BaseAnswers(coef=0.0), "rehearsal=none"),
        (lambda: BaseAnswers(alpha=0.3), "rehearsal.mode=forward_kl never reads it"),
        (lambda: BaseAnswers(mode=Mode.alpha, alpha=1.0), "rehearsal.alpha=1.0"),
        (lambda: BaseAnswers(rows_per_step=0), "rows_per_step=0"),
    ):
        with pytest.raises(ConfigError, match=words):
            make()


def test_off_is_never_asked():
    with pytest.raises(AssertionError):
        NoRehearsal().term(logprobs=torch.zeros(1, 1), stored_logprobs=torch.zeros(1, 1), mask=torch.ones(1, 1, dtype=torch.bool))
