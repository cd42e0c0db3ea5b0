"""The contract of a baseline: what trains, on which captions and pictures, its loss on the example, what it leaves.

A new baseline is a new file with a Settings and a Baseline subclass, and one line in `baselines/__init__.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import captions
from ..data import Generators, Latents, Views, to_square
from ..recipe import Recipe, Settings


class Vocabulary(Protocol):
    """The text encoder's words, for baselines that learn a new one."""

    def vectors(self, text: str) -> Tensor:
        """[tokens, width] the pretrained embeddings of a text's tokens, without start and end."""

    def learn(self, placeholder: str, vectors: nn.Parameter) -> None:
        """Let `placeholder` stand for `vectors` [n, width] in every caption encoded from now on."""

    def positions(self, caption: str, word: str) -> tuple[int, ...]:
        """Where the tokens of the first `word` stand in the caption's sequence; empty if it does not occur."""

    def end(self, caption: str) -> int:
        """Where the caption's first end token stands."""


class Taps(Protocol):
    """What a prediction may look at and change inside the UNet, at some of its transformers."""

    places: Collection[str]
    """Transformers by name, "output_blocks.4.1"."""
    wants_attention: bool
    """Whether `attention` is to be called."""

    def tokens(self, place: str, tokens: Tensor) -> Tensor:
        """What goes on in place of the [B, n, width] that came out of the transformer's last block."""

    def attention(self, place: str, probabilities: Tensor) -> None:
        """See the [B, n, text tokens] attention of picture to text in that block, the mean over its heads."""


Predict = Callable[..., Tensor]
"""(x_t [B, C, h, w], t [B], context [B, tokens, width], taps=None) -> raw prediction [B, C, h, w]."""


@dataclass(frozen=True)
class Networks:
    """The trainable copies a baseline works on: ordinary modules of fp32 parameters, all frozen when they arrive.

    Attributes:
        unet: the diffusion model, parameters named as in the checkpoint's `diffusion_model.`.
        text_encoder: the text model, parameters named as in ComfyUI's CLIP patcher (`clip_l.transformer...`).
        vocabulary: the text model's words.
    """

    unet: nn.Module
    text_encoder: nn.Module
    vocabulary: Vocabulary | None = None


@dataclass(frozen=True)
class Batch:
    """Subject samples of one step, before noise.

    Attributes:
        z: [B, C, h, w] latents (model scale).
        captions: the subject caption of each sample.
        categories: each caption without the subject: what c is predicted under.
        mask: optional [B, 1, h, w], 1 where the sample shows the picture.
        reference: optional [B, C, H, W] clean latents of another view of the subject.
    """

    z: Tensor
    captions: tuple[str, ...]
    categories: tuple[str, ...]
    mask: Tensor | None = None
    reference: Tensor | None = None


class Baseline(ABC):
    """One fine-tuning method on one pair of networks."""

    settings: type[Settings]
    """Its settings with the published presets; the node's inputs are made from them."""
    help: str
    """One line for the node's tooltip."""

    switches_off: bool = False
    """Whether `pretrained` can make the trainable networks predict as before training; if not, a frozen copy must."""
    looks_at_reference: bool = False
    """Whether `predict` runs the networks on a reference picture as well."""
    own_terms: dict[str, float] = {}
    """Loss terms that `predict` adds, by the name they have in the log, with their weights."""
    term_labels: dict[str, str] = {}
    """What the chart calls them."""

    example: Latents
    """Posteriors of the subject's pictures, set by the Trainer."""

    def __init__(self, recipe: Recipe, networks: Networks):
        self.recipe = recipe = recipe.checked()  # presets filled in, whoever made it
        self.networks = networks
        self.subject_caption = captions.prompt(self.words(recipe))
        self.category_caption = captions.category_caption(recipe.category)

    # --- Before the networks are there

    @classmethod  # noqa: B027 - a method may have nothing to check
    def check(cls, recipe: Recipe, unet: nn.Module) -> None:
        """Raises ValueError if this recipe or UNet (only its modules are read) cannot be trained by this method."""

    @classmethod
    def words(cls, recipe: Recipe) -> str:
        """What names the subject in a prompt: "sks dog"."""
        return captions.normalize(f"{recipe.baseline.identifier} {recipe.category}")

    @classmethod
    def placeholder(cls, recipe: Recipe) -> tuple[str, int] | None:
        """The word this method adds to the vocabulary and the number of its vectors, if any."""
        return None

    @classmethod
    def all_captions(cls, recipe: Recipe) -> list[tuple[str, str]]:
        """Every subject caption a training may use, with the same caption of its category."""
        return [(captions.prompt(cls.words(recipe)), captions.category_caption(recipe.category))]

    @classmethod
    def views(cls, recipe: Recipe, images: Tensor, side: int) -> Views:
        """The square pictures to train on, from images [N, H, W, 3] in [0, 1]."""
        return Views(to_square(images, side, recipe.options.fit))

    # --- In training

    @abstractmethod
    def prepare(self, init: torch.Generator) -> list[dict]:
        """Mark what trains, adding what is drawn from `init` if needed; the optimizer's parameter groups."""

    @property
    def trained(self) -> tuple[int, int]:
        """Numbers of trained parameters and, among them, of those beside the networks', for the memory estimate."""
        modules = [self.networks.unet] + ([self.networks.text_encoder] if self.changes(self.subject_caption) else [])
        return sum(p.numel() for module in modules for p in module.parameters()), 0

    @abstractmethod
    def changes(self, caption: str) -> bool:
        """Whether a caption's encoding changes during training."""

    def draw(self, count: int, generators: Generators) -> Batch:
        """The next subject samples, drawn from `example`."""
        options = self.recipe.options
        z = self.example.draw(count, options.flip, options.sample_latent, generators)
        return Batch(z, (self.subject_caption,) * count, (self.category_caption,) * count)

    def predict(
        self, predict: Predict, x_t: Tensor, t: Tensor, context: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The raw prediction that trains, and this method's own loss terms (scalars).

        The first rows are the batch's subject samples, the others (if any) are class images.
        """
        return predict(x_t, t, context), {}

    def predict_reference(self, predict: Predict, x_t: Tensor, t: Tensor, context: Tensor, batch: Batch) -> Tensor:
        """The raw predictions c and u, or u alone, without gradient: once or twice as many rows as the batch has."""
        return predict(x_t, t, context)

    def predict_sample(self, predict: Predict, x_t: Tensor, t: Tensor, context: Tensor, caption: str) -> Tensor:
        """Raw predictions as when sampling: the first row under `caption`, the second (if any) under the empty one."""
        return predict(x_t, t, context)

    def subject_loss(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """L_sub per sample: [B], plain mean squared error in the model's own prediction space (code, ddpm.py:1244)."""
        return (prediction - target).float().pow(2).flatten(1).mean(1)

    def prior_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """L_reg of class images per sample: [B]."""
        return self.subject_loss(prediction, target, None)

    def support(self, batch: Batch) -> Tensor | None:
        """Where the SuDe loss looks: [B, 1, h, w], or None for everywhere."""
        return None

    def pretrained(self) -> AbstractContextManager:
        """A context in which the networks predict as before training, for baselines that say `switches_off`."""
        return nullcontext()

    def notes(self) -> dict:
        """What sampling must know beside the tensors, as JSON values for the Subject's metadata."""
        return {}

    @abstractmethod
    def result(self) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
        """What was learned, as (network, name, tensors).

        "model" or "clip" and a weight's name, with {"weight": the trained fp32 weight} (stored as its difference to the
        incoming one) or a low-rank update {"up", "down", "alpha"}; "token" and a placeholder, with {"vectors":
        [n, width]}; "reference" and a name, with {"value"}: what attention to a reference picture needs.
        """


def train_all(module: nn.Module) -> list[nn.Parameter]:
    """Unfreeze every parameter of a module and return them."""
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


class LearnsToken(Baseline):
    """A baseline that leaves the text encoder frozen and learns vectors for a new word, the placeholder."""

    @classmethod
    def placeholder(cls, recipe: Recipe) -> tuple[str, int]:
        """The identifier."""
        return recipe.baseline.identifier, recipe.baseline.vectors

    @classmethod
    def check(cls, recipe: Recipe, unet: nn.Module) -> None:
        """Raises ValueError if the placeholder cannot be told from the rest of a caption."""
        captions.check_placeholder(recipe.baseline.identifier, [category for _, category in cls.all_captions(recipe)])

    def changes(self, caption: str) -> bool:
        """Only captions with the placeholder change."""
        return captions.holds(caption, self.recipe.baseline.identifier)

    def prepare_token(self, initializer: str) -> None:
        """Trainable `vectors` [n, width] behind the placeholder, all starting as the initializer's mean embedding."""
        word, count = self.placeholder(self.recipe)
        start = self.networks.vocabulary.vectors(initializer).mean(0, keepdim=True)
        self.vectors = nn.Parameter(start.float().repeat(count, 1))
        self.networks.vocabulary.learn(word, self.vectors)

    def token(self) -> tuple[str, str, dict[str, Tensor]]:
        """The learned vectors, as `result` gives them."""
        return "token", self.recipe.baseline.identifier, {"vectors": self.vectors.detach()}
