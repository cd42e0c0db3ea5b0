"""From pictures to what the loop draws from: square pixels, both mirror images, and their latent posteriors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MIN_SIDE = 64  # px; below this a picture holds nothing a latent model could learn (8 x 8 latent cells)


def check_images(images, name: str = "image") -> Tensor:
    """The pictures as finite RGB values in [0, 1], an alpha channel composited on white.

    Args:
        images: IMAGE tensor [B, H, W, C], C = 1, 3 or 4.
        name: the input's name, for the message.

    Returns:
        [B, H, W, 3] float32, an ordinary (not inference-mode) tensor when called outside inference mode.

    Raises:
        ValueError: not such a tensor, an empty batch, sides under 64 px, or pixels that are not finite.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{name} is {shape}, but an IMAGE batch [B, H, W, 3] is needed: connect a Load Image node.")
    if len(images) == 0:
        raise ValueError(f"{name} is an empty batch: connect at least one picture.")
    height, width = images.shape[1:3]
    if min(height, width) < MIN_SIDE:
        raise ValueError(
            f"{name} is {width} x {height} px, but both sides need at least {MIN_SIDE} px: use a larger picture."
        )
    pixels = images.detach().to(device="cpu", dtype=torch.float32).clone()
    if not torch.isfinite(pixels).all():
        raise ValueError(f"{name} has pixels that are not finite numbers (NaN or infinity): load the picture again.")
    pixels = pixels.clamp(0, 1)
    if pixels.shape[-1] == 4:
        alpha = pixels[..., 3:]
        pixels = pixels[..., :3] * alpha + (1 - alpha)
    return pixels.expand(*pixels.shape[:3], 3).contiguous()


def to_pil(picture: Tensor) -> Image.Image:
    """A picture [H, W, C] in [0, 1] (C = 1, 3, or 4 with an alpha that is left out) as 8-bit RGB."""
    rgb = torch.nan_to_num(picture[..., :3].detach().float()).expand(*picture.shape[:2], 3)
    return Image.fromarray((rgb.clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous().numpy())


def from_pil(image: Image.Image) -> Tensor:
    """[1, H, W, 3] IMAGE in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).float()[None] / 255


def to_square(pixels: Tensor, side: int, fit: str = "center crop") -> Tensor:
    """[B, H, W, 3] -> [B, side, side, 3], bicubic with antialiasing, clamped to [0, 1].

    Source: the released code squashes (personalized.py:196-231, bicubic); "center crop" keeps proportions.
    """
    if fit == "center crop":
        height, width = pixels.shape[1:3]
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        pixels = pixels[:, top : top + short, left : left + short]
    x = pixels.movedim(-1, 1)
    if x.shape[-2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return x.clamp(0, 1).movedim(1, -1).contiguous()


@dataclass(frozen=True)
class Views:
    """Square pictures to train on, and what a baseline knows of each.

    Attributes:
        pixels: N pictures [side, side, 3] in [0, 1], a tensor or a sequence that makes them when asked.
        prefixes: words before each one's caption; none if there are none.
        masks: [N, h, w] on the latent grid, 1 where the subject's picture is; None if it fills every view.
        weights: how often each is drawn, relative to the others; None if equally often.
    """

    pixels: Tensor | Sequence[Tensor]
    prefixes: tuple[str, ...] = ()
    masks: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class Latents:
    """Posteriors of N pictures, as they are and mirrored, in model scale.

    Attributes:
        mean: [N, 2, C, h, w], index 1 of the second axis is the mirror image.
        std: like mean, or None for an autoencoder without a posterior (TAESD).
        views: what they were made from, for baselines that augment.
    """

    mean: Tensor
    std: Tensor | None = None
    views: Views | None = None

    def __len__(self) -> int:
        return len(self.mean)

    def pick(self, count: int, flip: bool, generators: "Generators") -> tuple[Tensor, Tensor]:
        """[count] indices of random pictures and [count] of 0 or, with probability 1/2 if `flip`, 1 for mirrored."""
        weights = self.views.weights if self.views else None
        if weights is None:
            pick = torch.randint(len(self), (count,), generator=generators.crops)
        else:
            pick = torch.multinomial(weights, count, replacement=True, generator=generators.crops)
        mirrored = (
            torch.randint(2, (count,), generator=generators.crops) if flip else torch.zeros(count, dtype=torch.long)
        )
        return pick, mirrored

    def sample(self, pick: Tensor, mirrored: Tensor, sample: bool, generators: "Generators") -> Tensor:
        """[count, C, h, w] the picked latents, sampled from their posterior or its mean."""
        z = self.mean[pick, mirrored]
        if sample and self.std is not None:
            z = z + self.std[pick, mirrored] * torch.randn(z.shape, generator=generators.posterior)
        return z

    def draw(self, count: int, flip: bool, sample: bool, generators: "Generators") -> Tensor:
        """[count, C, h, w] latents: random pictures, mirrored with probability 1/2, sampled from their posterior."""
        return self.sample(*self.pick(count, flip, generators), sample, generators)


def view_generator(seed: int) -> torch.Generator:
    """The stream behind augmented views, which are drawn before the training's own streams begin."""
    return torch.Generator("cpu").manual_seed((seed + 2**63) % 2**64)


class Generators:
    """The training's random streams, each its own CPU torch.Generator so that none shifts another.

    `init` (adapters), `crops` (picture and mirror picks), `posterior`, `timesteps`, `noise`.
    """

    NAMES = ("init", "crops", "posterior", "timesteps", "noise")

    def __init__(self, seed: int):
        for index, name in enumerate(self.NAMES):
            generator = torch.Generator("cpu").manual_seed((seed * len(self.NAMES) + index) % 2**64)
            setattr(self, name, generator)

    def state(self) -> dict[str, Tensor]:
        """Where every stream is."""
        return {name: getattr(self, name).get_state() for name in self.NAMES}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put every stream back to where it was."""
        for name in self.NAMES:
            getattr(self, name).set_state(state[name])
