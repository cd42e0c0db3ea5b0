"""Train the codec, then encode all pictures once."""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional as F

from .run import Workers, amp, load_state, save_state
from .vae import Codec

HELD_OUT = 500  # pictures at the end of the set that nothing is trained on
BATCH, RATE = 32, 2e-3
LATENT_NOISE = 0.06
log = logging.getLogger(__name__)


def batch(pictures: torch.Tensor, index: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 [N, 64, 64, 3] -> float [B, 3, 64, 64] in 0..1, channels last."""
    return pictures[index].to(device).permute(0, 3, 1, 2).float() / 255


def train(pictures: torch.Tensor, seconds: float, state: Path, device: torch.device, peak: float = RATE) -> Codec:
    """Minimise squared error, over the last 40 % of the time also absolute error; resumes from `state`."""
    codec = Codec()
    codec.init_colour_path()
    codec = codec.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
    step, spent = load_state(state, codec, optimizer)
    begin, saved = time.monotonic() - spent, spent
    parameters, workers = list(codec.parameters()), Workers(device)

    def loss(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with amp(device):
            z = codec.encoder(x)
        z = z.float()
        with amp(device):
            y = codec.decoder(z + LATENT_NOISE * torch.randn_like(z))
        mse, mae = F.mse_loss(y.float(), x), F.l1_loss(y.float(), x)
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
        unit = mean.square().mean() + (std - 1).square().mean()
        return 10 * mse + (0.1 * mae if spent > 0.6 * seconds else 0.0) + 0.02 * unit, mse, mae

    while (spent := time.monotonic() - begin) < seconds:
        done = spent / seconds
        rate = peak * min(1, (step + 1) / 50) * (0.485 * (1 + math.cos(math.pi * done)) + 0.03)
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = batch(pictures, torch.randint(len(pictures) - HELD_OUT, (BATCH,)), device)
        gradients, (_, mse, mae) = workers.gradients(loss, parameters, x)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            log.info("vae step %d, %.0f s, mse %.5f, mae %.4f", step, spent, mse, mae)
        if spent - saved > 60:
            save_state(state, codec, optimizer, step, spent)
            saved = spent
    save_state(state, codec, optimizer, step, seconds)
    return codec.eval()


def encode(codec: Codec, pictures: torch.Tensor, device: torch.device, size: int = 250) -> torch.Tensor:
    """uint8 [N, 64, 64, 3] -> latents float16 [N, 4, 8, 8] (unit variance)."""

    @torch.inference_mode()
    def part(index: torch.Tensor) -> torch.Tensor:
        with amp(device):
            return codec.encoder(batch(pictures, index, device)).half().cpu().contiguous()

    with ThreadPoolExecutor(Workers(device).count) as pool:
        return torch.cat(list(pool.map(part, torch.arange(len(pictures)).split(size))))


@torch.inference_mode()
def reconstruct(codec: Codec, latents: torch.Tensor, size: int = 250) -> torch.Tensor:
    """latents [N, 4, 8, 8] -> uint8 [N, 64, 64, 3]."""
    device = next(codec.parameters()).device
    parts = []
    for z in latents.split(size):
        y = codec.decoder(z.to(device).float()).clamp(0, 1)
        parts.append((y * 255).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(parts)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal to noise ratio of uint8 pictures, dB."""
    return -10 * math.log10(((a.float() - b.float()) / 255).square().mean().item())


def train_decoder(
    codec: Codec,
    pictures: torch.Tensor,
    latents: torch.Tensor,
    seconds: float,
    state: Path,
    device: torch.device,
    peak: float = 1e-3,
) -> Codec:
    """Go on with the decoder alone: the latents, and so the UNet, stay as they are. Returns the codec in eval mode."""
    decoder = codec.to(device, memory_format=torch.channels_last).train().decoder
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
    step, spent = load_state(state, decoder, optimizer)
    begin, saved = time.monotonic() - spent, spent
    parameters, workers = list(decoder.parameters()), Workers(device)

    def loss(z: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with amp(device):
            y = decoder(z + 0.5 * LATENT_NOISE * torch.randn_like(z))
        mse, mae = F.mse_loss(y.float(), x), F.l1_loss(y.float(), x)
        return 10 * mse + 0.1 * mae, mse, mae

    while (spent := time.monotonic() - begin) < seconds:
        rate = peak * min(1, (step + 1) / 50) * (0.5 * (1 + math.cos(math.pi * spent / seconds)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(pictures) - HELD_OUT, (BATCH,))
        z, x = latents[chosen].to(device).float(), batch(pictures, chosen, device)
        gradients, (_, mse, mae) = workers.gradients(loss, parameters, z, x)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            log.info("decoder step %d, %.0f s, mse %.5f, mae %.4f", step, spent, mse, mae)
        if spent - saved > 60:
            save_state(state, decoder, optimizer, step, spent)
            saved = spent
    save_state(state, decoder, optimizer, step, seconds)
    return codec.eval()
