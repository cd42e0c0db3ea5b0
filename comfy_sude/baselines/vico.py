"""ViCo (Hao et al. 2023): everything frozen, attention to a reference picture and one new word.

Source: haoosz/ViCo. A clean latent of the reference picture runs through the same UNet, at the same timestep and under
the same caption as the noisy one. At four places of the decoder a new transformer block lets the noisy stream attend
to the reference's tokens there, masked to where the reference itself attends to the new word. SuDe's authors published
no code for this baseline; this project predicts c and u without the new blocks, as the pretrained model does, unless
told otherwise.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import captions
from ..data import Generators
from ..recipe import Prior, Recipe, Settings, choice, numeric, plain
from .base import Batch, LearnsToken, Predict

THRESHOLDS = 10  # candidates of the mask's threshold: 0, 0.1, ... 0.9 of the map's range. ViCo, attention.py:66-97
ATTENTION_WEIGHT = 5e-4  # of the attention regularisation. ViCo, ddpm.py:1131-1133

# The published list has 57 different captions with "a photo of a *" at its core; these are this project's own, fewer.
TEMPLATES = tuple(
    template.format(kind=kind)
    for kind in ("photo", "picture", "rendering")
    for template in (
        "a {kind} of a {{}}",
        "a {kind} of the {{}}",
        "a {kind} of one {{}}",
        "a {kind} of my {{}}",
        "a good {kind} of a {{}}",
        "a bright {kind} of the {{}}",
        "a dark {kind} of a {{}}",
        "a cropped {kind} of the {{}}",
        "a close-up {kind} of a {{}}",
        "a {kind} of a clean {{}}",
        "a {kind} of a nice {{}}",
        "a {kind} of a small {{}}",
    )
)  # fmt: skip


@dataclass(frozen=True)
class ViCoSettings(Settings):
    """ViCo's configuration on one GPU; of the steps it documents (300, 350, 400) the last."""

    PRIOR: ClassVar[Prior] = Prior(kind="off")
    TAKES_PRIOR: ClassVar[bool] = False

    w_s: float = numeric(
        1.5,
        0.0,
        1000.0,
        0.05,
        "Weight of the SuDe loss, how strongly category attributes are inherited; 0 is the plain baseline. Paper "
        "Sec. 5.1: 1.5 with ViCo; 0.75 and 3.0 are its flexible values.",
    )
    steps: int = numeric(400, 1, 1_000_000, 1, "Optimizer steps. Source: ViCo documents 300 to 400.")
    learning_rate: float = numeric(
        1e-5, 0.0, 1.0, 1e-7, "Of the image attention blocks; never scaled by the batch. Source: ViCo."
    )
    identifier: str = plain("*", "The new word that will mean your subject in prompts. Source: ViCo.")
    token_learning_rate: float = numeric(
        5e-3, 0.0, 1.0, 1e-4, "Of the new word, times the batch size. Source: ViCo on one GPU."
    )
    initializer: str = plain(
        "", "The word whose embedding the new word starts from; empty is the last word of the category. Source: ViCo."
    )
    vectors: int = numeric(1, 1, 32, 1, "Vectors behind the new word; each takes one of the prompt's 75 places.")
    templates: str = choice(
        "varied",
        ("varied", "plain"),
        "Training captions: varied draws from a list in this project's own words, as ViCo draws from its list; plain "
        "is always 'photo of a *', the paper's template.",
    )
    attention_weight: float = numeric(
        ATTENTION_WEIGHT, 0.0, 1000.0, 1e-4, "Weight of the attention regularisation. Source: ViCo."
    )
    sude_blocks: bool = plain(
        False,
        "Predict the category and the empty caption with the image attention blocks too (two more passes a step), or "
        "as the pretrained model does. Not published.",
    )
    unconditional_image: bool = plain(
        True, "When sampling, let the unconditional half of the guidance see the reference too. Source: ViCo."
    )


# --- The image attention -------------------------------------------------------------------------------------------


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


# --- The baseline --------------------------------------------------------------------------------------------------


class ViCo(LearnsToken):
    """Image attention blocks and the placeholder: 51.2M + 768 parameters for SD1.5."""

    settings = ViCoSettings
    help = (
        "Trains attention to your picture and a new word and leaves the model as it is; every sampling step also looks "
        "at the picture, which doubles its cost."
    )
    switches_off = True
    looks_at_reference = True
    term_labels = {"l_attention": "L_att: how the new word's attention differs from the end token's"}

    @classmethod
    def check(cls, recipe: Recipe, unet: nn.Module) -> None:
        """Raises ValueError for a UNet with no place for image attention, or a placeholder that is no word."""
        super().check(recipe, unet)
        if not places(unet):
            raise ValueError(
                "model has no cross-attention in its decoder (output blocks), where ViCo puts its attention to the "
                "picture: use another baseline for this checkpoint."
            )

    @classmethod
    def words(cls, recipe: Recipe) -> str:
        """The placeholder alone: ViCo's captions do not name the category."""
        return recipe.baseline.identifier

    @classmethod
    def all_captions(cls, recipe: Recipe) -> list[tuple[str, str]]:
        """Every template with the placeholder, and with the category in its place."""
        templates = TEMPLATES if recipe.baseline.templates == "varied" else (captions.TEMPLATE,)
        return [(t.format(recipe.baseline.identifier), t.format(recipe.category)) for t in templates]

    @property
    def own_terms(self) -> dict[str, float]:
        """The attention regularisation."""
        return {"l_attention": self.recipe.baseline.attention_weight}

    def prepare(self, init: torch.Generator) -> list[dict]:
        """The blocks at their learning rate, the word at its own."""
        settings = self.recipe.baseline
        self.pairs = self.all_captions(self.recipe)
        device = next(self.networks.unet.parameters()).device
        self.places = places(self.networks.unet)
        self.blocks = nn.ModuleDict()
        for place, (width, heads) in self.places.items():
            self.blocks[key(place)] = block = ImageBlock(width, heads)
            block.initialize(init)
        self.blocks.to(device)
        self.prepare_token(settings.initializer or self.recipe.category.split()[-1])
        token_rate = settings.token_learning_rate * self.recipe.options.batch_size
        return [
            {"params": list(self.blocks.parameters())},
            {"params": [self.vectors], "lr": token_rate},
        ]

    @property
    def trained(self) -> tuple[int, int]:
        """The blocks, all of them beside the networks."""
        count = sum(20 * width**2 + 17 * width for width, _ in places(self.networks.unet).values())
        return count, count

    def draw(self, count: int, generators: Generators) -> Batch:
        """Pictures, never mirrored, each with a random caption and a random other picture as reference (or itself)."""
        example, sample = self.example, self.recipe.options.sample_latent
        pick, upright = example.pick(count, False, generators)
        other = pick
        if len(example) > 1:
            other = (pick + torch.randint(1, len(example), (count,), generator=generators.crops)) % len(example)
        pairs = [self.pairs[i] for i in torch.randint(len(self.pairs), (count,), generator=generators.crops)]
        return Batch(
            z=example.sample(pick, upright, sample, generators),
            captions=tuple(subject for subject, _ in pairs),
            categories=tuple(category for _, category in pairs),
            reference=example.sample(other, upright, sample, generators),
        )

    def predict(
        self, predict: Predict, x_t: Tensor, t: Tensor, context: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The prediction with attention to the reference, and the attention regularisation summed over the places."""
        words = self.networks.vocabulary
        subject = [words.positions(caption, self.recipe.baseline.identifier) for caption in batch.captions]
        record = self._record(predict, t, context, batch.reference)
        attend = Attend(self.blocks, record.kept, record.masks(subject))
        ends = [(words.end(caption),) for caption in batch.captions]
        losses = [attention_loss(record.column(p, subject), record.column(p, ends)) for p in self.places]
        return predict(x_t, t, context, attend), {"l_attention": torch.stack(losses).sum(0).mean()}

    def predict_reference(self, predict: Predict, x_t: Tensor, t: Tensor, context: Tensor, batch: Batch) -> Tensor:
        """c and u of the pretrained model; or with the image blocks, the mask read at the category's last word."""
        if not self.recipe.baseline.sude_blocks:
            return predict(x_t, t, context)
        words, times = self.networks.vocabulary, len(x_t) // len(batch.z)
        positions = [words.positions(caption, self.recipe.category)[-1:] for caption in batch.categories]
        record = self._record(predict, t, context, batch.reference.repeat(times, 1, 1, 1))
        return predict(x_t, t, context, Attend(self.blocks, record.kept, record.masks(positions * times)))

    def _record(self, predict: Predict, t: Tensor, context: Tensor, reference: Tensor) -> Record:
        record = Record(self.places)
        predict(reference.to(context.device), t, context, record)
        return record

    def notes(self) -> dict:
        """Where the blocks go, their heads, and which halves of the guidance attend."""
        heads = {place: count for place, (_, count) in self.places.items()}
        blocks = ", ".join(place.split(".")[1] for place in heads)
        return {
            "reference": {"heads": heads, "unconditional": self.recipe.baseline.unconditional_image},
            "remark": f"attention to the picture in output blocks {blocks}",
        }

    def result(self) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
        """The blocks, the reference's latent (mean of the first picture's posterior) and the new word."""
        for place in self.places:
            for name, parameter in self.blocks[key(place)].named_parameters():
                yield "reference", f"{place}.{name}", {"value": parameter.detach()}
        yield "reference", "latent", {"value": self.example.mean[:1, 0]}
        yield self.token()
