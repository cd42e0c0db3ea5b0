"""The SuDe loss: a subject is a derived class of its category and inherits the category's attributes.

Paper: Building Derived Class to Inherit Category Attributes for One-shot Subject-Driven Generation, CVPR 2024, Eq. 4-9
Pure torch. From any training script, with `a`, `c`, `u` the noise predictions at the SAME noisy latents and timesteps
under the subject caption, the category caption and the empty caption:

    lam = sude.weight(alphas_cumprod, t)                    # [B]
    term = sude.loss(a, c, u, lam)                          # per sample, c and u are detached inside
    total = l_sub.mean() + w_s * term.loss.mean()

What the loss says. SuDe asks the prediction under the subject caption to be at least as likely an instance of the
category as the category's own prediction is: minimise  lambda * (|a - c|^2 - |a - u|^2)  as long as it exceeds its
value at a = c. Because |a-c|^2 - |a-u|^2 + |c-u|^2 = 2 (c-a).(c-u), the loss is linear in `a` (gradient 2 lambda/N
(u-c)) and the truncation is a hinge that opens while `a` has less of the direction c-u than `c` has. Without the
truncation nothing bounds the loss and training collapses (paper Fig. 5).
"""

from typing import NamedTuple

import torch
from torch import Tensor

T0_MODES = ("clamp", "faithful")
POSTERIOR_VARIANCE_EPSILON = 1e-6  # added to 2 * posterior variance. Source: released code, ddpm.py:1194


class SuDeTerm(NamedTuple):
    """What `loss` returns, one value per sample."""

    loss: Tensor
    """[B] gated loss, carries the gradient to `a`."""
    active: Tensor
    """[B] the gate: 1.0 where there is still something to inherit (always 1.0 without truncation), else 0.0."""
    gap: Tensor
    """[B] mean((c - a) * (c - u)): what is still to inherit, <= 0 once everything is."""


def weight(alphas_cumprod: Tensor, t: Tensor, t0: str = "clamp") -> Tensor:
    """lambda(t), the weight of the SuDe loss in noise space.

    Source: paper Eq. 7 with the posterior mean and variance of DDPM, times the factor 1/c1_t that the released code
    applies (ddpm.py:1256) and the paper does not print. For t >= 1 it is about
    sqrt(ab_{t-1}) (1 - ab_t) / (2 ab_t (1 - ab_{t-1})).

    Args:
        alphas_cumprod: [T] alpha-bar of the noise process, decreasing, any float type (computed in float64).
        t: [B] integer timesteps in [0, T).
        t0: what happens at t = 0, where the posterior variance is zero and the released code's epsilon alone makes the
            weight 851 for SD's schedule, a third of the total over all t: "clamp" uses lambda(1) there (default),
            "faithful" keeps the released code's spike.

    Returns:
        [B] float32 weights on the device of `t`.

    Raises:
        ValueError: unknown `t0`, fewer than two timesteps, or a timestep outside [0, T).
    """
    if t0 not in T0_MODES:
        raise ValueError(f"t0 is {t0!r}, but it must be one of {', '.join(T0_MODES)}.")
    ab = alphas_cumprod.detach().to(device="cpu", dtype=torch.float64)
    if ab.ndim != 1 or len(ab) < 2:
        raise ValueError(
            f"alphas_cumprod has shape {tuple(ab.shape)}, but one value per timestep ([T], T >= 2) is needed."
        )
    steps = t.detach().to(device="cpu", dtype=torch.long)
    if steps.numel() and not 0 <= int(steps.min()) <= int(steps.max()) < len(ab):
        raise ValueError(f"timesteps {steps.tolist()} are not all within 0..{len(ab) - 1}.")
    if t0 == "clamp":
        steps = steps.clamp(min=1)
    ab_t = ab[steps]
    ab_prev = torch.where(steps > 0, ab[(steps - 1).clamp(min=0)], torch.ones_like(ab_t))
    beta = 1 - ab_t / ab_prev
    posterior_variance = beta * (1 - ab_prev) / (1 - ab_t)
    c1 = beta * ab_prev.sqrt() / (1 - ab_t)  # coefficient of x0 in the posterior mean
    lam = c1 * (1 - ab_t) / ab_t / (2 * posterior_variance + POSTERIOR_VARIANCE_EPSILON)
    return lam.to(device=t.device, dtype=torch.float32)


def loss(
    a: Tensor, c: Tensor, u: Tensor, weight: Tensor, truncate: bool = True, support: Tensor | None = None
) -> SuDeTerm:
    """The truncated SuDe loss, per sample and in float32 whatever the inputs are.

    Source: paper Eq. 8-9; gate per sample and strict as in the released code (ddpm.py:1204). The released code mixes
    the samples of a batch (it was only run at batch 1); here every sample stands for itself.

    Args:
        a: [B, ...] noise predicted under the subject caption; the only tensor that receives a gradient.
        c: [B, ...] noise predicted under the category caption, same noisy latents and timesteps.
        u: [B, ...] noise predicted under the empty caption, likewise.
        weight: [B] lambda(t) from `weight`.
        truncate: False leaves the gate open for good (the paper's ablation, Fig. 5).
        support: optional [B, 1, ...] of zeros and ones, at least a one a sample: loss and gate then read only the ones.

    Raises:
        ValueError: the shapes of a, c, u or weight do not go together.
    """
    if not a.shape == c.shape == u.shape:
        raise ValueError(
            f"a, c and u need one shape, but they are {tuple(a.shape)}, {tuple(c.shape)}, {tuple(u.shape)}."
        )
    if weight.shape != a.shape[:1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, but one value per sample ([{len(a)}]) is needed.")
    a, c, u = a.float(), c.detach().float(), u.detach().float()
    gap = _mean((c - a.detach()) * (c - u), support)
    active = (gap > 0).float() if truncate else torch.ones_like(gap)
    # |a-c|^2 - |a-u|^2 written as a product: c-u is small, and subtracting two almost equal means would lose it
    difference = _mean((u - c) * ((a - c) + (a - u)), support)
    return SuDeTerm(active * weight.detach().float() * difference, active, gap)


def _mean(x: Tensor, support: Tensor | None) -> Tensor:
    if support is None:
        return x.flatten(1).mean(1)
    support = support.to(x).expand_as(x)
    return (x * support).flatten(1).sum(1) / support.flatten(1).sum(1)
