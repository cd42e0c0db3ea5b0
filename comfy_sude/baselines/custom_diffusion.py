"""Custom Diffusion (Kumari et al. 2023): keys and values of the cross-attention and one new word.

Sources: "Adobe" is adobe-research/custom-diffusion, the paper's code; "diffusers" its port in huggingface/diffusers.
Where they differ Adobe's way is the default. SuDe's authors published no code for this baseline: which captions and
pixels its loss sees is this project's reading (the sample's own caption without the placeholder; the whole sample).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import captions
from ..data import Generators, Views, to_square, view_generator
from ..recipe import Prior, Recipe, Settings, choice, numeric, plain
from .base import Batch, LearnsToken

CELL = 8  # pixels of a latent cell
SMALL_PREFIXES = ("a far away", "very small")  # Adobe, finetune_data.py:212-256
ZOOM_PREFIXES = ("zoomed in", "close up")
SMALL_BELOW = 0.6  # of the side; a picture resized to less than that is pasted on a grey canvas. Adobe
SHRINK_SHARE = (
    2 / 3
)  # of the draws take a size from a third of the side up to it, the others 1.2 to 1.4 times it. Adobe


@dataclass(frozen=True)
class CustomDiffusionSettings(Settings):
    """Adobe's configuration for one GPU: batches of two subject and two class images, 500 steps."""

    # Adobe, finetune_gen.sh: 200 pictures, DDIM with eta 1 (which euler_ancestral is, step for step), guidance 6
    PRIOR: ClassVar[Prior] = Prior(
        w_r=1.0, number=200, steps=50, cfg=6.0, negative_prompt="", sampler="euler_ancestral"
    )
    BATCH_SIZE: ClassVar[int] = 2  # of Adobe's batch of 4 from one shuffled pool, half are subject pictures on average

    w_s: float = numeric(
        2.0,
        0.0,
        1000.0,
        0.05,
        "Weight of the SuDe loss, how strongly category attributes are inherited; 0 is the plain baseline. Paper "
        "Sec. 5.1: 2.0 with Custom Diffusion; 1.0 and 4.0 are its flexible values.",
    )
    steps: int = numeric(500, 1, 1_000_000, 1, "Optimizer steps. Source: 250 on two GPUs (Adobe), 500 on one.")
    learning_rate: float = numeric(
        1e-5, 0.0, 1.0, 1e-7, "Before scaling, one for keys, values and the new word. Source: Adobe, diffusers."
    )
    identifier: str = plain("<new1>", "The new word that will mean your subject in prompts. Source: Adobe, diffusers.")
    scale_learning_rate: bool = plain(
        True,
        "Multiply the learning rate by the pictures of a step, class images included: 4 by default. Source: Adobe.",
    )
    initializer: str = plain("ktn", "The word whose embedding the new word starts from, a rare one. Source: Adobe.")
    vectors: int = numeric(1, 1, 32, 1, "Vectors behind the new word; each takes one of the prompt's 75 places.")
    augmentation: str = choice(
        "Adobe",
        ("Adobe", "diffusers", "off"),
        "Shrink or enlarge the picture at random, say so in the caption and train only where it is. Adobe leaves sizes "
        "from 0.6 on alone; diffusers shrinks by those too; off always shows the whole picture.",
    )
    views: int = numeric(
        200,
        1,
        100_000,
        1,
        "Shrunk and enlarged views (each also mirrored) that are made before training, so that the VAE can leave the "
        "GPU; Adobe makes a new one at every step.",
    )
    loss_norm: str = choice(
        "mean",
        ("mean", "Adobe", "diffusers"),
        "Scale of the loss: mean, as with the other baselines; Adobe sums over the four latent channels, which makes "
        "w_s four times weaker; diffusers does that for the subject only, which makes class images weaker too.",
    )
    sude_mask: bool = plain(
        False, "Let the SuDe loss look only where an augmented picture is, or everywhere. Not published."
    )


class View(NamedTuple):
    """A picture resized to `size` and pasted on a grey canvas at (top, left), or, if larger, cropped from there."""

    image: int
    size: int
    top: int
    left: int
    prefix: str


class Rendered(Sequence):
    """Views as pictures [side, side, 3], each made when it is asked for."""

    def __init__(self, views: list[View], images: Tensor, side: int, fit: str):
        self.views, self.images, self.side, self.fit = views, images, side, fit

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> Tensor:
        view, side = self.views[index], self.side
        picture = to_square(self.images[view.image][None], view.size, self.fit)[0]
        if view.size > side:
            return picture[view.top : view.top + side, view.left : view.left + side]
        canvas = torch.full((side, side, 3), 0.5)  # 0 in the model's range of -1 to 1
        canvas[view.top : view.top + view.size, view.left : view.left + view.size] = picture
        return canvas


class CustomDiffusion(LearnsToken):
    """attn2's to_k and to_v of every cross-attention and the placeholder: 19.2M + 768 parameters for SD1.5."""

    settings = CustomDiffusionSettings
    help = (
        "Trains the cross-attention's keys and values and a new word: small result, quick, keeps the rest of the model."
    )
    switches_off = True

    @classmethod
    def check(cls, recipe: Recipe, unet: nn.Module) -> None:
        """Raises ValueError for a UNet without cross-attention, or a placeholder that is no word of its own."""
        super().check(recipe, unet)
        if not captions.normalize(recipe.baseline.initializer):
            raise ValueError("initializer is empty: type the word the new word starts from, for example ktn.")
        if not any(_keys_and_values(unet)):
            raise ValueError("model has no cross-attention to text, which Custom Diffusion trains: use DreamBooth.")

    @classmethod
    def all_captions(cls, recipe: Recipe) -> list[tuple[str, str]]:
        """The caption as it is and after each prefix."""
        augmented = recipe.baseline.augmentation != "off"
        prefixes = ("", *(SMALL_PREFIXES + ZOOM_PREFIXES if augmented else ()))
        return [(_prefixed(p, a), _prefixed(p, c)) for a, c in super().all_captions(recipe) for p in prefixes]

    @classmethod
    def views(cls, recipe: Recipe, images: Tensor, side: int) -> Views:
        """The pictures as they are, and random shrunk and enlarged views of them."""
        settings, fit = recipe.baseline, recipe.options.fit
        if settings.augmentation == "off":
            return super().views(recipe, images, side)
        always = settings.augmentation == "diffusers"
        views = [View(index, side, 0, 0, "") for index in range(len(images))]
        g = view_generator(recipe.seed)
        while len(views) < len(images) + settings.views:
            image, size = _integer(0, len(images) - 1, g), _size(side, g)
            top, left = (_integer(0, abs(side - size), g) for _ in range(2))
            if size > side:
                views.append(View(image, size, top, left, ZOOM_PREFIXES[_integer(0, 1, g)]))
            elif size < SMALL_BELOW * side:
                views.append(View(image, size, top, left, SMALL_PREFIXES[_integer(0, 1, g)]))
            elif always:
                views.append(View(image, size, top, left, ""))
        unchanged = 0.0 if always else _share_unchanged(side)
        weights = [unchanged / len(images)] * len(images) + [(1 - unchanged) / settings.views] * settings.views
        masks = torch.stack([_mask(side, view) for view in views])
        prefixes = tuple(view.prefix for view in views)
        return Views(Rendered(views, images, side, fit), prefixes, masks, torch.tensor(weights))

    def prepare(self, init: torch.Generator) -> list[dict]:
        """One parameter group at one learning rate; keys and values of the start token take no gradient."""
        settings, options = self.recipe.baseline, self.recipe.options
        self.layers = dict(_keys_and_values(self.networks.unet))
        for layer in self.layers.values():
            layer.weight.requires_grad_(True)
            layer.register_forward_hook(_detach_start)
        if self.recipe.uses_pretrained:
            self.incoming = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self.prepare_token(settings.initializer)
        pictures = options.batch_size * (2 if options.prior.active else 1)
        rate = settings.learning_rate * (pictures if settings.scale_learning_rate else 1)
        return [{"params": [*(layer.weight for layer in self.layers.values()), self.vectors], "lr": rate}]

    @property
    def trained(self) -> tuple[int, int]:
        """Keys, values and the new word's vectors."""
        weights = sum(layer.weight.numel() for _, layer in _keys_and_values(self.networks.unet))
        return weights, 0

    def draw(self, count: int, generators: Generators) -> Batch:
        """Random views with their captions and masks."""
        example, views = self.example, self.example.views
        pick, mirrored = example.pick(count, self.recipe.options.flip, generators)
        z = example.sample(pick, mirrored, self.recipe.options.sample_latent, generators)
        prefixes = [views.prefixes[i] if views and views.prefixes else "" for i in pick]
        mask = None
        if views is not None and views.masks is not None:
            mask = views.masks[pick]
            mask = torch.where(mirrored.bool()[:, None, None], mask.flip(-1), mask)[:, None]
        subject, category = self.subject_caption, self.category_caption
        return Batch(
            z, tuple(_prefixed(p, subject) for p in prefixes), tuple(_prefixed(p, category) for p in prefixes), mask
        )

    def subject_loss(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """Mean squared error where the mask is 1; times the channels with Adobe's or diffusers' normalisation."""
        error = (prediction - target).float().pow(2)
        mask = torch.ones_like(error[:, :1]) if mask is None else mask.to(error)
        loss = (error * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)
        return loss / error.shape[1] if self.recipe.baseline.loss_norm == "mean" else loss

    def prior_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Like the subject's; diffusers takes the plain mean here."""
        loss = (prediction - target).float().pow(2).flatten(1).mean(1)
        return loss * prediction.shape[1] if self.recipe.baseline.loss_norm == "Adobe" else loss

    def support(self, batch: Batch) -> Tensor | None:
        """The masks, if asked for."""
        return batch.mask if self.recipe.baseline.sude_mask else None

    @contextmanager
    def pretrained(self):
        """The incoming keys and values, put in place of the trained ones."""
        trained = {name: layer.weight.data for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer.weight.data = self.incoming[name]
            yield
        finally:
            for name, layer in self.layers.items():
                layer.weight.data = trained[name]

    def result(self) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
        """Keys, values and the new word."""
        for name, layer in self.layers.items():
            yield "model", f"{name}.weight", {"weight": layer.weight.detach()}
        yield self.token()


def _keys_and_values(unet: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers of every cross-attention's key and value projection."""
    for name, layer in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            yield name, layer


def _detach_start(_layer: nn.Module, _args: tuple, output: Tensor) -> Tensor:
    """Keys or values [B, tokens, width] with no gradient through token 0. Source: Adobe, model.py:154; diffusers."""
    if not output.requires_grad:
        return output
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)


def _prefixed(prefix: str, caption: str) -> str:
    return f"{prefix} {caption}" if prefix else caption


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """A random integer, both ends included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _size(side: int, generator: torch.Generator) -> int:
    """The side a picture is resized to, even. Source: Adobe, finetune_data.py:212-220."""
    if torch.rand((), generator=generator) < SHRINK_SHARE:
        size = _integer(side // 3, side, generator)
    else:
        size = _integer(int(1.2 * side), int(1.4 * side) - 1, generator)
    return size + size % 2


def _share_unchanged(side: int) -> float:
    """Probability that a size lies between 0.6 of the side and the side."""
    sizes = [size + size % 2 for size in range(side // 3, side + 1)]
    return SHRINK_SHARE * sum(SMALL_BELOW * side <= size <= side for size in sizes) / len(sizes)


def _mask(side: int, view: View) -> Tensor:
    """[side/8, side/8] of 1 on the latent cells inside a pasted picture, without its border cells; all if it fills it.

    Source: Adobe, finetune_data.py:233-236. Pictures so small that this leaves no cell keep their whole cells.
    """
    mask = torch.zeros(side // CELL, side // CELL)
    if view.size >= side:
        return mask + 1
    starts = (view.top, view.left)
    rows, columns = (slice(start // CELL + 1, (start + view.size) // CELL - 1) for start in starts)
    if not mask[rows, columns].numel():
        rows, columns = (slice(-(-start // CELL), (start + view.size) // CELL) for start in starts)
    mask[rows, columns] = 1
    return mask
