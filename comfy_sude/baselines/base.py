"""The contract of a baseline: which parameters train, its captions, its loss on the example, what it leaves behind.

A new baseline is a new file with a Settings and a Baseline subclass, and one line in `baselines/__init__.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import captions
from ..recipe import Recipe, Settings


@dataclass(frozen=True)
class Networks:
    """The trainable copies a baseline works on: ordinary modules of fp32 parameters, all frozen when they arrive.

    Attributes:
        unet: the diffusion model, parameters named as in the checkpoint's `diffusion_model.`.
        text_encoder: the text model, parameters named as in ComfyUI's CLIP patcher (`clip_l.transformer...`).
    """

    unet: nn.Module
    text_encoder: nn.Module


class Baseline(ABC):
    """One fine-tuning method on one pair of networks."""

    settings: type[Settings]
    """Its settings with the published presets; the node's inputs are made from them."""
    help: str
    """One line for the node's tooltip."""

    switches_off: bool = False
    """Whether `pretrained` can make the trainable networks predict as before training; if not, a frozen copy must."""
    trainable_share: float = 1.0
    """Share of the networks' parameters that train, for the memory estimate."""

    def __init__(self, recipe: Recipe, networks: Networks):
        self.recipe = recipe
        self.networks = networks
        self.subject_caption = captions.subject_caption(recipe.category, recipe.baseline.identifier)
        self.category_caption = captions.category_caption(recipe.category)

    @abstractmethod
    def prepare(self, init: torch.Generator) -> list[dict]:
        """Mark what trains, adding adapters drawn from `init` if needed; the optimizer's parameter groups."""

    @property
    @abstractmethod
    def trains_text(self) -> bool:
        """Whether a caption's encoding changes during training."""

    def subject_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """L_sub per sample: [B], plain mean squared error in the model's own prediction space (code, ddpm.py:1244)."""
        return (prediction - target).float().pow(2).flatten(1).mean(1)

    def pretrained(self) -> AbstractContextManager:
        """A context in which the networks predict as before training, for baselines that say `switches_off`."""
        return nullcontext()

    @abstractmethod
    def result(self) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
        """What was learned, as (network "model" or "clip", weight name, tensors).

        Tensors are {"weight": the trained fp32 weight} (stored as its difference to the incoming one) or a low-rank
        update {"up", "down", "alpha"}.
        """


def train_all(module: nn.Module) -> list[nn.Parameter]:
    """Unfreeze every parameter of a module and return them."""
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters
