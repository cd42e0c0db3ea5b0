"""The identity judge: reads an individual's body colour, second colour and pattern off a picture of the mini world.

Trained on renders of random individuals and their codec reconstructions, under slight blur and noise only: colours are
what it is there to read. It never saw a sample of any model. How far it errs, what the codec alone costs and what a
random other individual scores is in identity.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from .data import CHUNK, PLAIN_SHARE, in_chunks
from .judge import _stage, fit, shifted
from .world import ATTRIBUTES, CATEGORIES, PATTERNS, Subject, random_subject, render

IDENTITY_FILE = Path(__file__).with_name("identity.safetensors")
UNSEEN = "tiny"  # of so small a subject the codec leaves too little to read identity off
CHANCE = 0.45  # RGB distance (of sides 0..1) from which a colour counts as another one; random pairs: identity.json
TRAINING, RECONSTRUCTED, HELD_OUT = 16_000, 12_000, 2_000  # renders


@dataclass(frozen=True)
class Reading:
    """What is read off N pictures: colours in 0..1 and the probabilities of PATTERNS."""

    body: torch.Tensor
    """[N, 3]"""
    second: torch.Tensor
    """[N, 3]"""
    pattern: torch.Tensor
    """[N, 3]"""

    def distances(self, subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
        """Euclidean RGB distances [N] of body and second colour to a subject's own."""
        return tuple(
            (read - torch.tensor(colour) / 255).norm(dim=1)
            for read, colour in ((self.body, subject.body), (self.second, subject.second))
        )

    def score(self, subject: Subject) -> torch.Tensor:
        """[N] identity in 0..1: the mean of body colour, second colour and the probability of the pattern.

        A colour counts 1 where it is the subject's own and falls linearly to 0 at the distance CHANCE.
        """
        body, second = ((1 - distance / CHANCE).clamp(min=0) for distance in self.distances(subject))
        return (body + second + self.pattern[:, PATTERNS.index(subject.pattern)]) / 3


class IdentityJudge(nn.Module):
    """Pictures [N, 3, 64, 64] in 0..1 -> [N, 9]: body RGB, second RGB, logits of PATTERNS.

    It learns where to look, not what colours are: each colour is a weighted mean of the picture's own pixels.
    """

    def __init__(self):
        super().__init__()
        widths = (3, 32, 48, 64, 96)
        self.stages = nn.ModuleList(nn.Sequential(*_stage(a, b)) for a, b in zip(widths, widths[1:], strict=False))
        layers = nn.Conv2d(32 + 48 + 64 + 96, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()
        self.where = nn.Sequential(*layers, nn.Conv2d(32, 2, 1))
        self.pattern = nn.Sequential(nn.Flatten(), nn.Linear(96 * 16, 96), nn.ReLU(), nn.Linear(96, len(PATTERNS)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, found = 2 * x - 1, []
        for stage in self.stages:
            h = stage(h)
            found.append(h)
        side = found[0].shape[-1]
        wide = torch.cat([F.interpolate(h, size=side, mode="nearest") for h in found], 1)
        weights = self.where(wide).flatten(2).softmax(-1)  # [N, 2, pixels]
        colours = weights @ F.avg_pool2d(x, x.shape[-1] // side).flatten(2).transpose(1, 2)
        return torch.cat([colours.flatten(1), self.pattern(found[-1])], 1)

    @torch.no_grad()
    def read(self, pictures: torch.Tensor) -> Reading:
        """Pictures [N, 64, 64, 3], uint8 or float in 0..1 -> Reading."""
        if pictures.ndim != 4 or pictures.shape[1:] != (64, 64, 3):
            raise ValueError(f"The judge reads pictures [N, 64, 64, 3], not {list(pictures.shape)}.")
        x = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()
        read = torch.cat([self.eval()(part.permute(0, 3, 1, 2)) for part in x.clamp(0, 1).split(256)])
        return Reading(read[:, :3].clamp(0, 1), read[:, 3:6].clamp(0, 1), read[:, 6:].softmax(-1))


def load_identity(path: str | Path = IDENTITY_FILE) -> IdentityJudge:
    """The shipped identity judge."""
    judge = IdentityJudge()
    judge.load_state_dict({name: w.float() for name, w in load_file(path).items()}, strict=False)
    return judge.eval()


# --- Making it -------------------------------------------------------------------------------------------------------


def _chunk(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    pictures, labels = np.empty((CHUNK, 64, 64, 3), np.uint8), np.empty((CHUNK, 9), np.float32)
    for i in range(CHUNK):
        subject = random_subject(rng)
        attribute = None if rng.random() < PLAIN_SHARE else ATTRIBUTES[int(rng.integers(len(ATTRIBUTES)))]
        category = int(rng.integers(len(CATEGORIES)))
        pictures[i] = render(CATEGORIES[category], attribute, subject)
        colours = [value / 255 for value in (*subject.body, *subject.second)]
        labels[i] = (
            *colours,
            PATTERNS.index(subject.pattern),
            category,
            ATTRIBUTES.index(attribute) if attribute else -1,
        )
    return pictures, labels


def renders(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` (a multiple of 500) renders: uint8 [N, 64, 64, 3] and float [N, 9].

    The columns: body RGB, second RGB, index of the pattern, index of the category, index of the attribute (-1: none).
    """
    return in_chunks(_chunk, count, seed)


def soften(x: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, 64, 64] with slight blur, noise and shifts; colours stay."""
    share = torch.rand(len(x), 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, share * (torch.rand(len(x), 1, 1, 1) < 0.6)) + 0.03 * torch.randn_like(x)
    return shifted(x)


def train(pictures: torch.Tensor, labels: torch.Tensor, seconds: float, path: Path = IDENTITY_FILE) -> IdentityJudge:
    """pictures uint8 [N, 64, 64, 3] and labels of `renders` -> IdentityJudge, written to `path` in fp16."""
    judge = IdentityJudge()

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        read = judge(soften(pictures[chosen].permute(0, 3, 1, 2).float() / 255))
        colours = F.smooth_l1_loss(read[:, :6], labels[chosen, :6], beta=0.05)
        return 10 * colours + F.cross_entropy(read[:, 6:], labels[chosen, 6].long())

    return fit(judge, loss, len(pictures), seconds, path)


def reconstruct(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 64, 64, 3] through the codec and back."""
    from .learner import World

    world = World.load()
    parts = [world.decode(world.encode(part).mean[:, 0]) for part in pictures.split(250)]
    return (torch.cat(parts) * 255).round().to(torch.uint8)


def pairs(judge: IdentityJudge, pictures: torch.Tensor, subjects: list[Subject]) -> dict:
    """Scores of pictures for their own subject and for another one (the next in the list), with the RGB distances."""
    reading = judge.read(pictures)

    def mean(shift: int) -> dict:
        scores, body, second = [], [], []
        for i in range(len(subjects)):
            one = Reading(*(part[i : i + 1] for part in (reading.body, reading.second, reading.pattern)))
            subject = subjects[(i + shift) % len(subjects)]
            scores.append(one.score(subject))
            for kept, distance in zip((body, second), one.distances(subject), strict=True):
                kept.append(distance)
        found = {"score": scores, "body": body, "second": second}
        return {name: round(torch.cat(values).mean().item(), 4) for name, values in found.items()}

    return {"own": mean(0), "other": mean(1)}


def make(seconds: float, folder: Path = IDENTITY_FILE.parent, seed: int = 1) -> dict:
    """Train the judge and measure it -> identity.safetensors and identity.json in `folder`; the latter's content."""
    torch.manual_seed(seed)
    pictures, labels = renders(TRAINING, 9000)
    both = torch.cat([pictures, reconstruct(pictures[:RECONSTRUCTED])])
    train(both, torch.cat([labels, labels[:RECONSTRUCTED]]), seconds, folder / IDENTITY_FILE.name)
    return measure(folder)


def measure(folder: Path = IDENTITY_FILE.parent) -> dict:
    """Errors of the judge in `folder` on held-out renders and reconstructions, ceiling and floor -> identity.json."""
    judge = load_identity(folder / IDENTITY_FILE.name)
    held, labels = renders(HELD_OUT, 500_000)
    rng = np.random.default_rng(77)
    subjects = [random_subject(rng) for _ in range(1000)]
    attributes = [a for a in ATTRIBUTES if a != UNSEEN]
    drawn = np.stack([
        render(CATEGORIES[i % len(CATEGORIES)], attributes[i // len(CATEGORIES) % len(attributes)], s)
        for i, s in enumerate(subjects)
    ])  # fmt: skip
    drawn = torch.from_numpy(drawn)
    found = {
        "renders": errors(judge, held, labels),
        "reconstructions": errors(judge, reconstruct(held), labels),
        "scores of renders": pairs(judge, drawn, subjects),
        "scores of reconstructions": pairs(judge, reconstruct(drawn), subjects),
    }
    (folder / "identity.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def errors(judge: IdentityJudge, pictures: torch.Tensor, labels: torch.Tensor) -> dict:
    """Median and 90th percentile of the colours' RGB distance, the share of right patterns, all by attribute too."""
    reading = judge.read(pictures)
    body, second = (reading.body - labels[:, :3]).norm(dim=1), (reading.second - labels[:, 3:6]).norm(dim=1)
    pattern = (reading.pattern.argmax(1) == labels[:, 6].long()).float()

    def summary(chosen: torch.Tensor) -> dict:
        found = {"pictures": int(chosen.sum())}
        for name, distance in (("body", body[chosen]), ("second", second[chosen])):
            found[f"{name}_median"] = round(distance.median().item(), 4)
            found[f"{name}_p90"] = round(distance.quantile(0.9).item(), 4)
        return found | {"pattern_right": round(pattern[chosen].mean().item(), 4)}

    attributes = labels[:, 8].long()
    by_attribute = {name or "none": summary(attributes == i - 1) for i, name in enumerate((None, *ATTRIBUTES))}
    return summary(torch.ones_like(pattern, dtype=torch.bool)) | {"by_attribute": by_attribute}
