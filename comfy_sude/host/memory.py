"""Own networks under ComfyUI's memory management: room is asked for, counted, and given back."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from itertools import combinations

import comfy.model_management
import comfy.model_patcher
import torch
from torch import nn

from ..baselines import REGISTRY, Baseline
from ..baselines.dreambooth_lora import DreamBoothLoRASettings
from ..recipe import Recipe

# Counted on SD1.5's UNet at 64 x 64 in fp32: autograd keeps 4.8 GB a sample; with checkpoints 0.6 GB, and one block.
ACTIVATION_BYTES = 1_170_000  # per latent cell and sample
CHECKPOINTED = 0.2  # share of them left with one checkpoint per transformer block
HALF = 0.5  # share of activations and frozen weights left with bf16 or fp16


def estimate(baseline: Baseline, latent_size: tuple[int, int]) -> float:
    """Bytes a training needs beside its weights: gradients, optimizer states and activations (rough)."""
    options = baseline.recipe.options
    trained, added = baseline.trained
    states = 1 if options.optimizer == "Adafactor" else 3  # gradient (+ two moments)
    passes = 2 if options.prior.active or baseline.looks_at_reference else 1
    samples = options.batch_size * passes
    activations = ACTIVATION_BYTES * samples * latent_size[0] * latent_size[1]
    if options.gradient_checkpointing:
        activations *= CHECKPOINTED
    if options.precision != "fp32":
        activations *= HALF
    return 4 * (states * trained + added) + activations


def needed(baseline: Baseline, latent_size: tuple[int, int]) -> float:
    """Bytes a training needs in all: `estimate` and the weights of the copies (rough)."""
    recipe, networks = baseline.recipe, baseline.networks
    unet, text = (sum(p.numel() for p in module.parameters()) for module in (networks.unet, networks.text_encoder))
    trained, added = baseline.trained
    if recipe.uses_pretrained and not baseline.switches_off:
        unet *= 2
    frozen = unet + text - (trained - added)
    share = HALF if recipe.options.precision != "fp32" else 1.0
    return 4 * (trained - added + share * frozen) + estimate(baseline, latent_size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the computer had no memory left."""
    known = isinstance(error, (comfy.model_management.OOM_EXCEPTION, MemoryError))
    return known or (isinstance(error, RuntimeError) and "allocate memory" in str(error) or _is_oom(error))


def _is_oom(error: BaseException) -> bool:
    """ComfyUI's own answer, which knows asynchronous errors of a GPU; older versions have none."""
    return getattr(comfy.model_management, "is_oom", lambda _error: False)(error)


def free_memory(device: torch.device) -> float:
    """Bytes a device has free now."""
    return comfy.model_management.get_free_memory(device)


def advice(baseline: Baseline, latent_size: tuple[int, int], free: float) -> str:
    """What to say when memory ran out: the least changes that would have fitted, with gigabytes.

    Args:
        baseline: what was to be trained.
        latent_size: latent rows and columns.
        free: bytes the device has for a training.
    """
    now = needed(baseline, latent_size)
    budget = min(free, 0.9 * now)  # the estimate is rough: what is hardly less than now is no help
    said, least = [], (now, "what is set now")
    for alternatives in _smaller(baseline.recipe, latent_size):
        needs = [
            (needed(REGISTRY[recipe.method](recipe, baseline.networks), size), text)
            for text, recipe, size in alternatives
        ]
        said += [f"{text} (about {need / 1e9:.1f} GB)" for need, text in needs if need <= budget][:2]
        least = min([least, *needs])
    if said:
        remedy = f"Any of these should fit: {'; '.join(said[:4])}."
    else:
        remedy = f"The least this can need is about {least[0] / 1e9:.1f} GB, with {least[1]}."
    return (
        f"out of memory: this training needs about {now / 1e9:.1f} GB, {free / 1e9:.1f} GB were free. {remedy} The "
        "options are in SuDe Training Options."
    )


def _smaller(recipe: Recipe, size: tuple[int, int]) -> Iterator[list[tuple[str, Recipe, tuple[int, int]]]]:
    """Recipes that need less memory, with what to change and their latent size, in groups of alternatives.

    One change, two and so on of the options; then half the side, another baseline, and all at once.
    """
    options = recipe.options
    changes = {
        "gradient_checkpointing on": ("gradient_checkpointing", True),
        "precision bf16": ("precision", options.precision if options.precision != "fp32" else "bf16"),
        "optimizer Adafactor": ("optimizer", "Adafactor"),
        "batch_size 1": ("batch_size", 1),
        "reference current": ("reference", "current"),
    }
    changes = {text: change for text, change in changes.items() if getattr(options, change[0]) != change[1]}

    def changed(start: Recipe, names: Iterable[str]) -> Recipe:
        return dataclasses.replace(start, options=dataclasses.replace(options, **dict(changes[name] for name in names)))

    for count in range(1, len(changes) + 1):
        yield [(" and ".join(names), changed(recipe, names), size) for names in combinations(changes, count)]
    half = (max(8, size[0] // 2), max(8, size[1] // 2))
    resolution = f"resolution {8 * half[0]}"
    lora = recipe
    if half != size:
        yield [(resolution, recipe, half)]
    if recipe.method != "DreamBooth LoRA":
        settings = DreamBoothLoRASettings(w_s=recipe.baseline.w_s, identifier=recipe.baseline.identifier)
        lora = dataclasses.replace(recipe, method="DreamBooth LoRA", baseline=settings)
        yield [("baseline DreamBooth LoRA", lora, size)]
    everything = [
        *changes,
        *([resolution] if half != size else []),
        *(["baseline DreamBooth LoRA"] if lora is not recipe else []),
    ]
    yield [(" and ".join(everything), changed(lora, changes), half)]


class Residence:
    """Keeps own modules on the training device under ComfyUI's memory management, and gives everything back.

    Other models are evicted to make room, and the copies count as loaded until the block ends, however it ends.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device, memory: float):
        offload = torch.device("cpu")
        self.patchers = [comfy.model_patcher.ModelPatcher(module, device, offload) for module in modules]
        self.memory = memory

    def __enter__(self) -> "Residence":
        try:
            comfy.model_management.load_models_gpu(self.patchers, memory_required=self.memory, force_full_load=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        loaded = comfy.model_management.current_loaded_models
        mine = [entry for entry in loaded if any(entry.model is patcher for patcher in self.patchers)]
        for entry in mine:
            entry.model_unload()
            loaded.remove(entry)
        self.patchers.clear()
        comfy.model_management.soft_empty_cache()
        logging.debug("SuDe: %d training copies released", len(mine))
