"""The loss against an independent computation: the released procedure in posterior-mean space, in float64."""

import math

import pytest
import torch

from comfy_sude import sude

BETAS = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2  # SD's schedule ("scaled linear")
AB = torch.cumprod(1 - BETAS, 0)

# t -> lambda(t), computed with numpy in float64 from the released code's buffers
TABLE = {
    1: 1.0024,
    10: 0.5538,
    50: 0.5240,
    100: 0.5352,
    200: 0.5800,
    400: 0.7709,
    600: 1.2521,
    800: 2.6162,
    999: 7.3689,
}
LAMBDA_AT_ZERO = 850.7231


def released(a, c, u, x_t, t):
    """(loss before the gate, gate) of one sample as the paper states it: Gaussian posteriors of x_{t-1}, Eq. 5-9.

    Everything is float64 and in terms of posterior means and variances; nothing here knows the closed form.
    """
    ab, ab_prev, beta = AB[t], AB[t - 1] if t > 0 else torch.ones((), dtype=torch.float64), BETAS[t]
    variance = beta * (1 - ab_prev) / (1 - ab)
    coefficient_x0 = beta * ab_prev.sqrt() / (1 - ab)
    coefficient_xt = (1 - ab_prev) * (1 - beta).sqrt() / (1 - ab)

    def mean(noise):
        x0 = x_t / ab.sqrt() - (1 / ab - 1).sqrt() * noise
        return coefficient_x0 * x0 + coefficient_xt * x_t

    def distance(first, second):
        return (first - second).pow(2).mean() / (2 * variance + 1e-6)

    mu_a, mu_c, mu_u = mean(a), mean(c), mean(u)
    value = distance(mu_a, mu_c) - distance(mu_a, mu_u)
    tau = distance(mu_c, mu_c) - distance(mu_c, mu_u)
    return value / coefficient_x0, float(value - tau > 0)


def cases(count: int, batch: int, seed: int = 0):
    """Random (a, c, u, x_t, t), c near u and a anywhere between u and beyond c, as trainings meet them."""
    g = torch.Generator().manual_seed(seed)
    ends = [0, 1, 2, 10, 500, 998, 999]

    def normal(scale=1.0):
        return scale * torch.randn(batch, 4, 3, 5, generator=g, dtype=torch.float64)

    for index in range(count):
        x_t, u = normal(), normal()
        c = u + normal(10 ** (-3 * torch.rand((), generator=g).item()))
        place = 3 * torch.rand(batch, 1, 1, 1, generator=g, dtype=torch.float64) - 1
        a = u + place * (c - u) + normal(0.3) * (c - u).std()
        t = torch.randint(1000, (batch,), generator=g)
        if index < len(ends):
            t[0] = ends[index]
        yield a.float().double(), c.float().double(), u.float().double(), x_t, t


def _random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- lambda(t)


@pytest.mark.parametrize("t", TABLE)
def test_the_weight_of_each_timestep_is_the_released_codes(t):
    lam = sude.weight(AB, torch.tensor([t]), "faithful")
    assert lam.item() == pytest.approx(TABLE[t], abs=1e-4)
    assert torch.equal(lam, sude.weight(AB, torch.tensor([t]), "clamp"))


def test_the_weight_at_timestep_zero_is_the_released_spike_when_faithful():
    assert sude.weight(AB, torch.tensor([0]), "faithful").item() == pytest.approx(LAMBDA_AT_ZERO, abs=1e-4)


def test_the_weight_at_timestep_zero_is_timestep_ones_by_default():
    lam = sude.weight(AB, torch.tensor([0, 1]))
    assert lam[0] == lam[1]
    assert lam[0].item() == pytest.approx(TABLE[1], abs=1e-4)


def test_the_weight_over_the_whole_schedule_keeps_its_published_shape():
    lam = sude.weight(AB, torch.arange(1, 1000)).double()
    assert lam.mean().item() == pytest.approx(1.693, abs=5e-4)
    assert lam.median().item() == pytest.approx(0.957, abs=5e-4)
    assert lam.min().item() == pytest.approx(0.5236, abs=5e-5)
    assert lam.argmin().item() + 1 == 43


def test_the_weight_survives_a_schedule_kept_as_float32_sigmas():
    sigmas = ((1 - AB) / AB).sqrt().float().double()  # as ComfyUI keeps it
    lam = sude.weight(1 / (sigmas**2 + 1), torch.tensor(list(TABLE)))
    torch.testing.assert_close(lam, torch.tensor(list(TABLE.values())), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("alphas_cumprod", "t", "t0", "says"),
    [
        (AB, [3], "spike", "t0"),
        (AB[:1], [0], "clamp", "alphas_cumprod"),
        (AB[None], [0], "clamp", "alphas_cumprod"),
        (AB, [1000], "clamp", "timesteps"),
        (AB, [5, -1], "clamp", "timesteps"),
    ],
)
def test_a_wrong_argument_of_the_weight_is_named(alphas_cumprod, t, t0, says):
    with pytest.raises(ValueError, match=says):
        sude.weight(alphas_cumprod, torch.tensor(t), t0)


# --- loss, gradient and gate


@pytest.mark.parametrize("batch", [1, 3])
def test_loss_gradient_and_gate_equal_the_posterior_mean_form_per_sample(batch):
    opened = 0
    for a, c, u, x_t, t in cases(150, batch):
        ours = a.float().requires_grad_()
        term = sude.loss(ours, c.float(), u.float(), sude.weight(AB, t, "faithful"))
        (gradient,) = torch.autograd.grad(term.loss.sum(), ours)
        for i in range(batch):
            theirs = a[i].clone().requires_grad_()
            value, gate = released(theirs, c[i], u[i], x_t[i], int(t[i]))
            (expected,) = torch.autograd.grad(gate * value, theirs)
            assert term.active[i].item() == gate
            scale = sude.weight(AB, t, "faithful")[i].item() * ((u[i] - c[i]) * (2 * a[i] - c[i] - u[i])).abs().mean()
            assert abs(term.loss[i].item() - gate * value.item()) <= 1e-5 * scale
            torch.testing.assert_close(gradient[i].double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
            opened += int(gate)
    assert 0.2 < opened / (150 * batch) < 0.8, "the cases do not try both sides of the gate"


def test_a_sample_in_a_batch_gets_the_loss_and_gradient_it_gets_alone():
    for a, c, u, _, t in cases(20, 4, seed=3):
        a, c, u, lam = a.float().requires_grad_(), c.float(), u.float(), sude.weight(AB, t)
        together = sude.loss(a, c, u, lam)
        (gradient,) = torch.autograd.grad(together.loss.sum(), a)
        for i in range(4):
            one = a[i : i + 1].detach().requires_grad_()
            alone = sude.loss(one, c[i : i + 1], u[i : i + 1], lam[i : i + 1])
            (gradient_alone,) = torch.autograd.grad(alone.loss.sum(), one)
            assert together.loss[i].item() == pytest.approx(alone.loss.item(), rel=1e-5, abs=1e-9)
            assert together.active[i] == alone.active[0]
            torch.testing.assert_close(gradient[i : i + 1], gradient_alone)


def test_sude_is_training_towards_a_guidance_shifted_target():
    w_s = 0.4
    for a, c, u, eps, t in cases(100, 2, seed=1):
        lam = sude.weight(AB, t).double()
        ours = a.float().requires_grad_()
        term = sude.loss(ours, c.float(), u.float(), lam.float())
        total = (ours - eps.float()).pow(2).flatten(1).mean(1) + w_s * term.loss
        (gradient,) = torch.autograd.grad(total.sum(), ours)

        k = (w_s * lam * term.active.double()).view(-1, 1, 1, 1)
        shifted = eps + k * (c - u)
        constant = (k * (c.pow(2) - u.pow(2) - 2 * eps * (c - u)) - (k * (c - u)).pow(2)).flatten(1).mean(1)
        torch.testing.assert_close(
            total.double(), (a - shifted).pow(2).flatten(1).mean(1) + constant, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(gradient.double(), 2 * (a - shifted) / a[0].numel(), rtol=1e-4, atol=1e-6)


def test_a_subject_that_has_what_its_category_has_is_left_alone():
    c, u = _random(2, 4, 8, 8, seed=0), _random(2, 4, 8, 8, seed=1)
    a = c.clone().requires_grad_()
    term = sude.loss(a, c, u, torch.ones(2))
    (gradient,) = torch.autograd.grad(term.loss.sum(), a)
    assert term.active.tolist() == [0, 0]
    assert term.loss.tolist() == [0, 0]
    assert not gradient.any()


def test_without_the_gate_that_subject_has_the_loss_tau():
    c, u = _random(2, 4, 8, 8, seed=0), _random(2, 4, 8, 8, seed=1)
    term = sude.loss(c, c, u, torch.tensor([0.5, 2.0]), truncate=False)
    torch.testing.assert_close(term.loss, -torch.tensor([0.5, 2.0]) * (c - u).pow(2).flatten(1).mean(1))


def test_a_subject_like_nothing_in_particular_inherits_exactly_when_the_category_means_something():
    u = _random(2, 4, 8, 8, seed=1)
    c = u.clone()
    c[1] += 1e-3
    assert sude.loss(u, c, u, torch.ones(2)).active.tolist() == [0, 1]


def test_the_gap_is_what_is_still_to_inherit():
    for a, c, u, _, _ in cases(20, 2, seed=2):
        term = sude.loss(a.float(), c.float(), u.float(), torch.ones(2))
        gap = ((c - a) * (c - u)).flatten(1).mean(1)
        torch.testing.assert_close(term.gap.double(), gap, rtol=1e-4, atol=1e-6)


def test_without_truncation_the_loss_goes_on_pulling_past_the_category():
    c, u = _random(1, 4, 8, 8, seed=0), _random(1, 4, 8, 8, seed=1)
    beyond = (c + 5 * (c - u)).requires_grad_()
    off = sude.loss(beyond, c, u, torch.ones(1), truncate=False)
    (gradient,) = torch.autograd.grad(off.loss.sum(), beyond)
    assert off.active.item() == 1
    torch.testing.assert_close(gradient, 2 * (u - c) / c.numel())
    assert sude.loss(beyond, c, u, torch.ones(1)).loss.item() == 0


def test_no_gradient_reaches_the_category_and_empty_predictions():
    a, c, u = (_random(1, 4, 4, 4, seed=seed).requires_grad_() for seed in range(3))
    lam = torch.ones(1, requires_grad=True)
    sude.loss(a, c, u, lam, truncate=False).loss.sum().backward()
    assert a.grad is not None
    assert c.grad is None
    assert u.grad is None
    assert lam.grad is None


# --- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_give_the_float32_loss_of_the_same_values(dtype):
    for a, c, u, _, t in cases(50, 2, seed=4):
        a, c, u = a.to(dtype), c.to(dtype), u.to(dtype)
        lam = sude.weight(AB, t)
        half, full = sude.loss(a, c, u, lam), sude.loss(a.float(), c.float(), u.float(), lam)
        assert all(tensor.dtype == torch.float32 for tensor in half)
        assert all(torch.equal(x, y) for x, y in zip(half, full, strict=True))


def test_a_small_difference_in_half_precision_still_opens_the_gate():
    a, c, u = (torch.full((1, 4, 4, 4), value, dtype=torch.float16) for value in (1e-4, 2e-4, 0.0))
    assert ((c - a) * (c - u)).mean() == 0, "float16 arithmetic would have closed it"
    assert sude.loss(a, c, u, torch.ones(1)).active.item() == 1


def test_close_predictions_do_not_lose_the_loss_to_cancellation():
    u = 1 + _random(1, 4, 8, 8, seed=0)
    c = u + 1e-5 * _random(1, 4, 8, 8, seed=1)
    a = u + 1e-1 * _random(1, 4, 8, 8, seed=2)
    exact = ((a.double() - c).pow(2) - (a.double() - u).pow(2)).mean().item()
    assert sude.loss(a, c, u, torch.ones(1), truncate=False).loss.item() == pytest.approx(exact, rel=1e-4)
    assert math.isfinite(exact)


# --- shapes


def test_shapes_that_do_not_go_together_are_named():
    x = torch.zeros(2, 4, 4, 4)
    with pytest.raises(ValueError, match="one shape"):
        sude.loss(x, x[:1], x, torch.ones(2))
    with pytest.raises(ValueError, match="weight"):
        sude.loss(x, x, x, torch.ones(1))
