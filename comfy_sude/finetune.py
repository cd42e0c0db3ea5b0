"""From a MODEL, a CLIP, a VAE and pictures to a Subject: everything in the order in which it has to happen."""

import dataclasses
import gc
import logging
import traceback
import uuid
from functools import partial

import comfy.model_management
import torch
from torch import Tensor

from . import captions, data, store, subject
from .baselines import REGISTRY
from .baselines.base import Baseline, Networks
from .data import Latents
from .host import images, live, memory, provenance, text
from .host import model as host_model
from .log import Log
from .recipe import Recipe
from .resume import Keeper
from .subject import Subject
from .train import Predictors, Trainer
from .watch import Watched, Watcher, wanted

ALGORITHM = 1  # raised when the same recipe trains to another result, so that older ones are not taken for it
WORTH_KEEPING = 3e8  # bytes: the state of a finished training up to this size is kept, for training on from it


def fine_tune(
    model, clip, vae, image, recipe: Recipe, report, entries: store.Store, class_images=None, retrain: bool = False
) -> Subject:
    """Train a subject, or find it in the store. The MODEL, CLIP and VAE are only read, whatever happens.

    Args:
        model: ComfyUI MODEL (SD1.x or SD2.x).
        clip: ComfyUI CLIP of the same checkpoint.
        vae: ComfyUI VAE.
        image: [N, H, W, C] IMAGE of the subject; one picture is what the method is made for.
        recipe: what to do; checked here.
        report: a `host.progress.Progress`.
        entries: where results, states of unfinished trainings and class images are kept.
        class_images: optional [N, H, W, C] IMAGE of the category; replaces drawing them.
        retrain: train from the start, whatever the store has.

    Raises:
        ValueError: something given that no training can use, before anything is trained.
        FloatingPointError: the loss stopped being finite.
        torch.OutOfMemoryError: with what would have fitted.
    """
    recipe = recipe.checked()
    process, side = check_inputs(model, clip, vae, recipe)
    pictures = data.check_images(image, "image")
    views = REGISTRY[recipe.method].views(recipe, pictures, side)
    if class_images is not None:
        class_images = data.check_images(class_images, "class_images")
    model = host_model.without_patches(model)

    report.phase("looking for an earlier result", 1)
    known = host_model.identities(model, clip, vae)
    trajectory = _trajectory(clip, recipe, known, pictures, class_images, side)
    memo = f"{trajectory}-{recipe.baseline.steps}"
    if not retrain:
        found = _remembered(entries, memo)
        if found is not None:
            report.follow(Watched(found.log, recipe.baseline.w_s, recipe.baseline.steps))
            return found
    report.phase("preparing", 1)
    latent_format = model.get_model_object("latent_format")
    prior = recipe.options.prior
    prior_latents = None
    if prior.kind == "class images" and prior.active:
        if class_images is None:
            class_images = _class_images(model, clip, vae, recipe, known, side, report, entries)
        squares = data.to_square(class_images, side, recipe.options.fit)
        prior_latents = images.encode(vae, latent_format, squares, report, "encoding class images")
    example = images.encode(vae, latent_format, views.pixels, report, "encoding the example")
    facts = provenance.facts(model, known["unet"], pictures, side, recipe.options.fit)
    interval = recipe.options.keeping.save_interval
    keeper = Keeper(entries, trajectory, recipe.baseline.steps, interval, report.notice)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            latents = _ordinary(example, views), _ordinary(prior_latents)
            recall = _recall(clip, recipe, known["clip"], model.load_device, entries)
            trained = _train(model, clip, vae, process, recipe, *latents, report, keeper, facts, retrain, recall)
    except BaseException as error:
        # else the copies and the optimizer live for as long as the error is handled
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        gc.collect()
    report.close("keeping the result")
    done = f"{trajectory}-{trained.log.steps}"  # fewer than asked for if the person had enough
    if entries.put("subject", done, *subject.packed(trained)):
        if keeper.saved != trained.log.steps:
            keeper.forget()  # the state of an earlier step has served its purpose
    elif entries.limit > 0:
        report.notice("the result could not be stored: save it with SuDe Save Subject")
    return trained


def _story(log: Log, steps: int, resumed: int) -> str:
    """How a training went, in a few words."""
    went = f"{log.steps} steps in {log.seconds:.0f} s"
    if log.steps < steps:
        went = f"stopped after {log.steps} of {steps} steps"
    return went + (f", resumed at step {resumed}" if resumed else "")


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
    trained = [caption for pair in method.all_captions(recipe) for caption in pair]
    text.check_captions(clip, model, trained, "category or identifier", method.placeholder(recipe))
    shown = wanted(recipe.options.watching, method.words(recipe))
    text.check_captions(clip, model, shown, "preview_prompts", method.placeholder(recipe))
    return process, recipe.options.resolution or host_model.native_resolution(model)


def _trajectory(clip, recipe: Recipe, known: dict, pictures: Tensor, class_images: Tensor | None, side: int) -> str:
    """Key of everything that decides a training, but for how many steps it takes."""
    decided = recipe.as_dict()
    del decided["baseline"]["steps"], decided["options"]["gradient_checkpointing"]  # the same bits with and without
    wanted = [caption for pair in REGISTRY[recipe.method].all_captions(recipe) for caption in pair]
    return store.key(
        what=f"training {ALGORITHM}",
        recipe=decided,
        side=side,
        models=[known[name] for name in ("model", "clip", "vae")],
        tokens=text.tokens_hash(clip, [*wanted, captions.EMPTY]),
        example=store.tensor_hash([("image", pictures)]),
        class_images=store.tensor_hash([("image", class_images)]) if class_images is not None else "",
    )


def _remembered(entries: store.Store, memo: str) -> Subject | None:
    """The finished subject of this very training, if the store has it."""
    found = entries.get("subject", memo)
    if found is None:
        return None
    try:
        known = subject.unpacked(*found)
    except ValueError as error:  # of another version of the pack
        logging.warning("SuDe: a stored subject is not used: %s", error)
        return None
    trained = known.metadata.get("trained", "")
    return dataclasses.replace(known, story=f"reused, nothing trained ({known.log.steps} steps, {trained})")


def _class_images(model, clip, vae, recipe: Recipe, known: dict, side: int, report, entries: store.Store) -> Tensor:
    """[number, side, side, 3] class images, those drawn before from the store, the others drawn and stored as bytes."""
    prior = recipe.options.prior
    caption = captions.category_caption(recipe.category)
    settings = {
        name: value for name, value in dataclasses.asdict(prior).items() if name not in ("kind", "w_r", "number")
    }
    name = store.key(
        what="class images 2",
        models=[known[part] for part in ("model", "clip", "vae")],
        tokens=text.tokens_hash(clip, [caption, prior.negative_prompt]),
        side=side,
        **settings,
    )

    def find(first: int, count: int) -> Tensor | None:
        found = entries.get("class_images", f"{name}-{first}-{count}")
        return None if found is None else found[0]["images"].float() / 255

    def keep(first: int, drawn: Tensor) -> Tensor:
        pictures = (drawn * 255).round().to(torch.uint8)
        entries.put("class_images", f"{name}-{first}-{len(drawn)}", {"images": pictures}, {"caption": caption})
        return pictures.float() / 255

    return images.draw_class_images(model, clip, vae, caption, side, prior, report, find, keep)


def _recall(clip, recipe: Recipe, clip_hash: str, device: torch.device, entries: store.Store):
    """`Predictors.recall` that keeps encodings in the store."""

    def recall(caption: str, compute) -> Tensor:
        tokens = text.tokens_hash(clip, [caption])
        precision = recipe.options.precision
        name = store.key(what="text 1", clip=clip_hash, tokens=tokens, precision=precision, device=device.type)
        found = entries.get("text", name)
        if found is not None:
            return found[0]["encoding"]
        encoding = compute()
        entries.put("text", name, {"encoding": encoding}, {"caption": caption})
        return encoding

    return recall


def _train(
    model, clip, vae, process, recipe: Recipe, example, prior_latents, report, keeper: Keeper, facts, retrain, recall
) -> Subject:
    """Build the copies, train them (on from a stored state), take the result as differences, release everything."""
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
    size = example.mean.shape[-2:]
    trainer = watcher = None
    try:
        with memory.Residence(copies, device, memory.estimate(baseline, size)):
            predictors = Predictors(
                process=process,
                predict=partial(host_model.predict, base),
                encode=encoder,
                device=device,
                frozen=partial(host_model.predict, frozen) if frozen else None,
                recall=recall,
            )
            trainer = Trainer(baseline, predictors, example, prior_latents)
            resumed = 0 if retrain else keeper.resume(trainer)
            watcher = _watcher(trainer, vae, model.get_model_object("latent_format"), report)

            def after_step(trainer: Trainer) -> None:
                watcher.after_step(trainer)
                keeper.after_step(trainer)

            watcher.begin()
            log = trainer.run(report, after_step=after_step)
            watcher.end()
            report.phase("taking the result", 1)
            if _small(trainer) or log.steps < recipe.baseline.steps:
                keeper.save(trainer)  # for a longer training to go on from
            trainer.optimizer = None  # its states are half of the memory; the result needs none of them
            tensors = dict(_differences(model, clip, baseline))
    except BaseException as error:
        if watcher is not None:
            watcher.release()
        explained = _explained(error, trainer, keeper, baseline, size, device)
        traceback.clear_frames(error.__traceback__)  # what the failed step held
        raise explained from None
    metadata = provenance.metadata(baseline, log, facts)
    return Subject(tensors, metadata, log, _story(log, recipe.baseline.steps, resumed))


def _watcher(trainer: Trainer, vae, latent_format, report) -> Watcher:
    """Who looks at the training for the person at the node."""
    name = uuid.uuid4().hex[:12]

    def decode(latents: Tensor, step: int) -> list[dict]:
        with torch.inference_mode():
            pixels = vae.decode(latent_format.process_out(latents))
        return live.save_previews(pixels, f"{name}_{step}")

    tick = comfy.model_management.throw_exception_if_processing_interrupted
    watcher = Watcher(trainer, trainer.options.watching, decode, tick)
    report.follow(watcher)
    return watcher


def _small(trainer: Trainer) -> bool:
    """Whether a finished training's state is worth its room on the disk."""
    return 3 * sum(p.numel() * p.element_size() for p in trainer.parameters) <= WORTH_KEEPING


def _explained(
    error: BaseException, trainer: Trainer | None, keeper: Keeper, baseline: Baseline, size, device
) -> BaseException:
    """What to raise for an error in training, after keeping what was paid for."""
    interrupted = isinstance(error, comfy.model_management.InterruptProcessingException)
    if trainer is not None and trainer.log.steps and not isinstance(error, FloatingPointError):
        if interrupted and baseline.recipe.options.keeping.on_interrupt == "discard":
            keeper.forget()
        elif keeper.save(trainer):
            logging.info("SuDe: the state of step %d is kept; queueing the same again goes on from it", keeper.saved)
    if isinstance(error, FloatingPointError) and keeper.saved:
        return FloatingPointError(
            f"{error} The state of step {keeper.saved} is kept: queue with steps {keeper.saved} to use it as it is."
        )
    if memory.is_out_of_memory(error):
        kept = f" The state of step {keeper.saved} is kept." if keeper.saved else ""
        advice = memory.advice(baseline, size, memory.free_memory(device))
        return torch.OutOfMemoryError(f"{advice}{kept}")
    return error


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


def _ordinary(latents: Latents | None, views: data.Views | None = None) -> Latents | None:
    """The same latents, of these views, as tensors autograd may see."""
    if latents is None:
        return None
    if views is not None:
        known = (views.masks, views.weights)
        views = data.Views((), views.prefixes, *(x if x is None else x.clone() for x in known))
    return Latents(latents.mean.clone(), None if latents.std is None else latents.std.clone(), views)
