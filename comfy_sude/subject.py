"""Subject: the trained result as plain tensors and JSON metadata."""

from dataclasses import dataclass

from torch import Tensor

from . import captions
from .train import Log


@dataclass(frozen=True)
class Subject:
    """What a training learned, independent of the models it was learned on.

    Attributes:
        tensors: (network "model" or "clip", weight name) -> {"diff": trained minus incoming weight} or
            {"up", "down", "alpha"}; fp32 on the CPU.
        metadata: JSON values: "category", "identifier", "method", "recipe", "checkpoint", "resolution".
        log: the losses of every step.
    """

    tensors: dict[tuple[str, str], dict[str, Tensor]]
    metadata: dict
    log: Log

    def prompt(self, attribute: str = "", context: str = "") -> str:
        """A caption for the sampler in the template the subject was trained with: "photo of a running sks dog"."""
        return captions.prompt(self.metadata["category"], self.metadata["identifier"], attribute, context)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for tensors in self.tensors.values() for t in tensors.values())
