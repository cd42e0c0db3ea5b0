"""A two-level Stable Diffusion 1.5 UNet: SD1.5's key names, one residual block and one transformer block a level.

`widen` doubles the width by copying every channel, without changing the function, so that a net trained at width 160
fills ComfyUI's SD1.5 detection, which wants 320. Structure after CompVis/stable-diffusion openaimodel.py (key names).
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

NARROW, WIDE, HEADS, CONTEXT = 160, 320, 8, 768


def timestep_embedding(t: torch.Tensor, width: int) -> torch.Tensor:
    """Timesteps [B] -> [B, width], cosines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class ResBlock(nn.Module):
    """Two convolutions with the time embedding added between them."""

    def __init__(self, n_in: int, n_out: int, n_time: int):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, n_in), nn.SiLU(), nn.Conv2d(n_in, n_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(n_time, n_out))
        last = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, n_out), nn.SiLU(), nn.Identity(), last)
        self.skip_connection = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Self- or cross-attention; plain products, whose backward is far faster than fused attention's on a CPU."""

    def __init__(self, width: int, context: int):
        super().__init__()
        self.heads = HEADS
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None = None, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [B, N, C]; context [P, T, D] of which sample b reads row index[b]."""
        count, length, width = x.shape
        source = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        if index is not None:
            k, v = k[index], v[index]
        q, k, v = (y.view(count, -1, HEADS, width // HEADS).transpose(1, 2) for y in (q, k, v))
        weights = (q * (width // HEADS) ** -0.5 @ k.transpose(-1, -2)).softmax(-1).to(v.dtype)
        return self.to_out((weights @ v).transpose(1, 2).reshape(count, length, width))


class GEGLU(nn.Module):
    """Gated linear unit with GELU."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.proj = nn.Linear(n_in, 2 * n_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The transformer block's perceptron."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the caption, perceptron."""

    def __init__(self, width: int):
        super().__init__()
        self.attn1, self.attn2, self.ff = Attention(width, width), Attention(width, CONTEXT), FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: torch.Tensor, context: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, index)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor, context: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        count, width, high, wide = x.shape
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        y = self.transformer_blocks[0](y, context, index)
        return x + self.proj_out(y.transpose(1, 2).reshape(count, width, high, wide))


class Down(nn.Module):
    """Halve the feature map."""

    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Up(nn.Module):
    """Double the feature map."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """Noise prediction: x_t [B, 4, 8, 8], t [B], captions [P, 77, 768] and index [B] into them -> [B, 4, 8, 8]."""

    def __init__(self, width: int = NARROW):
        super().__init__()
        time = 4 * width
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))

        def block(n_in: int, *after: nn.Module) -> nn.ModuleList:
            return nn.ModuleList([ResBlock(n_in, width, time), *after])

        def look() -> SpatialTransformer:
            return SpatialTransformer(width)

        first = nn.ModuleList([nn.Conv2d(4, width, 3, padding=1)])
        self.input_blocks = nn.ModuleList([first, block(width, look()), nn.ModuleList([Down(width)])])
        self.input_blocks.append(block(width, look()))
        self.middle_block = block(width, look(), ResBlock(width, width, time))
        self.output_blocks = nn.ModuleList([block(2 * width, look()), block(2 * width, look(), Up(width))])
        self.output_blocks.extend([block(2 * width, look()), block(2 * width)])
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))
        for module in self.modules():
            if isinstance(module, ResBlock):
                _zero(module.out_layers[3])
            elif isinstance(module, SpatialTransformer):
                _zero(module.proj_out)
        _zero(self.out[2])

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        time = self.time_embed(timestep_embedding(t, self.width).to(self.out[2].weight.dtype))

        def run(layers: nn.ModuleList, h: torch.Tensor) -> torch.Tensor:
            for layer in layers:
                if isinstance(layer, ResBlock):
                    h = layer(h, time)
                elif isinstance(layer, SpatialTransformer):
                    h = layer(h, context, index)
                else:
                    h = layer(h)
            return h

        skips, h = [], x
        for layers in self.input_blocks:
            h = run(layers, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for layers in self.output_blocks:
            h = run(layers, torch.cat([h, skips.pop()], 1))
        return self.out(h)


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def widen(narrow: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of width W -> width 2W computing the same function: every channel twice, next to its copy.

    What enters twice is halved; queries are scaled by 1/sqrt(2), because a head has twice the dimensions and its scale
    is their inverse root; the time embedding gets the old frequencies at the even places, zero weights at the odd ones.
    Powers of two are exact in fp16, the query's scale is applied in fp32 and rounded once.
    """
    wide = {}
    for name, weight in narrow.items():
        w = weight.float()
        if name == "time_embed.0.weight":
            spread = torch.zeros(w.shape[0], 2 * w.shape[1])
            spread[:, ::2] = w
            wide[name] = spread.repeat_interleave(2, 0)
            continue
        if ".to_q." in name:
            w = w * 0.5**0.5
        reads_channels = w.ndim > 1 and name != "input_blocks.0.0.weight"
        if reads_channels and not name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            w = w.repeat_interleave(2, 1) / 2
        if not name.startswith("out.2."):
            w = w.repeat_interleave(2, 0)
        wide[name] = w
    return wide
