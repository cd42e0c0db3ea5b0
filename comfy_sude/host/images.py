"""Pictures through the incoming models: VAE posteriors of pictures, and class images drawn by the incoming MODEL."""

from collections.abc import Sequence

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


def draw_class_images(model, clip, vae, caption: str, side: int, prior: Prior, report) -> Tensor:
    """[number, side, side, 3] pictures of the category in [0, 1], from the MODEL as it came in.

    Source: released code, stable_txt2img.py:253-296 (DDIM, eta 0, its CFG and negative prompt).
    """
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(prior.negative_prompt))
    noise_source = torch.Generator("cpu").manual_seed(prior.image_seed)
    report.phase("drawing class images", prior.number * prior.steps)
    pictures = []
    while sum(map(len, pictures)) < prior.number:
        done = sum(map(len, pictures))
        count = min(DRAW_AT_ONCE, prior.number - done)
        noise = torch.randn(count, 4, side // 8, side // 8, generator=noise_source)

        def progress(step, _x0, _x, total, done=done, count=count):
            report.step(done * prior.steps + count * (step + 1) * prior.steps // total, f"{done}/{prior.number} drawn")

        latents = comfy.sample.sample(
            model, noise, prior.steps, prior.cfg, prior.sampler, prior.scheduler, positive, negative,
            torch.zeros_like(noise), callback=progress, disable_pbar=True, seed=prior.image_seed,
        )  # fmt: skip
        pictures.append(vae.decode(latents).detach().cpu().float().clamp(0, 1))
        comfy.model_management.throw_exception_if_processing_interrupted()
    return torch.cat(pictures)
