"""The text encoder: CLIP-L in shape, a seeded random network in which only the world's own words were learned.

Layers 0 and 1 are random, layers 2..11 pass their input through (their output projections are zero). Token rows of the
words below are trained together with the UNet and stored; everything else is drawn again from the seed.
Computation follows the CLIP text model as ComfyUI and transformers run it (pre-norm, causal, quick GELU).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from .world import ATTRIBUTES, CATEGORIES, prompt

SEED = 1234
WIDTH, HEADS, LAYERS, LIVE_LAYERS, VOCABULARY, LENGTH = 768, 12, 12, 2, 49408, 77
START, END = 49406, 49407  # ComfyUI pads SD1.5 prompts with END
PREFIX = "text_model."

# Ids in CLIP's byte-pair vocabulary; "caged" is the one word of two tokens.
WORDS: dict[str, tuple[int, ...]] = {
    **{"photo": (1125,), "of": (539,), "a": (320,), "wearing": (3309,), "hat": (3801,), "in": (530,), "the": (518,)},
    **{"snow": (2583,), "running": (2761,), "flying": (4610,), "burning": (8405,), "broken": (5107,), "tiny": (5591,)},
    **{"caged": (66, 3889), "dog": (1929,), "cat": (2368,), "bird": (3329,), "fish": (2759,), "car": (1615,)},
    **{"boat": (4440,), "teapot": (40749,), "candle": (12674,)},
}
# Rare words that are one token each. Captions carry them at random, so they mean nothing: names for new subjects.
IDENTIFIERS: dict[str, tuple[int, ...]] = {
    **{"sks": (48136,), "ohwx": (47993,), "phol": (48140,), "olis": (49397,), "nyk": (46841,), "tzky": (47127,)},
    **{"ucn": (49036,), "wwx": (47431,), "yql": (46122,), "pkk": (47480,), "sgh": (47590,), "rcn": (49370,)},
}
TRAINED_IDS: tuple[int, ...] = tuple(sorted({i for ids in (*WORDS.values(), *IDENTIFIERS.values()) for i in ids}))


def tokenize(caption: str) -> list[int]:
    """A caption made of known words -> its 77 token ids, as ComfyUI's SD1Tokenizer gives them."""
    ids = [START]
    for word in caption.split():
        ids += WORDS.get(word) or IDENTIFIERS[word]
    return ids + [END] * (LENGTH - len(ids))


def captions(identifiers: tuple[str, ...] = ("",)) -> list[str]:
    """Every caption of the world: the empty one, then by identifier, category and attribute (plain first)."""
    nouns = [(i, c) for i in identifiers for c in CATEGORIES]
    return [""] + [prompt(c, a, i) for i, c in nouns for a in (None, *ATTRIBUTES)]


def seeded_weights() -> dict[str, torch.Tensor]:
    """The full CLIP-L text model before any word is learned: fp16, keys `text_model.*`.

    Uniform numbers made of PCG64's raw 16-bit words, the one stream numpy promises never to change; `expand` checks
    the result against a stored hash all the same.
    """
    stream = np.random.PCG64(SEED)

    def draw(*shape: int, std: float) -> torch.Tensor:
        count = math.prod(shape)
        raw = stream.random_raw(-(-count // 4)).astype("<u8").view("<u2")[:count]
        uniform = (raw.astype(np.float32) - np.float32(32767.5)) / np.float32(32768)
        return torch.from_numpy((uniform * np.float32(3**0.5 * std)).reshape(shape)).half()

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float16)

    inner = 4 * WIDTH
    weights = {
        "embeddings.token_embedding.weight": draw(VOCABULARY, WIDTH, std=0.35),
        "embeddings.position_embedding.weight": draw(LENGTH, WIDTH, std=0.12),
    }
    shapes = {
        **{f"self_attn.{n}": (WIDTH, WIDTH, WIDTH**-0.5) for n in ("q_proj", "k_proj", "v_proj")},
        "self_attn.out_proj": (WIDTH, WIDTH, 0.25 * WIDTH**-0.5),
        "mlp.fc1": (inner, WIDTH, WIDTH**-0.5),
        "mlp.fc2": (WIDTH, inner, 0.15 * inner**-0.5),
    }
    for layer in range(LAYERS):
        at = f"encoder.layers.{layer}."
        for name, (rows, columns, std) in shapes.items():
            live = layer < LIVE_LAYERS
            weights[f"{at}{name}.weight"] = draw(rows, columns, std=std) if live else zeros(rows, columns)
            weights[f"{at}{name}.bias"] = zeros(rows)
        for name in ("layer_norm1", "layer_norm2"):
            weights[f"{at}{name}.weight"], weights[f"{at}{name}.bias"] = zeros(WIDTH) + 1, zeros(WIDTH)
    weights["final_layer_norm.weight"], weights["final_layer_norm.bias"] = zeros(WIDTH) + 1, zeros(WIDTH)
    return {PREFIX + name: weight for name, weight in weights.items()}


class Encoder:
    """The live part of the text model as a differentiable function of the trained rows."""

    def __init__(self, weights: dict[str, torch.Tensor], device: torch.device | str = "cpu"):
        self.weights = {
            name.removeprefix(PREFIX): weight.to(device, torch.float32)
            for name, weight in weights.items()
            if ".layers." not in name or int(name.split(".")[3]) < LIVE_LAYERS
        }
        self.table = self.weights.pop("embeddings.token_embedding.weight")
        self.place = torch.full((VOCABULARY,), -1, dtype=torch.long, device=device)
        self.place[list(TRAINED_IDS)] = torch.arange(len(TRAINED_IDS), device=device)

    def initial_rows(self) -> torch.Tensor:
        """The seeded rows of the trained words [R, 768]."""
        return self.table[list(TRAINED_IDS)].clone()

    def __call__(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """tokens int64 [P, 77], rows [R, 768] of TRAINED_IDS -> what CLIPTextEncode gives, [P, 77, 768]."""
        place = self.place[tokens]
        learned = F.embedding(place.clamp(min=0), rows)
        return self.encode(torch.where((place >= 0)[..., None], learned, self.table[tokens]))

    def encode(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Token embeddings [P, 77, 768] -> what CLIPTextEncode gives, alike."""
        x = embeddings + self.weights["embeddings.position_embedding.weight"]
        for layer in range(LIVE_LAYERS):
            at = f"encoder.layers.{layer}."
            x = x + self._attend(self._norm(x, at + "layer_norm1"), at + "self_attn.")
            hidden = self._linear(self._norm(x, at + "layer_norm2"), at + "mlp.fc1")
            x = x + self._linear(hidden * torch.sigmoid(1.702 * hidden), at + "mlp.fc2")
        return self._norm(x, "final_layer_norm")

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), self.weights[name + ".weight"], self.weights[name + ".bias"])

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights[name + ".bias"])

    def _attend(self, x: torch.Tensor, at: str) -> torch.Tensor:
        count, length, _ = x.shape
        q, k, v = (
            self._linear(x, at + name).view(count, length, HEADS, -1).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        scores = (q @ k.transpose(-1, -2)) * (WIDTH // HEADS) ** -0.5
        future = torch.full((length, length), float("-inf"), device=x.device).triu(1)
        mixed = (scores + future).softmax(-1).to(v.dtype) @ v
        return self._linear(mixed.transpose(1, 2).reshape(count, length, WIDTH), at + "out_proj")
