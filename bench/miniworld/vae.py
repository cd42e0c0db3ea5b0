"""The picture codec: TAESD as ComfyUI loads it from a checkpoint, trained narrow and zero-padded to its 64 channels.

Layer numbering follows TAESD (madebyollin/taesd, MIT), so a state dict fits ComfyUI's comfy/taesd/taesd.py.
"""

from __future__ import annotations

import torch
from torch import nn

WIDTHS = (16, 32, 48, 64)  # live channels at 64, 32, 16 and 8 pixels; TAESD has 64 everywhere
LATENT_SCALE = 0.18215  # stored as vae_scale: latents outside the model have SD1.5's scale


def _conv(n_in: int, n_out: int, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


class Block(nn.Module):
    """Three 3x3 convolutions with a residual."""

    def __init__(self, n: int):
        super().__init__()
        self.conv = nn.Sequential(_conv(n, n), nn.ReLU(), _conv(n, n), nn.ReLU(), _conv(n, n))
        self.fuse = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fuse(self.conv(x) + x)


class Clamp(nn.Module):
    """Soft clamp of latents to +-3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


def _stack(n: int) -> list[nn.Module]:
    return [Block(n), Block(n), Block(n)]


class Codec(nn.Module):
    """Encoder [B, 3, 64, 64] in 0..1 -> latents [B, 4, 8, 8] of unit variance, and its decoder."""

    def __init__(self, widths: tuple[int, int, int, int] = WIDTHS):
        super().__init__()
        a, b, c, d = widths
        half = {"stride": 2, "bias": False}
        self.encoder = nn.Sequential(
            *(_conv(3, a), Block(a), _conv(a, b, **half), *_stack(b), _conv(b, c, **half), *_stack(c)),
            *(_conv(c, d, **half), *_stack(d), _conv(d, 4)),
        )
        self.decoder = nn.Sequential(
            *(Clamp(), _conv(4, d), nn.ReLU(), *_stack(d), nn.Upsample(scale_factor=2), _conv(d, c, bias=False)),
            *(*_stack(c), nn.Upsample(scale_factor=2), _conv(c, b, bias=False)),
            *(*_stack(b), nn.Upsample(scale_factor=2), _conv(b, a, bias=False), Block(a), _conv(a, 3)),
        )

    @torch.no_grad()
    def init_colour_path(self) -> None:
        """Start as a codec of block-mean colours.

        Channels 0..2 carry RGB averaged down, scaled to unit variance in the latent and blurred up again, and every
        block starts close to the identity there. From an ordinary start the loss rests on a flat plateau for minutes.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Block):
                module.conv[4].weight.mul_(0.2)
                module.conv[4].weight[:3].mul_(0.2)
        identity = torch.zeros(3, 3)
        identity[1, 1] = 1.0
        mean = torch.zeros(3, 3)
        mean[1:, 1:] = 0.25
        blur = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])) / 16
        strided = [m for m in self.encoder if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
        growing = [m for m in list(self.decoder)[2:-1] if isinstance(m, nn.Conv2d)]
        _carry(self.encoder[0], identity)
        for module in strided:
            _carry(module, mean)
        _carry(self.encoder[-1], identity, 4.0, -2.8)
        self.encoder[-1].weight[3].mul_(0.5)
        _carry(self.decoder[1], identity, 0.25, 0.7)
        for module in growing:
            _carry(module, blur)
        self.decoder[-1].weight.mul_(0.1)
        _carry(self.decoder[-1], identity)


def _carry(conv: nn.Conv2d, kernel: torch.Tensor, gain: float = 1.0, bias: float = 0.0) -> None:
    full = conv.out_channels == 3
    if not full:
        conv.weight[:3] = 0
    else:
        conv.weight[:, :3] = 0
    for i in range(3):
        conv.weight[i, i] = kernel * gain
        if conv.bias is not None:
            conv.bias[i] = bias


def pad(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Zero-pad one narrow tensor to TAESD's 64 channels; `name` is its key in `Codec`."""
    wide_out = not (name.startswith("decoder.19.") or name.startswith("encoder.14."))
    wide_in = not (name.startswith("encoder.0.") or name.startswith("decoder.1."))
    shape = list(weight.shape)
    shape[0] = 64 if wide_out else shape[0]
    if weight.ndim == 4:
        shape[1] = 64 if wide_in else shape[1]
    padded = torch.zeros(shape, dtype=weight.dtype)
    padded[tuple(slice(0, n) for n in weight.shape)] = weight
    return padded


def widen(narrow: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of a narrow `Codec` -> keys and shapes of ComfyUI's TAESD, computing the same function."""
    wide = {f"taesd_{name}": pad(name, weight) for name, weight in narrow.items()}
    wide["vae_scale"] = torch.tensor(LATENT_SCALE)
    wide["vae_shift"] = torch.tensor(0.0)
    return wide
