"""What both trainings share: device, mixed precision, state that survives a kill."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def amp(device: torch.device) -> torch.autocast:
    """bfloat16 autocast: on CPUs with AVX512-BF16 twice as fast as fp32."""
    return torch.autocast(device.type, torch.bfloat16)


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, spent: float, **more) -> None:
    """Write everything a resumed run needs, atomically. Scratch only: never committed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "at": (step, spent), **more}, part)
    os.replace(part, path)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **more: nn.Module) -> tuple[int, float]:
    """Restore what `save_state` wrote, if anything; returns (step, seconds spent)."""
    if not path.is_file():
        return 0, 0.0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for name, module in more.items():
        module.load_state_dict(state[name])
    return state["at"]


class Workers:
    """Gradients of a batch cut into shares, one thread of one core a share.

    On a few shared CPU cores this is faster than torch's own threads, which wait for each other in every operation;
    on CUDA there is one share and no thread.
    """

    def __init__(self, device: torch.device):
        self.count = 1 if device.type == "cuda" else max(1, min(8, os.cpu_count() or 1))
        self._pool = ThreadPoolExecutor(self.count)
        if device.type == "cpu":
            torch.set_num_threads(1)

    def gradients(
        self, loss: Callable[..., tuple[torch.Tensor, ...]], parameters: list[torch.Tensor], *batch: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """`loss(*share)` -> (loss, further numbers); returns (mean gradients in fp32, mean of all numbers)."""

        def work(share: tuple[torch.Tensor, ...]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
            numbers = loss(*share)
            return torch.autograd.grad(numbers[0], parameters), torch.stack(numbers).detach()

        shares = list(zip(*(part.chunk(self.count) for part in batch), strict=True))
        results = list(self._pool.map(work, shares)) if self.count > 1 else [work(share) for share in shares]
        total = [gradient.float() for gradient in results[0][0]]
        for more, _ in results[1:]:
            torch._foreach_add_(total, [gradient.float() for gradient in more])
        torch._foreach_div_(total, len(results))
        return total, torch.stack([numbers for _, numbers in results]).mean(0)
