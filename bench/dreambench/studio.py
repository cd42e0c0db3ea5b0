"""Makes a cell as a user would, in a real ComfyUI with SuDe Fine-Tune, KSampler and Save Image, and scores it.

What a `Studio` is given and gives back are plain values, so that it can stand in another process or on another machine.
"""

import io
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import websocket
from PIL import Image

from bench.comfy_client import ComfyClient, Result
from bench.comfy_server import ComfyServer, ServerError, device, link, prepare_base
from comfy_sude.scores import Models, evaluate

from . import protocol
from .protocol import Cell, Protocol
from .results import DONE, FAILED
from .subjects import Subject

LIFELINE = Path(__file__).with_name("lifeline.py")
# What a cell may fail with and others still succeed: the server died, memory ran out, a file is not there
TROUBLE = (OSError, RuntimeError, ServerError, ValueError, websocket.WebSocketException)


@dataclass(frozen=True)
class Job:
    """All that a cell needs.

    Attributes:
        cell: which.
        subject: its subject.
        protocol: how it is made.
        checkpoint: the backbone's file, on the machine that makes the cell.
        fingerprint: of what decides the result.
    """

    cell: Cell
    subject: Subject
    protocol: Protocol
    checkpoint: str
    fingerprint: str


@dataclass(frozen=True)
class Outcome:
    """What became of a job: the record for the results, and the pictures as PNG files, prompt by prompt."""

    record: dict
    pictures: tuple[bytes, ...] = ()


def failed(job: Job, error: str, **more: object) -> Outcome:
    """The outcome of a job that failed."""
    said = {"key": job.cell.key, "fingerprint": job.fingerprint, "status": FAILED, "cell": asdict(job.cell)}
    return Outcome({**said, "error": error, **more})


class BoundServer(ComfyServer):
    """A ComfyUI that does not outlive this process."""

    def command(self) -> list[str]:
        """The command line, led by what watches this process."""
        python, unbuffered, *rest = super().command()
        return [python, unbuffered, str(LIFELINE), *rest]


class Studio:
    """A ComfyUI and the scoring models, for cell after cell. Use it in a `with` statement.

    Args:
        base: base directory of the ComfyUI, of no other; trainings and class images are kept in it.
        models: where the scoring models lie.
    """

    def __init__(self, base: Path, models: Path | str):
        self.base = prepare_base(base)
        self.models = Models([models], device(Path(sys.executable)))
        self.server: BoundServer | None = None

    def __enter__(self) -> "Studio":
        return self

    def __exit__(self, *_: object) -> None:
        if self.server:
            self.server.stop()
        self.models.free()

    def address(self) -> str:
        """The address of a server that answers: started on first use, and again when it died."""
        if self.server and (self.server.process.poll() is not None or not self.server.answers()):
            self.server.stop()
            self.server = None
        if self.server is None:
            server = BoundServer(self.base, log=self.base / "server.log")
            self.server = server.__enter__()
        return self.server.address

    def perform(self, job: Job, photographs: Sequence[bytes]) -> Outcome:
        """Make one cell. What goes wrong is in the record, not raised.

        Args:
            job: the cell.
            photographs: picture files of the subject: the one to train on, then the other references.
        """
        start = time.monotonic()
        try:
            outcome = self._perform(job, photographs)
        except TROUBLE as error:
            return failed(job, f"{type(error).__name__}: {error}", host=platform.node())
        outcome.record["seconds"] = round(time.monotonic() - start, 1)
        return outcome

    def _perform(self, job: Job, photographs: Sequence[bytes]) -> Outcome:
        self.models.check(job.protocol.metrics)
        checkpoint = Path(job.checkpoint)
        if not checkpoint.is_file():
            raise FileNotFoundError(f"there is no checkpoint {checkpoint} on {platform.node()}")
        link(checkpoint, self.base / "models" / "checkpoints" / checkpoint.name)
        with ComfyClient(self.address()) as client:
            example = client.upload_image(f"dreambench_{job.subject.name}.png", as_png(photographs[0]))
            flow = workflow(client, job, checkpoint.name, example)
            result = client.submit(flow)
            if result.error is not None:
                where = flow.get(result.error.node or "", {}).get("class_type", "ComfyUI")
                raise RuntimeError(f"{where}: {result.error.message}")
            pictures = self.collect(client, job, result)
            client.free()  # the scoring models need the memory
        scores = self.score(job, pictures, photographs)
        return Outcome(
            {
                "key": job.cell.key, "fingerprint": job.fingerprint, "status": DONE, "cell": asdict(job.cell),
                "prompts": protocol.prompts(job.cell, job.subject), "scores": scores, "references": len(photographs),
                "w_s": job.cell.w_s, "training": said_last(result), "host": platform.node(),
            },
            tuple(pictures),
        )  # fmt: skip

    def collect(self, client: ComfyClient, job: Job, result: Result) -> list[bytes]:
        """The pictures, prompt by prompt, taken out of the server's output folder."""
        found = []
        for index in range(len(job.subject.prompts)):
            shown = result.images(f"saved {index}")
            if len(shown) != job.protocol.pictures:
                raise RuntimeError(f"prompt {index + 1} has {len(shown)} pictures, not {job.protocol.pictures}")
            for image in shown:
                found.append(client.view(image))
                (self.base / "output" / image["subfolder"] / image["filename"]).unlink(missing_ok=True)
        return found

    def score(self, job: Job, pictures: Sequence[bytes], photographs: Sequence[bytes]) -> dict[str, list[list[float]]]:
        """Metric -> for each prompt the percentages of its pictures."""
        count = job.protocol.pictures
        texts = [text for text in protocol.texts(job.cell, job.subject) for _ in range(count)]
        found = evaluate(
            [as_tensor(one) for one in pictures],
            [as_tensor(one) for one in photographs],
            texts,
            self.models,
            job.protocol.metrics,
        )
        if self.models.device.type != "cpu":  # the next training needs the memory
            self.models.free()
        return {
            metric: [[round(value, 4) for value in values[at : at + count]] for at in range(0, len(values), count)]
            for metric, values in found.items()
        }


def workflow(client: ComfyClient, job: Job, checkpoint: str, example: str) -> dict[str, dict]:
    """The cell as a workflow in API format, from nodes that anyone can put together.

    Args:
        client: of the server whose nodes give the defaults.
        job: the cell.
        checkpoint: the name in the models folder.
        example: the picture's name in the input folder.
    """
    cell, plan = job.cell, job.protocol
    guidance = plan.guidance[cell.baseline]
    options = {"preview_every": 0, **plan.options.get(cell.baseline, {})}
    flow = {
        "checkpoint": client.node("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        "example": client.node("LoadImage", {"image": example}),
        "options": client.node("SuDeTrainingOptions", options),
        "noise": client.node(
            "EmptyLatentImage", {"width": plan.size, "height": plan.size, "batch_size": plan.pictures}
        ),
    }
    training = {
        **{name: ["checkpoint", slot] for slot, name in enumerate(("model", "clip", "vae"))},
        "image": ["example", 0],
        "options": ["options", 0],
        "category": job.subject.category,
        "baseline": cell.baseline,
        "baseline.w_s": cell.w_s,
        "training_seed": cell.seed,
        **plan.training.get(cell.baseline, {}),
    }
    flow["training"] = client.node("SuDeFineTune", training)
    flow["negative"] = client.node("CLIPTextEncode", {"clip": ["training", 1], "text": guidance.negative})
    sampling = {"steps": plan.sampling_steps, "cfg": guidance.cfg, "sampler_name": plan.sampler}
    for index, prompt in enumerate(protocol.prompts(cell, job.subject)):
        flow[f"prompt {index}"] = client.node("CLIPTextEncode", {"clip": ["training", 1], "text": prompt})
        inputs = {
            "model": ["training", 0],
            "positive": [f"prompt {index}", 0],
            "negative": ["negative", 0],
            "latent_image": ["noise", 0],
            "seed": cell.sampling_seed(index),
            "scheduler": plan.scheduler,
            **sampling,
        }
        flow[f"sampler {index}"] = client.node("KSampler", inputs)
        decoded = {"samples": [f"sampler {index}", 0], "vae": ["checkpoint", 2]}
        flow[f"decoded {index}"] = client.node("VAEDecode", decoded)
        saved = {"images": [f"decoded {index}", 0], "filename_prefix": "dreambench/picture"}
        flow[f"saved {index}"] = client.node("SaveImage", saved)
    return flow


def said_last(result: Result) -> str:
    """What SuDe Fine-Tune said last."""
    return next((text for node, text in reversed(result.texts) if node == "training"), "")


def as_png(data: bytes) -> bytes:
    """A picture file as PNG, its pixels as they are in the file."""
    made = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(made, "PNG")
    return made.getvalue()


def as_tensor(data: bytes) -> torch.Tensor:
    """A picture file as [H, W, 3] in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).float() / 255


def write(folder: Path, job: Job, pictures: Sequence[bytes]) -> None:
    """Write a cell's pictures as <prompt>_<picture>.png below the pictures' folder."""
    target, count = folder / job.cell.folder, job.protocol.pictures
    target.mkdir(parents=True, exist_ok=True)
    for index, data in enumerate(pictures):
        (target / f"{index // count}_{index % count}.png").write_bytes(data)
