"""From a MODEL, a CLIP, a VAE and pictures to a Subject: everything in the order in which it has to happen."""

import dataclasses
import gc
import logging
import traceback
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import captions, data, store
from .baselines import REGISTRY
from .baselines.base import Networks
from .host import images, memory, text
from .host import model as host_model
from .recipe import Prior, Recipe
from .subject import Subject
from .train import Predictors, Trainer


def fine_tune(model, clip, vae, image, recipe: Recipe, report, cache: Path, class_images=None) -> Subject:
    """Train a subject. The MODEL, CLIP and VAE are only read, whatever happens.

    Args:
        model: ComfyUI MODEL (SD1.x or SD2.x).
        clip: ComfyUI CLIP of the same checkpoint.
        vae: ComfyUI VAE.
        image: [N, H, W, C] IMAGE of the subject; one picture is what the method is made for.
        recipe: what to do; checked here.
        report: a `host.progress.Progress`.
        cache: folder for class images.
        class_images: optional [N, H, W, C] IMAGE of the category; replaces drawing them.

    Raises:
        ValueError: something given that no training can use, before anything is trained.
        FloatingPointError: the loss stopped being finite.
    """
    recipe = recipe.checked()
    process, side = check_inputs(model, clip, vae, recipe)
    views = REGISTRY[recipe.method].views(recipe, data.check_images(image, "image"), side)
    if class_images is not None:
        class_images = data.check_images(class_images, "class_images")
    model = host_model.without_patches(model)
    latent_format = model.get_model_object("latent_format")
    prior = recipe.options.prior
    prior_latents = None
    if prior.kind == "class images" and prior.active:
        if class_images is None:
            class_images = _class_images(model, clip, vae, recipe, side, report, cache)
        squares = data.to_square(class_images, side, recipe.options.fit)
        prior_latents = images.encode(vae, latent_format, squares, report, "encoding class images")
    example = images.encode(vae, latent_format, views.pixels, report, "encoding the example")
    try:
        with torch.inference_mode(False), torch.enable_grad():
            example, prior_latents = _ordinary(example, views), _ordinary(prior_latents)
            return _train(model, clip, process, recipe, example, prior_latents, side, report)
    except BaseException as error:
        # else the copies and the optimizer live for as long as the error is handled
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        gc.collect()


def check_inputs(model, clip, vae, recipe: Recipe):
    """The noise process and the side in pixels to train at; ValueError names what is missing or unsupported."""
    if model is None:
        raise ValueError("model is missing: connect the MODEL of a checkpoint.")
    if clip is None:
        raise ValueError("clip is missing: this checkpoint has no text encoder, connect a CLIP loader.")
    images.check_vae(vae)
    process = host_model.check_supported(model)
    method = REGISTRY[recipe.method]
    method.check(recipe, model.model.diffusion_model)
    wanted = [caption for pair in method.all_captions(recipe) for caption in pair]
    text.check_captions(clip, model, wanted, method.placeholder(recipe))
    return process, recipe.options.resolution or host_model.native_resolution(model)


def _class_images(model, clip, vae, recipe: Recipe, side: int, report, cache: Path) -> Tensor:
    """[number, side, side, 3] class images from the store, or drawn now and stored as bytes."""
    prior: Prior = recipe.options.prior
    caption = captions.category_caption(recipe.category)
    report.phase("looking for class images", 1)
    settings = {name: value for name, value in dataclasses.asdict(prior).items() if name not in ("kind", "w_r")}
    name = store.key(
        what="class images 1", models=host_model.identity(model, clip, vae), caption=caption, side=side, **settings
    )
    entries = store.Store(cache / "class_images")
    found = entries.get(name)
    if found is not None and found["images"].shape == (prior.number, side, side, 3):
        logging.info("SuDe: %d class images of %r found on disk", prior.number, recipe.category)
        return found["images"].float() / 255
    drawn = images.draw_class_images(model, clip, vae, caption, side, prior, report)
    pictures = (drawn * 255).round().to(torch.uint8)
    entries.put(name, {"images": pictures}, {"caption": caption})
    return pictures.float() / 255


def _train(model, clip, process, recipe: Recipe, example, prior_latents, side: int, report) -> Subject:
    """Build the copies, train them, take the result as differences, release everything."""
    report.phase("copying the networks", 1)
    device = model.load_device
    base = host_model.build_unet(model)
    text_encoder = text.build_text_encoder(clip)
    needs_copy = recipe.uses_pretrained and not REGISTRY[recipe.method].switches_off
    frozen = host_model.build_unet(model) if needs_copy else None
    if recipe.options.gradient_checkpointing:
        host_model.checkpoint_blocks(base.diffusion_model)
    encoder = text.Encoder(clip, text_encoder, device)
    baseline = REGISTRY[recipe.method](recipe, Networks(base.diffusion_model, text_encoder, encoder))
    copies = [base, text_encoder] + ([frozen] if frozen else [])
    with memory.Residence(copies, device, memory.estimate(baseline, example.mean.shape[-2:])):
        predictors = Predictors(
            process=process,
            predict=partial(host_model.predict, base),
            encode=encoder,
            device=device,
            frozen=partial(host_model.predict, frozen) if frozen else None,
        )
        trainer = Trainer(baseline, predictors, example, prior_latents)
        log = trainer.run(report)
        trainer.optimizer = None  # its states are half of the memory; the result needs none of them
        report.phase("taking the result", 1)
        tensors = dict(_differences(model, clip, baseline))
    metadata = {
        "format": 1,
        "category": recipe.category,
        "identifier": recipe.baseline.identifier,
        "subject": baseline.words(recipe),
        "method": recipe.method,
        "recipe": recipe.as_dict(),
        "checkpoint": host_model.checkpoint_name(model),
        "resolution": side,
        **baseline.notes(),
    }
    return Subject(tensors, metadata, log)


def _differences(model, clip, baseline):
    """((network, weight name), tensors) of what changed, on the CPU; weights that did not change are left out."""
    patchers = {"model": (model, host_model.PREFIX), "clip": (clip.patcher, "")}
    for network, name, tensors in baseline.result():
        patcher, prefix = patchers.get(network, (None, ""))
        if "weight" in tensors:
            diff = tensors["weight"].to("cpu", torch.float32, copy=True)
            diff -= host_model.current_weight(patcher, prefix + name)
            if diff.any():
                yield (network, prefix + name), {"diff": diff}
        else:
            on_cpu = {part: tensor.to("cpu", torch.float32, copy=True) for part, tensor in tensors.items()}
            yield (network, prefix + name), on_cpu


def _ordinary(latents: data.Latents | None, views: data.Views | None = None) -> data.Latents | None:
    """The same latents, of these views, as tensors autograd may see."""
    if latents is None:
        return None
    if views is not None:
        known = (views.masks, views.weights)
        views = data.Views((), views.prefixes, *(x if x is None else x.clone() for x in known))
    return data.Latents(latents.mean.clone(), None if latents.std is None else latents.std.clone(), views)
