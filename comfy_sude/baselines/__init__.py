"""The baselines SuDe is added to, by the name the node shows. The order is the node's; append only."""

from .base import Baseline
from .dreambooth import DreamBooth
from .dreambooth_lora import DreamBoothLoRA

REGISTRY: dict[str, type[Baseline]] = {
    "DreamBooth": DreamBooth,
    "DreamBooth LoRA": DreamBoothLoRA,
}
