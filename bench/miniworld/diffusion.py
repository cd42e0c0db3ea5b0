"""SD1.5's noise schedule, the training weights and a DDIM sampler for looking at a net while it trains."""

from __future__ import annotations

import torch
from torch import nn

from .run import amp

STEPS = 1000
MIN_SNR = 5.0  # Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"


def alphas_cumprod() -> torch.Tensor:
    """Scaled-linear schedule, betas .00085 to .0120 -> [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.0120**0.5, STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def loss_weights() -> torch.Tensor:
    """min(SNR, 5) / SNR, the weight of the noise prediction's error -> [1000]."""
    alphas = alphas_cumprod()
    snr = alphas / (1 - alphas)
    return snr.clamp(max=MIN_SNR) / snr


@torch.inference_mode()
def ddim(
    net: nn.Module,
    captions: torch.Tensor,
    index: torch.Tensor,
    noise: torch.Tensor,
    steps: int = 20,
    guidance: float = 4.0,
) -> torch.Tensor:
    """Sample latents [B, 4, 8, 8] for rows `index` [B] of captions [P, 77, 768]; row 0 is the empty caption."""
    alphas, x = alphas_cumprod().to(noise.device), noise
    times = torch.linspace(STEPS - 1, 0, steps + 1, device=noise.device).round().long()
    for now, then in zip(times[:-1].tolist(), [*times[1:-1].tolist(), None], strict=True):
        t = torch.full((2 * len(x),), now, device=x.device)
        with amp(x.device):
            both = net(torch.cat([x, x]), t, captions, torch.cat([index, torch.zeros_like(index)])).float()
        with_text, without = both.chunk(2)
        eps = without + guidance * (with_text - without)
        clean = ((x - (1 - alphas[now]).sqrt() * eps) / alphas[now].sqrt()).clamp(-5, 5)
        if then is None:
            return clean
        eps = (x - alphas[now].sqrt() * clean) / (1 - alphas[now]).sqrt()
        x = alphas[then].sqrt() * clean + (1 - alphas[then]).sqrt() * eps
    return x
