"""Every hyperparameter of a training, as frozen dataclasses with the published presets and their sources.

A Recipe decides everything random and numeric: the same Recipe, example and models give the same bits on one device.
Each field carries its own bounds and the help text that its widget shows, so that a number, its limits and its source
stand in one line. Sources: "paper" is arXiv 2403.06775 (CVPR 2024); "code" the authors' release (FaceChain-SuDe in
modelscope/facechain); "diffusers" the DreamBooth example of huggingface/diffusers.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from . import captions
from .sude import T0_MODES


def numeric(default: float, low: float, high: float, step: float, help: str):
    """A numeric field with inclusive bounds; `step` is the widget's. An int default makes an integer."""
    return field(default=default, metadata={"low": low, "high": high, "step": step, "help": help})


def choice(default: str, options: tuple[str, ...], help: str):
    """A field that takes one of a few names."""
    return field(default=default, metadata={"options": options, "help": help})


def plain(default, help: str, multiline: bool = False):
    """A switch or a text, of several lines where it says so."""
    return field(default=default, metadata={"help": help, "multiline": multiline})


@dataclass(frozen=True)
class Prior:
    """Prior preservation: what keeps "photo of a dog" meaning any dog while one dog is learned."""

    kind: str = choice(
        "class images",
        ("preset", "class images", "distillation", "off"),
        "preset: what the baseline was published with (DreamBooth 50 class images, Custom Diffusion 200, ViCo none). "
        "class images: pictures of the category drawn from the incoming model. distillation: the pretrained model's "
        "own prediction under the category caption (paper Eq. 14), no pictures but, with DreamBooth, a frozen copy of "
        "the UNet. off: none.",
    )
    w_r: float = numeric(
        2.0, 0.0, 1000.0, 0.1, "Weight of the prior loss. Source: code (upstream DreamBooth uses 1.0)."
    )
    number: int = numeric(50, 1, 10_000, 1, "Class images to draw once; they are kept on disk. Source: code.")
    steps: int = numeric(50, 1, 1000, 1, "Sampling steps of a class image. Source: code.")
    cfg: float = numeric(10.0, 0.0, 100.0, 0.5, "Guidance scale of a class image. Source: code.")
    negative_prompt: str = plain(
        "monochrome, lowres, bad anatomy, worst quality, low quality",  # code, stable_txt2img.py:253
        "For the class images only; never used in training. Source: code.",
    )
    sampler: str = plain("ddim", "ComfyUI sampler of the class images; DDIM with eta 0 as in the code.")
    scheduler: str = plain("ddim_uniform", "ComfyUI scheduler of the class images.")
    image_seed: int = numeric(7, 0, 2**64 - 1, 1, "Noise of the class images. Source: code.")

    @property
    def active(self) -> bool:
        """Whether there is a prior loss."""
        return self.kind != "off" and self.w_r > 0


@dataclass(frozen=True)
class Keeping:
    """What is kept on disk. Nothing here changes what a training learns."""

    on_interrupt: str = choice(
        "keep",
        ("keep", "discard"),
        "When you interrupt a training. keep: its state is saved, and queueing the same again goes on from there. "
        "discard: it starts over.",
    )
    save_interval: float = numeric(
        60.0,
        0.0,
        86400.0,
        1.0,
        "Seconds of training between two saves of its state, from which it goes on after a crash. Large states are "
        "saved less often, so that saving takes at most a twentieth of the time.",
    )
    store_limit: float = numeric(
        20.0,
        0.0,
        100_000.0,
        1.0,
        "Gigabytes that results, states and class images may take in ComfyUI's user folder. What was not used for the "
        "longest time goes first; 0 keeps nothing.",
    )


@dataclass(frozen=True)
class Watching:
    """What is shown while it trains. Nothing here changes what a training learns."""

    preview_prompts: str = plain(
        "photo of a [subject]\nphoto of a [subject] on a beach",
        "Prompts drawn from the weights as they are while it trains, one a line, at most four; [subject] stands for "
        "what names your subject. Always from the same noise, so the pictures show what changes. Type the attributes "
        "you are after.",
        multiline=True,
    )
    preview_every: int = numeric(
        50, 0, 1_000_000, 1, "Training steps between two rows of previews; 0 draws none and costs nothing."
    )
    preview_steps: int = numeric(
        12, 1, 200, 1, "Sampling steps of a preview (DDIM, guidance 7.5). More cost more time."
    )
    preview_limit: float = numeric(
        10.0,
        0.0,
        100.0,
        1.0,
        "The most of the training's time, in percent, that previews may take; the node shows what they took. What "
        "would take more is left out, so on a slow machine previews come rarely or not at all.",
    )

    @property
    def prompts(self) -> list[str]:
        """The preview prompts, without empty lines."""
        lines = (captions.normalize(line) for line in self.preview_prompts.splitlines())
        return [line for line in lines if line]


@dataclass(frozen=True)
class Settings:
    """What every baseline asks for. A baseline's own file subclasses this with its published presets.

    `PRIOR` and `BATCH_SIZE` stand for the options' "preset" and 0; a method that trains nothing class images could
    preserve has no `TAKES_PRIOR`.
    """

    PRIOR: ClassVar[Prior] = Prior()
    BATCH_SIZE: ClassVar[int] = 1
    TAKES_PRIOR: ClassVar[bool] = True

    w_s: float
    steps: int
    learning_rate: float
    identifier: str


@dataclass(frozen=True)
class Options:
    """How to train, whatever the baseline."""

    precision: str = choice(
        "fp32",
        ("fp32", "bf16", "fp16"),
        "Forward and backward pass: fp32 (code), or bf16/fp16 autocast for speed and less activation memory. Trained "
        "weights and optimizer states are always fp32.",
    )
    resolution: int = numeric(
        0,
        0,
        4096,
        8,
        "Side of the square example in pixels; 0 asks the checkpoint (512 px for SD1.x, 768 for SD2.x-v).",
    )
    batch_size: int = numeric(
        0,
        0,
        4096,
        1,
        "Subject samples per step; as many prior samples go with them. 0 is the baseline's own: 1 with DreamBooth and "
        "ViCo, 2 with Custom Diffusion.",
    )
    optimizer: str = choice(
        "AdamW", ("AdamW", "Adafactor"), "AdamW (code), or Adafactor for a fraction of the optimizer memory."
    )
    weight_decay: float = numeric(0.01, 0.0, 1.0, 0.001, "Decoupled weight decay. Source: code (PyTorch's default).")
    max_grad_norm: float = numeric(0.0, 0.0, 1e6, 0.1, "Clip the gradient norm; 0 does not clip. Source: code.")
    gradient_checkpointing: bool = plain(
        True,
        "Recompute each transformer block in the backward pass: less memory, same gradients, slower. Source: code.",
    )
    prior: Prior = field(default_factory=partial(Prior, kind="preset"))
    truncation: bool = plain(
        True, "The truncation of the loss (paper Eq. 9). Off is the paper's ablation: it collapses."
    )
    t0: str = choice(
        "clamp",
        T0_MODES,
        "The loss weight at timestep 0: clamp uses timestep 1's; faithful keeps the released code's, 851 times the "
        "usual (an artefact of its 1e-6).",
    )
    reference: str = choice(
        "current",
        ("current", "pretrained"),
        "Weights behind the category and empty-caption predictions: current (code), or pretrained, a frozen copy of "
        "the UNet (twice its memory; needs a larger w_s).",
    )
    flip: bool = plain(
        True,
        "Mirror the example at random. Source: code. Switch off for writing or one-sided subjects. ViCo never does.",
    )
    fit: str = choice(
        "center crop",
        ("center crop", "squash"),
        "A picture that is not square is cropped, or squashed as the code does (its pictures are all square).",
    )
    sample_latent: bool = plain(
        True, "Draw the latent from the VAE's posterior at every step (code), or take its mode."
    )
    keeping: Keeping = field(default_factory=Keeping)
    watching: Watching = field(default_factory=Watching)

    @property
    def parts(self) -> tuple:
        """These options and those within them, each to be checked by itself."""
        return self, self.prior, self.keeping, self.watching


@dataclass(frozen=True)
class Recipe:
    """One training. `seed` is behind every random number: adapter init, noise, timesteps, flips, posterior samples.

    `method` names the baseline (a key of `baselines.REGISTRY`), `baseline` holds its settings.
    """

    category: str
    method: str
    baseline: Settings
    options: Options = field(default_factory=Options)
    seed: int = 0

    @property
    def uses_pretrained(self) -> bool:
        """Whether a step asks for predictions of the networks as they came in."""
        distils = self.options.prior.kind == "distillation" and self.options.prior.active
        return distils or (self.options.reference == "pretrained" and self.baseline.w_s > 0)

    def as_dict(self) -> dict:
        """Nested plain values of all that decides the result, for metadata and hashing."""
        values = dataclasses.asdict(self)
        del values["options"]["keeping"], values["options"]["watching"]
        return values

    def checked(self) -> "Recipe":
        """This recipe with tidy captions and the baseline's own values in place of "preset" and 0.

        Raises:
            ValueError: a value no training can use: what was given, what is wrong, what to do.
        """
        if not _within(self.seed, 0, 2**64 - 1, whole=True):
            raise ValueError(f"training_seed is {self.seed}, but it must be a whole number from 0 to 2^64 - 1.")
        for values in (self.baseline, *self.options.parts):
            check_values(values)
        if 0 < self.options.resolution < 64 or self.options.resolution % 8:
            raise ValueError(
                f"resolution is {self.options.resolution}: it must be 0 (automatic) or a multiple of 8 from 64 on."
            )
        category, identifier = captions.check(self.category, self.baseline.identifier)
        baseline = dataclasses.replace(tidy(self.baseline), identifier=identifier)
        prior = tidy(baseline.PRIOR if self.options.prior.kind == "preset" else self.options.prior)
        if prior.active and not baseline.TAKES_PRIOR:
            raise ValueError(
                f"prior is {prior.kind!r}, but {self.method} leaves the model as it is and has nothing to preserve: "
                "set prior to 'preset' or 'off' in SuDe Training Options."
            )
        options = dataclasses.replace(
            tidy(self.options), prior=prior, batch_size=self.options.batch_size or baseline.BATCH_SIZE
        )
        return dataclasses.replace(self, category=category, baseline=baseline, options=options, seed=int(self.seed))


def tidy(values):
    """A dataclass of settings with every number of its field's type, so that 1 and 1.0 are the same recipe."""
    kinds = {spec.name: type(spec.default) for spec in dataclasses.fields(values) if "low" in spec.metadata}
    return dataclasses.replace(values, **{name: kind(getattr(values, name)) for name, kind in kinds.items()})


def check_values(values) -> None:
    """Hold a dataclass of settings against its fields' bounds and names; ValueError names field, value and remedy."""
    for spec in dataclasses.fields(values):
        value, limits, preset = getattr(values, spec.name), spec.metadata, spec.default
        if "low" in limits and not _within(value, limits["low"], limits["high"], isinstance(preset, int)):
            kind = "a whole number" if isinstance(preset, int) else "a number"
            bounds = f"from {limits['low']:g} to {limits['high']:g}"
            raise ValueError(f"{spec.name} is {value!r}, but it must be {kind} {bounds}; the preset is {preset:g}.")
        if "options" not in limits and isinstance(value, str):
            captions.check_text(spec.name, value)
        if "options" in limits and value not in limits["options"]:
            raise ValueError(f"{spec.name} is {value!r}, but it must be one of: {', '.join(limits['options'])}.")


def _within(value, low: float, high: float, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low <= value <= high and (not whole or value == int(value))
