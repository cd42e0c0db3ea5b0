"""Everything from nothing: pictures, codec, latents, UNet with words, decoder, judge, the two shipped files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from . import data, judge, train_unet, train_vae
from .expand import shrink
from .run import pick_device
from .vae import Codec

PICTURES = 48_000
RECONSTRUCTED = 12_000  # pictures that the judge also sees through the codec
SHARES = {"codec": 0.13, "unet": 0.74, "decoder": 0.08, "judge": 0.05}  # of the wall time
log = logging.getLogger(__name__)


def build(minutes: float, device: str, work: Path, out: Path) -> dict[str, float]:
    """Train for `minutes` in all and write miniworld.safetensors and judge.safetensors into `out`.

    Every stage leaves its result or its state in `work`, so a run that was killed goes on where it was.
    Returns the held-out numbers (PSNR in dB, the judge's accuracies).
    """
    where, seconds = pick_device(device), {stage: 60 * minutes * share for stage, share in SHARES.items()}
    torch.manual_seed(0)
    pictures, labels = data.pictures(PICTURES, work / "pictures.safetensors")
    codec = train_vae.train(pictures, seconds["codec"], work / "codec.pt", where)
    stored = work / "latents.safetensors"
    if not stored.is_file():
        save_file({"latents": train_vae.encode(codec, pictures, where)}, stored)
    latents = load_file(stored)["latents"]
    trained = work / "unet.safetensors"
    train_unet.train(latents, labels, seconds["unet"], work / "unet.pt", trained, where)
    codec = train_vae.train_decoder(codec, pictures, latents, seconds["decoder"], work / "decoder.pt", where)
    numbers = pack(pictures, labels, latents, codec, load_file(trained), seconds["judge"], where, out)
    (work / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


def train_judge(
    pictures: torch.Tensor,
    labels: torch.Tensor,
    latents: torch.Tensor,
    codec: Codec,
    seconds: float,
    device: torch.device,
    out: Path,
) -> dict[str, float]:
    """Train the judge on renders and on what the codec makes of them; returns its held-out accuracies."""
    held = train_vae.HELD_OUT
    seen = train_vae.reconstruct(codec, latents[:RECONSTRUCTED])
    judge.train(
        torch.cat([pictures[:-held], *[seen] * 2]),
        torch.cat([labels[:-held], *[labels[:RECONSTRUCTED]] * 2]),
        seconds,
        device,
        out / "judge.safetensors",
    )
    model, through = judge.load_judge(out / "judge.safetensors"), train_vae.reconstruct(codec, latents[-held:])
    numbers = {"codec_psnr": train_vae.psnr(through, pictures[-held:])}
    for name, shown in (("renders", pictures[-held:]), ("reconstructions", through)):
        category, attribute = judge.accuracy(model, shown, labels[-held:])
        numbers |= {f"judge_category_{name}": category, f"judge_attribute_{name}": attribute}
    log.info("%s", numbers)
    return numbers


def pack(
    pictures: torch.Tensor,
    labels: torch.Tensor,
    latents: torch.Tensor,
    codec: Codec,
    trained: dict[str, torch.Tensor],
    judge_seconds: float,
    device: torch.device,
    out: Path,
) -> dict[str, float]:
    """Write the two shipped files."""
    net = {name.removeprefix("unet."): weight for name, weight in trained.items() if name != "rows"}
    shrink(net, codec.state_dict(), trained["rows"], out / "miniworld.safetensors")
    return train_judge(pictures, labels, latents, codec.cpu(), judge_seconds, device, out)
