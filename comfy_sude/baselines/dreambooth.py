"""DreamBooth as SuDe's authors used it: the whole UNet and the whole text encoder at a small learning rate."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..recipe import Settings, numeric, plain
from .base import Baseline, train_all

W_S_HELP = (
    "Weight of the SuDe loss, how strongly category attributes are inherited; 0 is the plain baseline. Paper Sec. 5.1: "
    "0.4 with DreamBooth; 0.2 and 0.8 are its flexible values, from 1.6 on the subject is lost."
)


@dataclass(frozen=True)
class DreamBoothSettings(Settings):
    """The released configuration (v1-finetune_unfrozen.yaml); the evaluated checkpoint is the one of step 500."""

    w_s: float = numeric(0.4, 0.0, 1000.0, 0.05, W_S_HELP)
    steps: int = numeric(500, 1, 1_000_000, 1, "Optimizer steps. Source: code, the evaluated checkpoint is step 500.")
    learning_rate: float = numeric(1e-6, 0.0, 1.0, 1e-7, "Constant, never scaled by the batch. Source: code.")
    identifier: str = plain("sks", "Rare word that will mean your subject in prompts. Source: code.")


class DreamBooth(Baseline):
    """Everything trains: about 860M + 123M parameters for SD1.5, some 20 GB with AdamW in fp32."""

    settings = DreamBoothSettings
    help = "Trains the whole UNet and text encoder (the released code). Best likeness, about 20 GB for SD1.5."

    def prepare(self, init: torch.Generator) -> list[dict]:
        """One parameter group, as in the released code (ddpm.py:1617)."""
        return [{"params": train_all(self.networks.unet) + train_all(self.networks.text_encoder)}]

    def changes(self, caption: str) -> bool:
        """Every caption: the whole text encoder trains."""
        return True

    def result(self) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
        """The trained weights themselves."""
        for network, module in (("model", self.networks.unet), ("clip", self.networks.text_encoder)):
            for name, parameter in module.named_parameters():
                yield network, name, {"weight": parameter.detach()}
