"""Pictures through the incoming models: VAE posteriors of pictures, and class images drawn by the incoming MODEL."""

from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.sample
import torch
from torch import Tensor

from ..data import Latents
from ..recipe import Prior

DRAW_AT_ONCE = 4  # class images per sampling batch: progress and interruption between them


def check_vae(vae) -> None:
    """Raises ValueError if there is no VAE that can encode pictures to four latent channels."""
    if vae is None or getattr(vae, "first_stage_model", None) is None:
        raise ValueError("vae is missing: this checkpoint has none, connect a Load VAE node.")
    if vae.latent_channels != 4:
        raise ValueError(f"vae has {vae.latent_channels} latent channels, but SD1.x and SD2.x use 4: load their VAE.")


def encode(vae, latent_format, pixels: Tensor | Sequence[Tensor], report, phase: str) -> Latents:
    """Posteriors of pictures and their mirror images, in model scale.

    ComfyUI's VAE.encode returns the posterior's mode; its moments are read where they pass, without changing the VAE.

    Args:
        vae: ComfyUI VAE.
        latent_format: of the MODEL, for the latent scale.
        pixels: N pictures [H, W, 3] in [0, 1].
        report: progress, one step a picture.
        phase: its name.
    """
    means, stds = [], []
    report.phase(phase, len(pixels))
    for index, image in enumerate(pixels):
        both = torch.stack([image, image.flip(1)])
        mode, moments = _encode_with_moments(vae, both)
        means.append(latent_format.process_in(mode))
        if moments is not None:
            logvar = moments.chunk(2, dim=1)[1].clamp(-30, 20)
            std = (0.5 * logvar).exp()
            # process_in is affine: the difference of two images of it scales a spread
            stds.append(latent_format.process_in(std) - latent_format.process_in(torch.zeros_like(std)))
        report.step(index + 1, "")
    return Latents(torch.stack(means), torch.stack(stds) if len(stds) == len(means) else None)


def _encode_with_moments(vae, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    passed: list[Tensor] = []
    regularization = getattr(vae.first_stage_model, "regularization", None)  # absent in TAESD, which has no posterior
    hook = None
    if regularization is not None:
        hook = regularization.register_forward_pre_hook(
            lambda _module, args: passed.append(args[0].detach().cpu().float())
        )
    try:
        mode = vae.encode(pixels).detach().cpu().float()
    finally:
        if hook is not None:
            hook.remove()
    moments = torch.cat(passed) if passed else None
    if moments is not None and (moments.shape[0], moments.shape[2:]) != (mode.shape[0], mode.shape[2:]):
        moments = None  # encoded in tiles for lack of memory: the pieces do not make one posterior
    if not torch.isfinite(mode).all():
        raise ValueError("vae returned latents that are not finite: its weights are damaged or too large for fp16.")
    return mode, moments


def draw_class_images(
    model,
    clip,
    vae,
    caption: str,
    side: int,
    prior: Prior,
    report,
    find: Callable[[int, int], Tensor | None],
    keep: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """[number, side, side, 3] pictures of the category in [0, 1], from the MODEL as it came in.

    A few at a time, each batch kept as soon as it is drawn and found again another time.
    Source: released code, stable_txt2img.py:253-296 (DDIM, eta 0, its CFG and negative prompt).

    Args:
        model: ComfyUI MODEL.
        clip: ComfyUI CLIP.
        vae: ComfyUI VAE.
        caption: of the category.
        side: px.
        prior: number, sampling settings and seed.
        report: progress.
        find: (index of a batch's first picture, number of pictures) -> [count, side, side, 3] drawn before, or None.
        keep: (index of the first, pictures) -> the pictures as `find` will give them.
    """
    noise_source = torch.Generator("cpu").manual_seed(prior.image_seed)
    conditionings: list = []
    report.phase("looking for class images", prior.number * prior.steps)
    pictures = []
    for first in range(0, prior.number, DRAW_AT_ONCE):
        count = min(DRAW_AT_ONCE, prior.number - first)
        noise = torch.randn(count, 4, side // 8, side // 8, generator=noise_source)
        batch = find(first, count)
        if batch is None or batch.shape != (count, side, side, 3):
            if not conditionings:
                report.phase("drawing class images", prior.number * prior.steps)
                texts = (caption, prior.negative_prompt)
                conditionings = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts]

            def progress(step, _x0, _x, total, first=first, count=count):
                done = first * prior.steps + count * (step + 1) * prior.steps // total
                report.step(done, f"{first}/{prior.number} drawn")

            latents = comfy.sample.sample(
                model, noise, prior.steps, prior.cfg, prior.sampler, prior.scheduler, *conditionings,
                torch.zeros_like(noise), callback=progress, disable_pbar=True, seed=prior.image_seed,
            )  # fmt: skip
            batch = keep(first, vae.decode(latents).detach().cpu().float().clamp(0, 1))
        pictures.append(batch)
        report.step((first + count) * prior.steps, f"{first + count}/{prior.number} class images")
    return torch.cat(pictures)
