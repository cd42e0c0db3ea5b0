"""Sample the mini world with ComfyUI's own nodes and let the judge count what is right."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from . import text
from .diffusion import ddim
from .expand import NARROW_FILE, read
from .judge import Judge
from .unet import UNet
from .vae import Codec
from .world import ATTRIBUTES, CATEGORIES, grid, prompt

# What the demo uses: the first settings tried, and not one caption missed (README.md).
SAMPLER, SCHEDULER, SAMPLING_STEPS, GUIDANCE = "ddim", "ddim_uniform", 20, 4.0
HERE = Path(__file__).parent
log = logging.getLogger(__name__)


@contextmanager
def _arguments(*arguments: str):
    saved, sys.argv = sys.argv, ["main.py", *arguments]
    try:
        yield
    finally:
        sys.argv = saved


def comfyui_nodes(path: str | Path | None = None) -> Any:
    """ComfyUI's `nodes` module, from `path` or the environment variable COMFYUI_PATH."""
    path = path or os.environ.get("COMFYUI_PATH")
    if not path or not (Path(path) / "nodes.py").is_file():
        raise ValueError(f"No ComfyUI at {path!r}: name its folder with --comfyui or the COMFYUI_PATH variable.")
    sys.path.insert(0, str(path))
    with _arguments(*([] if torch.cuda.is_available() else ["--cpu"])):
        import comfy.options

        comfy.options.enable_args_parsing()
        import nodes
    return nodes


class Painter:
    """The checkpoint in ComfyUI, as a function of caption, seed and number of pictures."""

    def __init__(self, checkpoint: str | Path, comfyui: str | Path | None = None):
        self.nodes = comfyui_nodes(comfyui)
        import folder_paths

        checkpoint = Path(checkpoint).resolve()
        folder_paths.add_model_folder_path("checkpoints", str(checkpoint.parent))
        with _listen() as lines, torch.inference_mode():
            loaded = self.nodes.CheckpointLoaderSimple().load_checkpoint(checkpoint.name)
        self.model, self.clip, self.vae = loaded[:3]
        self.complaints = [line for line in lines if "missing" in line.lower() or "unet unexpected" in line.lower()]
        self.kind = type(self.model.model.model_config).__name__
        self.empty = self.encode("")

    @torch.inference_mode()
    def encode(self, caption: str) -> Any:
        """CLIPTextEncode."""
        return self.nodes.CLIPTextEncode().encode(self.clip, caption)[0]

    @torch.inference_mode()
    def __call__(
        self,
        caption: str,
        seed: int,
        count: int,
        sampler: str = SAMPLER,
        scheduler: str = SCHEDULER,
        steps: int = SAMPLING_STEPS,
        guidance: float = GUIDANCE,
    ) -> torch.Tensor:
        """KSampler and VAEDecode -> pictures [count, 64, 64, 3] in 0..1."""
        latent = self.nodes.EmptyLatentImage().generate(64, 64, count)[0]
        parts = (self.model, seed, steps, guidance, sampler, scheduler, self.encode(caption), self.empty, latent)
        sampled = self.nodes.KSampler().sample(*parts, denoise=1.0)[0]
        return self.nodes.VAEDecode().decode(self.vae, sampled)[0].float().cpu().clamp(0, 1).clone()


class QuickPainter:
    """The narrow net with this package's own DDIM, in bfloat16: many times faster than ComfyUI on a CPU, no ComfyUI."""

    def __init__(self, source: str | Path = NARROW_FILE):
        narrow, _ = read(Path(source))
        self.rows = narrow["rows"].float()
        self.net, self.codec, self.encoder = UNet(), Codec(), text.Encoder(text.seeded_weights())
        for module, kind in ((self.net, "unet."), (self.codec, "vae.")):
            module.load_state_dict({n.removeprefix(kind): w.float() for n, w in narrow.items() if n.startswith(kind)})
            module.eval()

    @torch.inference_mode()
    def __call__(
        self, caption: str, seed: int, count: int, steps: int = SAMPLING_STEPS, guidance: float = GUIDANCE, **_: Any
    ) -> torch.Tensor:
        """Pictures [count, 64, 64, 3] in 0..1, the same every time for a seed."""
        tokens = torch.tensor([text.tokenize(c) for c in ("", caption)])
        noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        index = torch.ones(count, dtype=torch.long)
        latents = ddim(self.net, self.encoder(tokens, self.rows), index, noise, steps, guidance)
        return self.codec.decoder(latents).permute(0, 2, 3, 1).clamp(0, 1).clone()


@contextmanager
def _listen():
    """Collect what is logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(handler)


Pictures = dict[tuple[str, str | None], torch.Tensor]


def paint_all(
    paint: Painter | QuickPainter,
    seeds: int = 8,
    identifier: str = "",
    categories: tuple[str, ...] = CATEGORIES,
    first_seed: int = 0,
) -> Pictures:
    """Pictures [seeds, 64, 64, 3] of every category with every attribute and with none."""
    pictures = {}
    for category in categories:
        for attribute in (None, *ATTRIBUTES):
            seed = first_seed + 1000 * CATEGORIES.index(category)
            pictures[category, attribute] = paint(prompt(category, attribute, identifier), seed, seeds)
        log.info("painted every %s", category)
    return pictures


def score(pictures: Pictures, judge: Judge) -> dict[str, Any]:
    """Shares right, per pair and overall.

    A plain caption is judged by its category alone: half of the training captions leave the attribute out, so that
    "photo of a dog" may show a dog with any.
    """
    pairs: list[dict[str, Any]] = []
    for (category, attribute), painted in pictures.items():
        verdict = judge.classify(painted)
        row = {"category": category, "attribute": attribute}
        row["category_right"] = verdict.is_category(category).float().mean().item()
        if attribute:
            row["attribute_right"] = verdict.is_attribute(attribute).float().mean().item()
        pairs.append(row)
    result: dict[str, Any] = {"pictures": sum(map(len, pictures.values()))}
    result["category_right"] = float(np.mean([row["category_right"] for row in pairs]))
    result["attribute_right"] = float(np.mean([row["attribute_right"] for row in pairs if row["attribute"]]))
    for axis, names in (("category", CATEGORIES), ("attribute", ATTRIBUTES)):
        shares = result[f"by_{axis}"] = {}
        for name in names:
            rows = [row for row in pairs if row[axis] == name]
            shares[name] = {"category_right": float(np.mean([row["category_right"] for row in rows]))}
            shares[name]["attribute_right"] = float(np.mean([r["attribute_right"] for r in rows if r["attribute"]]))
    result["worst_attribute_pair"] = min((r for r in pairs if r["attribute"]), key=lambda r: r["attribute_right"])
    result["worst_category_pair"] = min(pairs, key=lambda r: r["category_right"])
    result["pairs"] = pairs
    return result


def contact_sheet(pictures: Pictures, seed: int = 0) -> Image.Image:
    """One picture a pair, rows categories, columns attributes, with their names."""
    cells = [(pictures[c, a][seed] * 255).round().byte().numpy() for c in CATEGORIES for a in (None, *ATTRIBUTES)]
    sheet = grid(cells, 1 + len(ATTRIBUTES), zoom=1)
    labelled = Image.new("RGB", (sheet.width + 46, sheet.height + 14), "white")
    labelled.paste(sheet, (46, 14))
    draw = ImageDraw.Draw(labelled)
    for i, attribute in enumerate(("(none)", *ATTRIBUTES)):
        draw.text((48 + 66 * i, 1), attribute.removeprefix("wearing ").removeprefix("in "), "black")
    for i, category in enumerate(CATEGORIES):
        draw.text((3, 14 + 66 * i + 27), category, "black")
    return labelled


def as_text(result: dict[str, Any]) -> str:
    """The table of attributes right, one row a category, in percent; category right in brackets."""
    lines = [" " * 9 + "".join(f"{(a or 'none')[-8:]:>12}" for a in (None, *ATTRIBUTES))]
    for category in CATEGORIES:
        cells = [row for row in result["pairs"] if row["category"] == category]
        shown = [(f"{100 * r['attribute_right']:.0f}" if r["attribute"] else "-", r["category_right"]) for r in cells]
        lines.append(f"{category:9}" + "".join(f"{f'{a} ({100 * c:.0f})':>12}" for a, c in shown))
    lines.append(f"category right {result['category_right']:.1%}, attribute right {result['attribute_right']:.1%}")
    return "\n".join(lines)


def report(pictures: dict[str, Pictures], judge: Judge, facts: dict[str, Any], out: Path, name: str) -> dict[str, Any]:
    """Score pictures by identifier ("" for none); write <name>.json and, of the first, grid.png into `out`."""
    settings = {"sampler": SAMPLER, "scheduler": SCHEDULER, "steps": SAMPLING_STEPS, "guidance": GUIDANCE}
    results: dict[str, Any] = {**facts, "settings": settings}
    results["scores"] = {identifier: score(shown, judge) for identifier, shown in pictures.items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    contact_sheet(next(iter(pictures.values()))).save(out / "grid.png", optimize=True)
    return results


def measure(
    paint: Painter | QuickPainter,
    judge: Judge,
    seeds: int = 8,
    identifiers: tuple[str, ...] = ("",),
    out: Path = HERE,
    name: str = "results",
) -> dict[str, Any]:
    """Paint and report every pair, for each identifier."""
    facts: dict[str, Any] = {"painter": type(paint).__name__}
    if isinstance(paint, Painter):
        facts |= {"loads_as": paint.kind, "complaints_on_load": paint.complaints}
    pictures = {identifier: paint_all(paint, seeds, identifier) for identifier in identifiers}
    return report(pictures, judge, facts, out, name)
