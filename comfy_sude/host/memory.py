"""Own networks under ComfyUI's memory management: room is asked for, counted, and given back."""

import logging

import comfy.model_management
import comfy.model_patcher
import torch
from torch import nn

from ..baselines import Baseline

# Counted on SD1.5's UNet at 64 x 64 in fp32: autograd keeps 4.8 GB a sample; with checkpoints 0.6 GB, and one block.
ACTIVATION_BYTES = 1_170_000  # per latent cell and sample
CHECKPOINTED = 0.2  # share of them left with one checkpoint per transformer block


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
    return 4 * (states * trained + added) + activations


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
