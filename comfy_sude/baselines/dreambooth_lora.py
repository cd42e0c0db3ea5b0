"""DreamBooth on low-rank updates of the attention layers (Hu et al. 2021), for small GPUs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..recipe import numeric, plain
from .base import Baseline
from .dreambooth import W_S_HELP, DreamBoothSettings

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class DreamBoothLoRASettings(DreamBoothSettings):
    """Steps and learning rate of diffusers' train_dreambooth_lora; the paper has no LoRA baseline."""

    w_s: float = numeric(0.4, 0.0, 1000.0, 0.05, W_S_HELP)
    steps: int = numeric(500, 1, 1_000_000, 1, "Optimizer steps. Source: diffusers' DreamBooth LoRA example.")
    learning_rate: float = numeric(1e-4, 0.0, 1.0, 1e-6, "Constant. Source: diffusers' DreamBooth LoRA example.")
    rank: int = numeric(16, 1, 1024, 1, "Rank of the updates: more learns more detail and takes more memory.")
    alpha: float = numeric(16.0, 1e-3, 1e4, 1.0, "The update is scaled by alpha / rank.")
    train_text_encoder: bool = plain(True, "Low-rank updates in the text encoder's attention too.")


class LowRank(nn.Module):
    """y = linear(x) + alpha / rank * up(down(x)), added to an existing linear layer by a forward hook.

    `down` is [rank, in], Kaiming uniform; `up` is [out, rank], zero, so training starts at the base model.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, init: torch.Generator):
        super().__init__()
        out_features, in_features = linear.weight.shape
        bound = math.sqrt(6 / ((1 + 5) * in_features))  # kaiming_uniform_(a=sqrt(5)), as LoRA's authors
        down = (torch.rand(rank, in_features, generator=init) * 2 - 1) * bound
        device = linear.weight.device
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(out_features, rank, device=device))
        self.alpha = alpha
        self.scale = alpha / rank
        self.enabled = True
        linear.register_forward_hook(self._add)

    def _add(self, linear: nn.Linear, args: tuple, output: Tensor) -> Tensor:
        if not self.enabled:
            return output
        return output + F.linear(F.linear(args[0], self.down), self.up) * self.scale


class DreamBoothLoRA(Baseline):
    """Only the adapters train: 3.2M + 1.2M parameters at rank 16 for SD1.5."""

    settings = DreamBoothLoRASettings
    help = "Trains small low-rank updates of the attention layers: a fraction of the memory and of the result's size."
    switches_off = True

    def changes(self, caption: str) -> bool:
        """Whether the text encoder has adapters."""
        return self.recipe.baseline.train_text_encoder

    @property
    def trained(self) -> tuple[int, int]:
        """Both factors of every adapter."""
        rank = self.recipe.baseline.rank
        count = sum(rank * sum(layer.weight.shape) for _, _, layer in self._layers())
        return count, count

    def _layers(self) -> Iterator[tuple[str, str, nn.Module]]:
        """(network, name, layer) of every attention projection that gets an adapter, in the order of the modules."""
        networks = [("model", self.networks.unet, UNET_TARGETS)]
        if self.recipe.baseline.train_text_encoder:
            networks.append(("clip", self.networks.text_encoder, TEXT_TARGETS))
        for network, module, targets in networks:
            for name, layer in module.named_modules():
                if name.endswith(targets) and getattr(layer, "weight", None) is not None and layer.weight.ndim == 2:
                    yield network, name, layer

    def prepare(self, init: torch.Generator) -> list[dict]:
        """Adapters on every attention projection."""
        rank, alpha = self.recipe.baseline.rank, self.recipe.baseline.alpha
        self.adapters = {(network, name): LowRank(layer, rank, alpha, init) for network, name, layer in self._layers()}
        return [{"params": [p for adapter in self.adapters.values() for p in (adapter.down, adapter.up)]}]

    @contextmanager
    def pretrained(self):
        """The base model: adapters off."""
        for adapter in self.adapters.values():
            adapter.enabled = False
        try:
            yield
        finally:
            for adapter in self.adapters.values():
                adapter.enabled = True

    def result(self) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
        """The low-rank factors."""
        for (network, name), adapter in self.adapters.items():
            factors = {"up": adapter.up.detach(), "down": adapter.down.detach(), "alpha": torch.tensor(adapter.alpha)}
            yield network, f"{name}.weight", factors
