"""SuDe Export Subject: a SUBJECT in, a file for stock tools out."""

import re
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from .. import files
from ..host import export
from ..host.progress import Progress
from ..subject import PRECISIONS, Subject
from .sockets import CATEGORY, SubjectSocket, expect

FORMATS = {
    "LoRA": "for Load LoRA, with every change exactly as learned (DreamBooth: as large as the checkpoint).",
    "LoRA of a rank": "the nearest low-rank update; small, for other tools too. The text says how much it keeps.",
    "embedding": "the new word of Custom Diffusion or ViCo, for embedding:NAME in prompts.",
    "diffusers LoRA": "for load_lora_weights of a diffusers pipeline.",
    "diffusers weights": "the whole UNet (and text encoder, if it changed) for a folder of diffusers.",
}
MOST_RANKS = 1024


class SuDeExportSubject(io.ComfyNode):
    """The writer of stock formats."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and help of the node."""
        return io.Schema(
            node_id="SuDeExportSubject",
            display_name="SuDe Export Subject",
            category=CATEGORY,
            description="Writes a subject as a LoRA, an embedding or diffusers files, for use without this pack. Files "
            "are never overwritten.",
            search_aliases=["save lora", "extract lora", "textual inversion", "diffusers", "kohya"],
            inputs=[
                SubjectSocket.Input("subject", tooltip="From SuDe Fine-Tune or SuDe Load Subject."),
                io.Model.Input("model", tooltip="The MODEL that went into SuDe Fine-Tune. It is only read."),
                io.Clip.Input("clip", tooltip="The CLIP that went into SuDe Fine-Tune. It is only read."),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="LoRA",
                    tooltip=" ".join(f"{name}: {help}" for name, help in FORMATS.items()),
                ),
                io.String.Input(
                    "filename_prefix",
                    default="subject",
                    tooltip="Name of the file, with folders if you like: dogs/spike. A number is added. LoRAs go to "
                    "output/loras, embeddings to the embeddings folder, diffusers files to output/diffusers.",
                ),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=1,
                    max=MOST_RANKS,
                    tooltip="For the two low-rank formats: a higher rank keeps more of the change and makes a larger "
                    "file. In a diffusers LoRA, what was trained as a LoRA keeps its own rank.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="fp32",
                    tooltip="Of the file. fp32 keeps every bit; fp16 and bf16 are half as large.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="path", tooltip="The file that was written, or the folder of several."),
                io.String.Output(display_name="text", tooltip="What is in it, and what is not."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, subject, model, clip, format="LoRA", filename_prefix="subject", rank=32, precision="fp32"
    ) -> io.NodeOutput:
        """Make the tensors, write them. Raises ValueError for a subject that has no such form."""
        expect(subject, Subject, "subject", "SuDe Fine-Tune or SuDe Load Subject")
        for name, value, known in (("format", format, FORMATS), ("precision", precision, PRECISIONS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, but it must be one of: {', '.join(known)}.")
        if not 1 <= rank <= MOST_RANKS:
            raise ValueError(f"rank is {rank}, but it must be a whole number from 1 to {MOST_RANKS}.")
        with Progress(cls.hidden.unique_id) as report:
            _free_path(format, filename_prefix)  # says at once if the name is no good
            made = _exports(format, (subject, model, clip), rank, precision, _Steps(report))
            path = _free_path(format, filename_prefix)
            for name, one in made.items():
                report.phase(f"writing {name}".strip(), 1)
                files.write(path / f"{name}{files.SUFFIX}" if name else path, one.tensors, one.metadata)
            text = next(iter(made.values())).text
            if format == "embedding":
                text += f"; write embedding:{_name(path, _folder(format))} in prompts"
            report.end(text)
        return io.NodeOutput(str(path), text, ui=ui.PreviewText(f"{path}\n{text}"))


def _exports(format: str, what: tuple, rank: int, precision: str, step: export.Step) -> dict[str, export.Export]:
    """File name (empty if there is one file only) -> file of (subject, model, clip) in a format."""
    if format == "diffusers weights":
        return export.diffusers_weights(*what, precision, step)
    if format == "diffusers LoRA":
        return {"": export.diffusers_lora(*what, rank, precision, step)}
    if format == "embedding":
        return {"": export.embedding(*what, precision)}
    return {"": export.lora(*what, rank if format == "LoRA of a rank" else None, precision, step)}


class _Steps:
    """The progress of an export as a phase of a report, begun when the number of steps is known."""

    def __init__(self, report: Progress):
        self.report = report
        self.begun = False

    def __call__(self, done: int, total: int, name: str) -> None:
        if not self.begun:
            self.begun = True
            self.report.phase("exporting", total)
        self.report.step(done, name)


def _folder(format: str) -> Path:
    """Where files of a format go: folders that the nodes which load them look into."""
    if format == "embedding":
        return Path(folder_paths.get_folder_paths("embeddings")[0])
    return Path(folder_paths.get_output_directory()) / ("diffusers" if format.startswith("diffusers") else "loras")


def _free_path(format: str, prefix: str) -> Path:
    """A new file, or a new folder for diffusers' weights."""
    if format == "embedding":  # the prompt's parser ends a name at a space or bracket and reads commas and colons
        prefix = re.sub(r"[^\w./\\-]+", "_", prefix)
    return files.free_path(_folder(format), prefix, "" if format == "diffusers weights" else files.SUFFIX)


def _name(path: Path, folder: Path) -> str:
    """What prompts call an embedding."""
    return path.relative_to(folder).with_suffix("").as_posix()
