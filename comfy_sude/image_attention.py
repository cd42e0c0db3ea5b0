"""Attention to a reference picture inside a UNet: the block, where it goes, its mask and its regularisation.

Pure torch. Source: ViCo (Hao et al. 2023, haoosz/ViCo). The reference's tokens at a transformer are recorded in one
pass (`Record`) and attended to in another (`Attend`); both are `Taps` of a prediction (baselines/base.py), in training
and when sampling alike.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

THRESHOLDS = 10  # candidates of the mask's threshold: 0, 0.1, ... 0.9 of the map's range. ViCo, attention.py:66-97


class Attention(nn.Module):
    """Multi-head attention of x [B, n, width] to itself or to a context [B, m, width], some keys masked."""

    def __init__(self, width: int, heads: int, operations, **where):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (operations.Linear(width, width, bias=False, **where) for _ in range(3))
        self.to_out = nn.Sequential(operations.Linear(width, width, **where))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """[B, n, width]; mask is [B, m], True where keys may be seen."""
        context = x if context is None else context
        q, k, v = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        seen = None if mask is None else mask[:, None, None, :]
        return self.to_out(F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    """GEGLU with an inner width of four times the outer."""

    def __init__(self, width: int, operations, **where):
        super().__init__()
        self.proj = operations.Linear(width, 8 * width, **where)
        self.out = operations.Linear(4 * width, width, **where)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, width]."""
        x, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(x * F.gelu(gate))


class ImageBlock(nn.Module):
    """One image attention block: self-attention, attention to the reference, feed-forward, each on a residual.

    Source: ViCo, attention.py:264-289. 20 width^2 + 17 width parameters.

    Args:
        width: of the tokens, a multiple of `heads`.
        heads: of both attentions.
        operations: where its layers come from: torch.nn, or ComfyUI's operations.
        where: device and dtype of the layers.
    """

    def __init__(self, width: int, heads: int, operations=nn, **where):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (operations.LayerNorm(width, **where) for _ in range(3))
        self.attn1 = Attention(width, heads, operations, **where)
        self.attn2 = Attention(width, heads, operations, **where)
        self.ff = GatedFeedForward(width, operations, **where)

    def forward(self, x: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
        """[B, n, width] from tokens x alike, reference [B, m, width], mask [B, m] of reference tokens to be seen."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), reference, mask)
        return x + self.ff(self.norm3(x))

    def initialize(self, generator: torch.Generator) -> None:
        """PyTorch's default initialisation, not zero and not copied (ViCo), from a generator of our own."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                for parameter in filter(lambda p: p is not None, (layer.weight, layer.bias)):
                    drawn = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
                    parameter.data.copy_(drawn)


def places(unet: nn.Module) -> dict[str, tuple[int, int]]:
    """Where the image attention goes: (width, heads) by the name of the transformer, "output_blocks.4.1".

    Every second transformer of the decoder from its deepest on (the only one, if there is only one): in SD1.x those of
    output blocks 4, 6, 8 and 10. Source: ViCo, openaimodel.py:620-673.
    """
    found = {}
    for name, block in unet.named_modules():
        match = re.fullmatch(r"(output_blocks\.\d+\.\d+)\.transformer_blocks\.\d+", name)
        if match and getattr(block, "attn2", None) is not None:
            found[match.group(1)] = (block.norm3.weight.shape[0], block.attn2.heads)
    names = list(found)
    return {name: found[name] for name in names[1::2] or names}


# --- The reference's mask and its regularisation ---------------------------------------------------------------------


def object_mask(attention: Tensor) -> Tensor:
    """[B, n] True where a map of attention to the subject's word is high: Otsu's threshold of ten candidates.

    Source: ViCo, attention.py:66-97. A map that is the same everywhere gives a mask that is True everywhere.

    Args:
        attention: [B, n], detached inside.
    """
    p = attention.detach().float()
    low, high = p.amin(1, keepdim=True), p.amax(1, keepdim=True)
    p = (p - low) / (high - low)
    best, mask = torch.zeros_like(low), torch.ones_like(p, dtype=torch.bool)
    for step in range(THRESHOLDS):
        above = p >= step / THRESHOLDS
        share = above.float().mean(1, keepdim=True)
        means = [(p * part).sum(1, keepdim=True) / part.sum(1, keepdim=True) for part in (above, ~above)]
        between = share * (1 - share) * (means[0] - means[1]).pow(2)  # NaN where a class is empty: never better
        better = between > best
        best, mask = torch.where(better, between, best), torch.where(better, above, mask)
    return mask


def attention_loss(subject: Tensor, end: Tensor) -> Tensor:
    """[B] mean squared difference of two maps [B, n] scaled to a maximum of 1; the end token's map is detached.

    Source: ViCo, attention.py:363-369.
    """
    end = end.detach().float()
    subject = subject.float()
    return (subject / subject.amax(1, keepdim=True) - end / end.amax(1, keepdim=True)).pow(2).mean(1)


class Record:
    """Taps that keep the reference's tokens and its attention to the text, by place."""

    wants_attention = True

    def __init__(self, where):
        self.places = tuple(where)
        self.kept: dict[str, Tensor] = {}
        self.maps: dict[str, Tensor] = {}

    def tokens(self, place: str, tokens: Tensor) -> Tensor:
        """Keep them; they go on unchanged."""
        self.kept[place] = tokens
        return tokens

    def attention(self, place: str, probabilities: Tensor) -> None:
        """Keep them."""
        self.maps[place] = probabilities

    def column(self, place: str, positions) -> Tensor:
        """[B, n] each row's attention to the text tokens at its positions, the mean over them; even if it has none."""
        maps = self.maps[place]
        columns = [
            row[:, list(at)] if at else torch.ones_like(row[:, :1]) for row, at in zip(maps, positions, strict=True)
        ]
        return torch.stack([column.mean(1) for column in columns])

    def masks(self, positions) -> dict[str, Tensor]:
        """[B, n] of the reference's tokens that show the subject, by place; all of them in a row without positions."""
        return {place: object_mask(self.column(place, positions)) for place in self.places}


class Attend:
    """Taps that add attention to recorded reference tokens.

    Args:
        blocks: image blocks by place (dots written as underscores).
        tokens: [B, m, width] reference tokens by place.
        masks: [B, m] by place.
        rows: rows of the prediction that attend, in the order of the reference's; None for all.
        strength: 1 replaces the tokens by the blocks' outputs, less moves them only part of the way.
    """

    wants_attention = False

    def __init__(self, blocks, tokens: dict[str, Tensor], masks: dict[str, Tensor], rows=None, strength: float = 1.0):
        self.places = tuple(tokens)
        self.blocks, self.reference, self.masks, self.rows, self.strength = blocks, tokens, masks, rows, strength

    def tokens(self, place: str, tokens: Tensor) -> Tensor:
        """The tokens after attention to the reference."""
        own = tokens if self.rows is None else tokens[self.rows]
        reference = self.reference[place].to(own)
        attended = self.blocks[key(place)](own, reference, self.masks[place])
        if self.strength != 1.0:
            attended = own + self.strength * (attended - own)
        return attended if self.rows is None else tokens.index_copy(0, self.rows, attended)

    def attention(self, place: str, probabilities: Tensor) -> None:
        """Not asked for."""


def key(place: str) -> str:
    """A place's name in a ModuleDict, which allows no dots."""
    return place.replace(".", "_")
