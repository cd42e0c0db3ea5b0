"""The baselines SuDe is added to, by the name the node shows. The order is the node's; append only."""

from .base import Baseline
from .custom_diffusion import CustomDiffusion
from .dreambooth import DreamBooth
from .dreambooth_lora import DreamBoothLoRA
from .vico import ViCo

REGISTRY: dict[str, type[Baseline]] = {
    "DreamBooth": DreamBooth,
    "DreamBooth LoRA": DreamBoothLoRA,
    "Custom Diffusion": CustomDiffusion,
    "ViCo": ViCo,
}
