"""Draws the workflows' thumbnails, workflows/NAME.jpg: what each makes of the mini world, and the graph of the others.

    python -m bench.pictures [NAME ...]

Trains what the workflows train: hours on two CPU cores for all of them, minutes for each. Needs the environment that
dev.py sets up.
"""

import argparse
import io
import json
import sys
from pathlib import Path

from PIL import Image

from bench.comfy_client import ComfyClient
from bench.comfy_server import REPO, WORK, ComfyServer, link, prepare_base
from bench.demo import CHECKPOINT
from bench.miniworld.expand import expand

WORKFLOWS = REPO / "workflows"
SIDE = 512  # px of a thumbnail
ORDER = (
    "quickstart", "attribute_and_context", "reuse_subject", "sweep_ws", "truncation_ablation", "compare_baselines",
)  # fmt: skip


def thumbnail(data: bytes, path: Path) -> None:
    """A square picture with the whole of another one in it."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIDE, SIDE), picture.getpixel((0, 0)))
    square.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    square.save(path, quality=88)


def run(client: ComfyClient, name: str) -> bytes:
    """The grid (or the first result) that a workflow makes."""
    workflow = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text("utf-8"))

    def follow(_: str, kind: str, data: dict) -> None:
        if kind == "text":
            sys.stderr.write(f"{name}: {data['text']}\n")

    result = client.submit(workflow, on_event=follow)
    if result.error is not None:
        raise RuntimeError(f"{name}: {result.error.message}")
    kinds = {node["class_type"]: number for number, node in workflow.items()}
    return client.view(result.images(kinds.get("SuDeGrid") or kinds["SaveImage"])[0])


def main() -> int:
    """Run the workflows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names or ORDER
    base = prepare_base(WORK / "pictures")
    link(expand(CHECKPOINT), base / "models" / "checkpoints" / "miniworld.safetensors")
    with ComfyServer(base, log=WORK / "pictures.log") as server, ComfyClient(server.address) as client:
        client.upload_image("spike.png", (WORKFLOWS / "spike.png").read_bytes())
        for name in names:
            thumbnail(run(client, name), WORKFLOWS / f"{name}.jpg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
