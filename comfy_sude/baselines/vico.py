"""ViCo (Hao et al. 2023): everything frozen, attention to a reference picture and one new word.

Source: haoosz/ViCo. A clean latent of the reference picture runs through the same UNet, at the same timestep and under
the same caption as the noisy one. At four places of the decoder a new transformer block lets the noisy stream attend
to the reference's tokens there, masked to where the reference itself attends to the new word. SuDe's authors published
no code for this baseline; this project predicts c and u without the new blocks, as the pretrained model does, unless
told otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import captions
from ..data import Generators
from ..image_attention import Attend, ImageBlock, Record, attention_loss, key, places
from ..recipe import Prior, Recipe, Settings, choice, numeric, plain
from .base import Batch, LearnsToken, Predict

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

    def predict_sample(self, predict: Predict, x_t: Tensor, t: Tensor, context: Tensor, caption: str) -> Tensor:
        """With attention to the first picture, as host/reference.py samples."""
        words, rows = self.networks.vocabulary, len(x_t) if self.recipe.baseline.unconditional_image else 1
        at = words.positions(caption, self.recipe.baseline.identifier) or (words.end(caption),)
        record = self._record(predict, t[:rows], context[:rows], self.example.mean[:1, 0].repeat(rows, 1, 1, 1))
        some = None if rows == len(x_t) else torch.arange(rows, device=x_t.device)
        return predict(x_t, t, context, Attend(self.blocks, record.kept, record.masks([at] * rows), some))

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
