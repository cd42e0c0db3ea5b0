"""Toy networks with words and cross-attention, for baselines that learn a new word: small, wired as the real ones."""

import zlib

import torch
import torch.nn.functional as F
from torch import nn

from comfy_sude.data import Latents, Views
from comfy_sude.diffusion import NoiseProcess

AB = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2, 0)
PROCESS = NoiseProcess(AB)
WIDTH, HEADS, LENGTH = 8, 2, 12


class ToyText(nn.Module):
    """A caption's words, each a row of a table, mixed causally; it is its own vocabulary."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(200, WIDTH))
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.learned: dict[str, nn.Parameter] = {}

    def sequence(self, caption: str) -> list:
        tokens = ["<start>"]
        for word in caption.split():
            count = len(self.learned[word]) if word in self.learned else 1
            tokens += [(word, i) for i in range(count)] if word in self.learned else [word]
        return tokens + ["<end>"] * (LENGTH - len(tokens))

    def row(self, token) -> torch.Tensor:
        if isinstance(token, tuple):
            return self.learned[token[0]][token[1]]
        return self.table[zlib.crc32(token.encode()) % len(self.table)]

    def forward(self, captions):
        rows = torch.stack([torch.stack([self.row(token) for token in self.sequence(c)]) for c in captions])
        x = rows + self.places
        causal = x.cumsum(1) / torch.arange(1, LENGTH + 1, dtype=x.dtype)[:, None]
        return x + torch.tanh(self.mix(causal))

    def vectors(self, text):
        return torch.stack([self.row(word) for word in text.split()]).detach().clone()

    def learn(self, placeholder, vectors):
        self.learned[placeholder] = vectors

    def positions(self, caption, word):
        wanted, tokens = self.sequence(word), self.sequence(caption)
        wanted = wanted[1 : wanted.index("<end>")]
        for start in range(len(tokens)):
            if tokens[start : start + len(wanted)] == wanted:
                return tuple(range(start, start + len(wanted)))
        return ()

    def end(self, caption):
        return self.sequence(caption).index("<end>")


class ToyCrossAttention(nn.Module):
    """Attention of picture to text, without a bias on its projections."""

    def __init__(self):
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH))

    def forward(self, x, context):
        q, k, v = (
            layer(source).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, source in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        probabilities = (q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        return self.to_out((probabilities @ v).transpose(1, 2).flatten(2)), probabilities.mean(1)


class ToyBlock(nn.Module):
    """A transformer block of text attention and feed-forward."""

    def __init__(self):
        super().__init__()
        self.attn2 = ToyCrossAttention()
        self.norm2, self.norm3 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.ff = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, context):
        attended, probabilities = self.attn2(self.norm2(x), context)
        x = x + attended
        return x + torch.tanh(self.ff(self.norm3(x))), probabilities


class ToyTransformer(nn.Module):
    """Where a place is: a list of blocks, as in the real UNet."""

    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([ToyBlock()])


class ToyUNet(nn.Module):
    """Three decoder transformers; taps are called after each one's block."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, WIDTH, 3, padding=1)
        self.time = nn.Linear(2, WIDTH)
        self.output_blocks = nn.ModuleList([nn.ModuleList([nn.Identity(), ToyTransformer()]) for _ in range(3)])
        self.conv_out = nn.Conv2d(WIDTH, 4, 3, padding=1)

    def forward(self, x_t, t, context, taps=None):
        time = torch.stack([t / 1000, (t / 100).sin()], 1).to(x_t.dtype)
        x = F.silu(self.conv_in(x_t) + self.time(time)[:, :, None, None])
        h = x.flatten(2).transpose(1, 2)
        for number, (_, transformer) in enumerate(self.output_blocks):
            place = f"output_blocks.{number}.1"
            h, probabilities = transformer.transformer_blocks[0](h, context)
            if taps is not None and place in taps.places:
                if taps.wants_attention:
                    taps.attention(place, probabilities)
                h = taps.tokens(place, h)
        return self.conv_out(h.transpose(1, 2).reshape(x.shape))


class Calls:
    """A network as the loop calls it, with every call written down: (arguments, whether it recorded a gradient)."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *args):
        self.calls.append((args, torch.is_grad_enabled()))
        return self.function(*args)

    def rows(self, with_gradient: bool) -> int:
        return sum(len(args[0]) for args, grad in self.calls if grad == with_gradient)


def networks(seed: int = 0):
    """(UNet, text encoder), frozen, the same every time."""
    torch.manual_seed(seed)
    return ToyUNet().requires_grad_(False), ToyText().requires_grad_(False)


def posteriors(count: int, seed: int, side: int = 4, views: Views | None = None) -> Latents:
    """Posteriors of random pictures."""
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, 2, 4, side, side, generator=g)
    return Latents(mean, 0.1 + 0.1 * torch.rand(mean.shape, generator=g), views)
