"""Subject: the trained result as plain tensors and JSON metadata."""

from dataclasses import dataclass

from torch import Tensor

from . import captions
from .train import Log


@dataclass(frozen=True)
class Subject:
    """What a training learned, independent of the models it was learned on.

    Attributes:
        tensors: (network, name) -> tensors, fp32 on the CPU. ("model" or "clip", weight name) -> {"diff": trained minus
            incoming weight} or {"up", "down", "alpha"}; ("token", placeholder) -> {"vectors": [n, width]};
            ("reference", "latent" or "place.parameter") -> {"value"}.
        metadata: JSON values: "category", "identifier", "subject" (what names it in prompts), "method", "recipe",
            "checkpoint", "resolution", and what the method adds.
        log: the losses of every step.
    """

    tensors: dict[tuple[str, str], dict[str, Tensor]]
    metadata: dict
    log: Log

    def prompt(self, attribute: str = "", context: str = "") -> str:
        """A caption for the sampler in the template the subject was trained with: "photo of a running sks dog"."""
        return captions.prompt(self.metadata["subject"], attribute=attribute, context=context)

    def of(self, network: str) -> dict[str, dict[str, Tensor]]:
        """The tensors of one network by name."""
        return {name: tensors for (owner, name), tensors in self.tensors.items() if owner == network}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for tensors in self.tensors.values() for t in tensors.values())
