"""The judge: a small convolutional net that reads category and attribute off a picture of the mini world.

Trained on renders and codec reconstructions under strong changes of hue, saturation, contrast, sharpness and noise, so
that it looks at shapes: fine-tuned models shift colours, and a judge that reads colours takes that for an attribute.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from .world import ATTRIBUTES, CATEGORIES

JUDGE_FILE = Path(__file__).with_name("judge.safetensors")
LABELS: tuple[str | None, ...] = (None, *ATTRIBUTES)  # attribute index 0 is "none"
BATCH = 128
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """Probabilities: category [N, 8] in the order of CATEGORIES, attribute [N, 9] in the order of LABELS."""

    category: torch.Tensor
    attribute: torch.Tensor

    def is_category(self, name: str) -> torch.Tensor:
        """bool [N]"""
        return self.category.argmax(1) == CATEGORIES.index(name)

    def is_attribute(self, name: str | None) -> torch.Tensor:
        """bool [N]; None asks for "no attribute"."""
        return self.attribute.argmax(1) == LABELS.index(name)


def _stage(n_in: int, n_out: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for n, stride in ((n_in, 2), (n_out, 1)):
        layers += [nn.Conv2d(n, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
    return layers


class Judge(nn.Module):
    """Pictures [N, 3, 64, 64] in 0..1 -> logits of category [N, 8] and attribute [N, 9]."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 48, 64, 96)
        stages = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in _stage(a, b)]
        self.features = nn.Sequential(*stages, nn.Flatten(), nn.Dropout(0.2), nn.Linear(96 * 16, 192), nn.ReLU())
        self.category, self.attribute = nn.Linear(192, len(CATEGORIES)), nn.Linear(192, len(LABELS))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        std, mean = torch.std_mean(x, (1, 2, 3), keepdim=True)
        h = self.features((x - mean) / (std + 0.02))
        return self.category(h), self.attribute(h)

    @torch.no_grad()
    def classify(self, pictures: torch.Tensor) -> Verdict:
        """Pictures [N, 64, 64, 3], uint8 or float in 0..1 (ComfyUI's IMAGE) -> Verdict."""
        if pictures.ndim != 4 or pictures.shape[1:] != (64, 64, 3):
            raise ValueError(f"The judge reads pictures [N, 64, 64, 3], not {list(pictures.shape)}.")
        x = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()
        logits = [self.eval()(part.permute(0, 3, 1, 2)) for part in x.clamp(0, 1).split(256)]
        category, attribute = (torch.cat(part).softmax(-1) for part in zip(*logits, strict=True))
        return Verdict(category, attribute)


def load_judge(path: str | Path = JUDGE_FILE) -> Judge:
    """The shipped judge."""
    judge = Judge()
    judge.load_state_dict({name: w.float() for name, w in load_file(path).items()}, strict=False)
    return judge.eval()


def distort(x: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, 64, 64] in 0..1 with random colours, contrast, sharpness, noise and place."""
    count, device = len(x), x.device

    def draw(low: float, high: float) -> torch.Tensor:
        return torch.empty(count, 1, 1, 1, device=device).uniform_(low, high)

    def some(share: float) -> torch.Tensor:
        return (torch.rand(count, 1, 1, 1, device=device) < share).float()

    # a random blend of the channels: hue turns, saturation from none to full
    mix = torch.softmax(3 * torch.randn(count, 3, 3, device=device), -1)
    mixed = torch.einsum("bij,bjhw->bihw", mix, x)
    x = torch.lerp(x, mixed, some(0.5) * draw(0, 1))
    x = torch.lerp(x, x.mean(1, keepdim=True), some(0.3) * draw(0, 1))
    x = (x - 0.5) * (1 - some(0.6) * draw(0, 0.65)) + 0.5 + some(0.6) * draw(-0.2, 0.2)
    x = x + some(0.4) * 0.12 * torch.randn(count, 3, 1, 1, device=device)
    blur = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
    blur = torch.lerp(blur, F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1), some(0.3))
    x = torch.lerp(x, blur, some(0.5) * draw(0, 1))
    smooth = F.interpolate(torch.randn(count, 3, 8, 8, device=device), size=64, mode="bilinear")
    x = x + some(0.5) * draw(0, 0.08) * smooth + some(0.6) * draw(0, 0.1) * torch.randn_like(x)
    return shifted(x)


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, 64, 64], all moved by the same few pixels, within 0..1."""
    dy, dx = torch.randint(-3, 4, (2,)).tolist()
    padded = F.pad(x, (3, 3, 3, 3), mode="replicate")
    return padded[:, :, 3 + dy : 67 + dy, 3 + dx : 67 + dx].clamp(0, 1)


def fit(
    net: nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], count: int, seconds: float, path: Path
) -> nn.Module:
    """Train a judge for so long, write it to `path` in fp16, and return it on the CPU.

    Args:
        net: on the device it trains on.
        loss: of the pictures with these indices [BATCH].
        count: pictures there are.
        seconds: of wall time; the learning rate falls along a cosine with it.
        path: where its weights go.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02)
    begin, step = time.monotonic(), 0
    while (spent := time.monotonic() - begin) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (0.5 * (1 + math.cos(math.pi * spent / seconds)) + 0.005)
        value = loss(torch.randint(count, (BATCH,)))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            log.info("%s step %d, %.0f s, loss %.4f", path.stem, step, spent, value.item())
    weights = {name: w.detach().cpu() for name, w in net.state_dict().items() if not name.endswith("batches_tracked")}
    save_file({name: w.half() if w.is_floating_point() else w for name, w in weights.items()}, path)
    return net.cpu().eval()


def train(
    pictures: torch.Tensor, labels: torch.Tensor, seconds: float, device: torch.device, path: Path = JUDGE_FILE
) -> Judge:
    """pictures uint8 [N, 64, 64, 3], labels [N, 2] -> Judge, written to `path` in fp16."""
    judge = Judge().to(device)

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        category, attribute = judge(distort(pictures[chosen].to(device).permute(0, 3, 1, 2).float() / 255))
        target = labels[chosen].to(device)
        return F.cross_entropy(category, target[:, 0]) + F.cross_entropy(attribute, target[:, 1])

    return fit(judge, loss, len(pictures), seconds, path)


def accuracy(judge: Judge, pictures: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Shares of right categories and right attributes."""
    verdict = judge.classify(pictures)
    right = torch.stack([verdict.category.argmax(1), verdict.attribute.argmax(1)], 1) == labels
    return tuple(right.float().mean(0).tolist())
