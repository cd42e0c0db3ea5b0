"""What `python dev.py demo` shows: one picture, two trainings, and what the three models make of the same prompts.

A real ComfyUI runs one workflow: the checkpoint as it is, fine-tuned on the picture by DreamBooth, and by DreamBooth
with SuDe; each samples the same attribute prompts from the same noise. Written to the output folder: the example, the
grid of all pictures, the chart of the SuDe training and the workflow. Needs the environment that dev.py sets up.
"""

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from bench.comfy_client import ComfyClient, Result
from bench.comfy_server import WORK, ComfyServer, ServerError, link, prepare_base


@dataclass(frozen=True)
class Settings:
    """How the demo trains and samples.

    Attributes:
        rows: (attribute, context) of each row of the grid.
        pictures: how many pictures of each row, all from one seed.
        size: side of example and samples in pixels; 0 lets the node choose (samples then have 512).
        options: inputs of SuDe Training Options that differ from its defaults.
    """

    rows: tuple[tuple[str, str], ...]
    w_s: float
    steps: int
    learning_rate: float
    identifier: str = "sks"
    training_seed: int = 0
    size: int = 0
    sampler: str = "ddim"
    scheduler: str = "ddim_uniform"
    sampling_steps: int = 50
    cfg: float = 10.0
    negative: str = "monochrome, lowres, bad anatomy, worst quality, low quality"
    seed: int = 7
    pictures: int = 2
    options: dict[str, object] = field(default_factory=dict)


# The mini world is small and learns fast, so it takes other numbers than the paper's. Seconds on two cores.
MINI_WORLD = Settings(
    rows=(("running", ""), ("flying", ""), ("burning", ""), ("broken", ""), ("", "wearing a hat"), ("", "in the snow")),
    w_s=0.4,
    steps=140,
    learning_rate=3e-5,
    size=64,
    sampling_steps=20,
    cfg=4.0,
    negative="",
    options={
        "resolution": 64,
        "batch_size": 2,
        "gradient_checkpointing": False,
        "prior": "class images",
        "prior.number": 16,
        "prior.steps": 20,
        "prior.cfg": 4.0,
        "prior.negative_prompt": "",
    },
)
# The paper's training and the released code's sampling, for a real Stable Diffusion checkpoint.
PAPER = Settings(
    rows=(("running", ""), ("jumping", ""), ("", "in the snow"), ("", "on the beach"), ("", "wearing a hat")),
    w_s=0.4,
    steps=500,
    learning_rate=1e-6,
)
SUBJECT = "spike"  # of the mini world
MOST_ROWS = 8  # sockets of SuDe Grid
COLUMNS = ("base model", "DreamBooth", "DreamBooth + SuDe")
CHECKPOINT = WORK / "checkpoints" / "miniworld.safetensors"


class DemoError(RuntimeError):
    """Why the demo cannot go on, in one sentence."""


# --- The workflow ----------------------------------------------------------------------------------------------------


@dataclass
class Workflow:
    """A workflow in API format, and which of its nodes make what.

    Attributes:
        trainings: the SuDe Fine-Tune node of each column that has one.
        grid: the SuDe Grid node that shows everything.
    """

    client: ComfyClient
    nodes: dict[str, dict] = field(default_factory=dict)
    trainings: dict[str, str] = field(default_factory=dict)
    grid: str = ""

    def add(self, class_type: str, title: str, inputs: dict[str, object]) -> str:
        """Add a node, with the defaults for what is not given, and return its identifier."""
        name = str(len(self.nodes) + 1)
        self.nodes[name] = self.client.node(class_type, inputs, title)
        return name


def build(client: ComfyClient, checkpoint: str, image: str, category: str, settings: Settings) -> Workflow:
    """The demo's workflow, from nodes that anyone can put together in ComfyUI."""
    flow = Workflow(client)
    loader = flow.add("CheckpointLoaderSimple", "checkpoint", {"ckpt_name": checkpoint})
    example = flow.add("LoadImage", "example", {"image": image})
    options = flow.add("SuDeTrainingOptions", "training options", settings.options)
    size = settings.size or 512
    latent = {"width": size, "height": size, "batch_size": settings.pictures}
    noise = flow.add("EmptyLatentImage", "empty latent", latent)
    sources: dict[str, tuple[str, str | None]] = {COLUMNS[0]: (loader, None)}
    for column, w_s in zip(COLUMNS[1:], (0.0, settings.w_s), strict=True):
        inputs = {
            **{name: [loader, slot] for slot, name in enumerate(("model", "clip", "vae"))},
            "image": [example, 0],
            "options": [options, 0],
            "category": category,
            "baseline": "DreamBooth",
            "baseline.w_s": w_s,
            "baseline.steps": settings.steps,
            "baseline.learning_rate": settings.learning_rate,
            "baseline.identifier": settings.identifier,
            "training_seed": settings.training_seed,
        }
        trained = flow.trainings[column] = flow.add("SuDeFineTune", column, inputs)
        sources[column] = (trained, trained)
    rows, labels = [], []
    for row, (attribute, context) in enumerate(settings.rows):
        words = {"attribute": attribute, "context": context}
        labels.append(" ".join(f"{attribute} {category} {context}".split()))
        batch = example
        for column, (model, subject) in sources.items():
            caption: object = base_caption(category, attribute, context)
            if subject:
                caption = [flow.add("SuDePrompt", f"prompt {row + 1}", {"subject": [subject, 2], **words}), 0]
            drawn = sample(flow, settings, f"{column} {row + 1}", model, caption, noise, loader)
            batch = flow.add("ImageBatch", f"row {row + 1}", {"image1": [batch, 0], "image2": [drawn, 0]})
        rows.append(batch)
    columns = ["the one example", *(column for column in COLUMNS for _ in range(settings.pictures))]
    sockets = {"images" if row == 0 else f"images_{row + 1}": [batch, 0] for row, batch in enumerate(rows)}
    note = f"the same noise (seed {settings.seed}) in every column; the base model is asked for any {category}"
    texts = {"row_labels": "\n".join(labels), "column_labels": "\n".join(columns), "title": note}
    flow.grid = flow.add("SuDeGrid", "grid", {**sockets, **texts, "cell": 128 if size <= 128 else 224})
    return flow


def base_caption(category: str, attribute: str, context: str) -> str:
    """What to ask a model that does not know the subject: the same prompt about any member of its category."""
    return " ".join(f"photo of a {attribute} {category} {context}".split())


def sample(flow: Workflow, settings: Settings, title: str, model: str, caption: object, noise: str, loader: str) -> str:
    """Sample one caption from one model; return the node that has the pictures."""
    positive = flow.add("CLIPTextEncode", f"{title}: prompt", {"clip": [model, 1], "text": caption})
    negative = flow.add("CLIPTextEncode", f"{title}: negative", {"clip": [model, 1], "text": settings.negative})
    inputs = {
        "model": [model, 0],
        "positive": [positive, 0],
        "negative": [negative, 0],
        "latent_image": [noise, 0],
        "seed": settings.seed,
        "steps": settings.sampling_steps,
        "cfg": settings.cfg,
        "sampler_name": settings.sampler,
        "scheduler": settings.scheduler,
    }
    latent = flow.add("KSampler", f"{title}: sample", inputs)
    return flow.add("VAEDecode", title, {"samples": [latent, 0], "vae": [loader, 2]})


# --- Following it ----------------------------------------------------------------------------------------------------


class Watcher:
    """Shows a run as one line that keeps changing, and notes what the trainings said and how long they took."""

    def __init__(self, workflow: Workflow) -> None:
        self.titles = {name: node["_meta"]["title"] for name, node in workflow.nodes.items()}
        self.live = sys.stdout.isatty()
        self.start = self.shown = time.monotonic()
        self.node = ""
        self.began: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.said: dict[str, list[tuple[float, str]]] = {}

    def __call__(self, _: str, kind: str, data: dict) -> None:
        """Take one event of the run."""
        now = time.monotonic()
        if kind == "executing":
            self.leave(now)
            self.node = data["node"]
            self.began[self.node] = now
        elif kind == "text":
            self.said.setdefault(data["node"], []).append((now, data["text"]))
            self.show(f"{self.titles.get(data['node'], '')}: {data['text']}", now)
        elif kind == "progress" and data["node"] not in self.said:
            self.show(f"{self.titles.get(data['node'], '')}: step {data['value']}/{data['max']}", now)

    def leave(self, now: float) -> None:
        """The node that ran until now is done."""
        if self.node:
            self.seconds[self.node] = self.seconds.get(self.node, 0) + now - self.began[self.node]

    def show(self, text: str, now: float) -> None:
        """Show a line: over the last one in a terminal, else a new one every ten seconds."""
        line = f"[{now - self.start:4.0f} s] {text}"
        if self.live:
            print(f"\r{line[:118]:<118}", end="", flush=True)
        elif now - self.shown >= 10:
            self.shown = now
            print(line, flush=True)

    def close(self) -> None:
        """The run is over."""
        self.leave(time.monotonic())
        self.node = ""
        if self.live:
            print(f"\r{'':<118}\r", end="", flush=True)

    def figures(self, node: str) -> str:
        """One training in figures: how long, seconds a step, and what its last step said."""
        said = [(when, text) for when, text in self.said.get(node, []) if re.search(r"training \d+/\d+", text)]
        parts = [f"{self.seconds.get(node, 0):.0f} s"]
        counted = [(when, int(re.search(r"training (\d+)/", text).group(1))) for when, text in said]
        if len(counted) > 1 and counted[-1][1] > counted[0][1]:
            per_step = (counted[-1][0] - counted[0][0]) / (counted[-1][1] - counted[0][1])
            parts.append(f"{per_step:.3f} s/step")
        last = said[-1][1] if said else ""
        for label, pattern in (("L_sub", r"loss ([\d.e-]+)"), ("gate", r"gate (\S+ open)")):
            found = re.search(pattern, last)
            if found:
                parts.append(f"{label} {found.group(1)}")
        return ", ".join(parts)


# --- The whole -------------------------------------------------------------------------------------------------------


def mini_world(folder: Path) -> tuple[Path, Path, str]:
    """The mini world's checkpoint, a picture of one of its subjects (drawn into `folder`) and its category."""
    from bench.miniworld import world
    from bench.miniworld.expand import expand

    category, subject = world.SUBJECTS[SUBJECT]
    picture = folder / f"{SUBJECT}.png"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(world.render(category, None, subject)).save(picture)
    try:
        return expand(CHECKPOINT), picture, category
    except (FileNotFoundError, ValueError) as error:
        raise DemoError(f"The mini world's checkpoint cannot be had: {error}") from error


def place_files(base: Path) -> None:
    """Put the mini world's checkpoint and example into a base directory (what `dev.py serve` starts with)."""
    checkpoint, _, _ = mini_world(base / "input")
    link(checkpoint, base / "models" / "checkpoints" / checkpoint.name)


@contextlib.contextmanager
def running(address: str | None, port: int | None, checkpoint: Path) -> Iterator[ComfyClient]:
    """A client of a ComfyUI that has the checkpoint: one started here, or one that runs already."""
    if address:
        with ComfyClient(address) as client:
            yield client
        return
    base = prepare_base(WORK / "demo-base")
    link(checkpoint, base / "models" / "checkpoints" / checkpoint.name)
    print("Starting ComfyUI ...", flush=True)
    with ComfyServer(base, port=port, log=WORK / "logs" / "demo-server.log") as server:
        with ComfyClient(server.address) as client:
            yield client


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="your Stable Diffusion 1.x or 2.x checkpoint")
    parser.add_argument("--image", type=Path, help="a picture of your subject")
    parser.add_argument("--category", help="what it shows, for example: dog")
    parser.add_argument("--attribute", action="append", default=[], help="a row of the grid: word before the subject")
    parser.add_argument("--context", action="append", default=[], help="a row of the grid: words after the subject")
    for name, kind in (("steps", int), ("learning-rate", float), ("w-s", float), ("training-seed", int), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, help="instead of the preset's")
    parser.add_argument("--output", type=Path, default=WORK / "demo", help="folder for what the demo makes")
    parser.add_argument("--port", type=int, help="port of the ComfyUI server (a free one if not given)")
    parser.add_argument("--server", metavar="URL", help="use this running ComfyUI (it must have the checkpoint)")
    parser.add_argument("--only-files", type=Path, metavar="BASE", help=argparse.SUPPRESS)  # for dev.py serve
    return parser.parse_args(arguments)


def choose(options: argparse.Namespace) -> tuple[Path, Path, str, Settings]:
    """Checkpoint, example, category and settings: the mini world's, or the user's own."""
    if options.checkpoint:
        if not options.image or not options.category:
            raise DemoError("--checkpoint needs --image FILE (a picture of your subject) and --category TEXT with it.")
        checkpoint, image, category, settings = options.checkpoint, options.image, options.category, PAPER
    else:
        checkpoint, image, category = mini_world(options.output)
        image, category, settings = options.image or image, options.category or category, MINI_WORLD
    for what, path in (("checkpoint", checkpoint), ("image", image)):
        if not path.is_file():
            raise DemoError(f"There is no {what} file {path}.")
    given = ("steps", "learning_rate", "w_s", "training_seed", "seed")
    changes: dict[str, object] = {name: getattr(options, name) for name in given if getattr(options, name) is not None}
    rows = [(attribute, "") for attribute in options.attribute] + [("", context) for context in options.context]
    if rows:
        if len(rows) > MOST_ROWS:
            raise DemoError(f"{len(rows)} rows were asked for, but the grid has at most {MOST_ROWS}.")
        changes["rows"] = tuple(rows)
    return checkpoint, image, category, Settings(**{**vars(settings), **changes})


def write(client: ComfyClient, flow: Workflow, result: Result, to: Path) -> None:
    """Fetch the grid and the chart and write them."""
    for node, name in ((flow.grid, "grid.png"), (flow.trainings[COLUMNS[-1]], "chart.png")):
        (to / name).write_bytes(client.view(result.images(node)[0]))


def main(arguments: list[str] | None = None) -> int:
    """Run the demo."""
    options = parse(arguments)
    if options.only_files:
        place_files(options.only_files)
        return 0
    start = time.monotonic()
    checkpoint, image, category, settings = choose(options)
    options.output.mkdir(parents=True, exist_ok=True)
    Image.open(image).convert("RGB").save(options.output / "example.png")
    with running(options.server, options.port, checkpoint) as client:
        name = client.upload_image("demo_example.png", (options.output / "example.png").read_bytes())
        flow = build(client, checkpoint.name, name, category, settings)
        (options.output / "workflow_api.json").write_text(json.dumps(flow.nodes, indent=2), encoding="utf-8")
        print(f"Fine-tuning {checkpoint.name} on {image.name} ({category}), twice, and sampling ...", flush=True)
        watcher = Watcher(flow)
        result = client.submit(flow.nodes, on_event=watcher)
        watcher.close()
        if result.error:
            title = watcher.titles.get(result.error.node or "", "ComfyUI")
            raise DemoError(f"{title}: {result.error.message}")
        write(client, flow, result, options.output)
    trainings = "; ".join(f"{column}: {watcher.figures(node)}" for column, node in flow.trainings.items())
    print(f"Wrote example.png, grid.png, chart.png and workflow_api.json to {options.output}")
    print(f"{settings.steps} steps each - {trainings} - all in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DemoError, ServerError) as problem:
        sys.exit(f"demo: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
