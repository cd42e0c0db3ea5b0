"""SuDe Save Subject, Load Subject and Apply Subject: a training's result as a file that works everywhere."""

import base64
import io as bytes_io
from pathlib import Path

import torch
from comfy_api.latest import io, ui
from PIL import Image

from .. import files, subject
from ..data import from_pil
from ..host import folders
from ..host.apply import apply_subject, differences
from ..host.progress import Progress
from ..subject import PRECISIONS, Subject
from .sockets import CATEGORY, SubjectSocket, expect

NONE = "(no subject saved yet)"
LARGEST_THUMBNAIL = 512  # px; a file from a stranger may claim anything


class SuDeSaveSubject(io.ComfyNode):
    """SUBJECT -> file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and help of the node."""
        return io.Schema(
            node_id="SuDeSaveSubject",
            display_name="SuDe Save Subject",
            category=CATEGORY,
            description="Saves a trained subject as one file in output/sude, for SuDe Load Subject: everything it "
            "learned, how it was trained and a small picture. Give it to others; it holds no program.",
            search_aliases=["save lora", "export", "keep"],
            is_output_node=True,
            inputs=[
                SubjectSocket.Input("subject", tooltip="From SuDe Fine-Tune."),
                io.String.Input(
                    "filename_prefix",
                    default="subject",
                    tooltip="Name of the file, with folders if you like: dogs/spike. A number is added, nothing is "
                    "overwritten.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="fp32",
                    tooltip="fp32 keeps every bit. fp16 and bf16 take half the room; the node says how much they lose.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file is.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, subject: Subject, filename_prefix="subject", precision="fp32") -> io.NodeOutput:
        """Write the file."""
        expect(subject, Subject, "subject", "SuDe Fine-Tune or SuDe Load Subject")
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}, but it must be one of: {', '.join(PRECISIONS)}.")
        path = files.free_path(folders.subjects_folder(), filename_prefix)
        with Progress(cls.hidden.unique_id) as report:
            report.phase(f"saving {subject.size / 1e6:.0f} MB", 1)
            try:
                error = subject.save(path, precision)
            except OSError as problem:
                raise OSError(f"{path} could not be written ({problem}): make room on that disk.") from problem
            lost = f", relative error {error:.1e}" if precision != "fp32" else ""
            report.end(f"{path.name} ({path.stat().st_size / 1e6:.1f} MB{lost})")
        choice = path.relative_to(folders.subjects_folder())  # as SuDe Load Subject offers it
        folder = (Path(folders.SUBJECTS) / choice.parent).as_posix()
        saved = {"filename": path.name, "subfolder": folder, "type": "output", "choice": choice.as_posix()}
        return io.NodeOutput(str(path), ui={"sude_saved": [saved]})


class SuDeLoadSubject(io.ComfyNode):
    """File -> SUBJECT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and help of the node."""
        return io.Schema(
            node_id="SuDeLoadSubject",
            display_name="SuDe Load Subject",
            category=CATEGORY,
            description="Loads a subject saved by SuDe Save Subject, or one you were given: nothing is trained again.",
            search_aliases=["load lora", "import"],
            inputs=[
                io.Combo.Input(
                    "subject_file",
                    options=list(folders.subject_files()) or [NONE],
                    tooltip="A file below output/sude, models/sude or input/sude; the button uploads one. Press R "
                    "after adding files by hand.",
                ),
            ],
            outputs=[SubjectSocket.Output(display_name="SUBJECT", tooltip="For SuDe Apply Subject and SuDe Prompt.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, subject_file="") -> str:
        """Another file under the same name is loaded again."""
        path = folders.subject_files().get(subject_file)
        status = path.stat() if path else None
        return f"{subject_file} {status.st_mtime_ns} {status.st_size}" if status else ""

    @classmethod
    def execute(cls, subject_file="") -> io.NodeOutput:
        """Read and check the file. Raises ValueError if it is missing, damaged, newer or no subject."""
        path = folders.subject_files().get(subject_file)
        if path is None:
            raise ValueError(
                f"subject_file {subject_file!r} is not there: save a subject with SuDe Save Subject, or put the file "
                "in models/sude and press R."
            )
        with Progress(cls.hidden.unique_id) as report:
            report.phase(f"loading {path.name}", 1)
            loaded = subject.load(path)
            about = loaded.metadata
            report.end(f"{about['subject']} · {about['method']}, {loaded.log.steps} steps · {about.get('trained', '')}")
        picture = thumbnail(about)
        shown = ui.PreviewImage(picture, cls=cls) if picture is not None else None
        return io.NodeOutput(loaded, ui=shown)


class SuDeApplySubject(io.ComfyNode):
    """MODEL, CLIP and SUBJECT -> patched MODEL and CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and help of the node."""
        return io.Schema(
            node_id="SuDeApplySubject",
            display_name="SuDe Apply Subject",
            category=CATEGORY,
            description="Puts a subject into a checkpoint of the family it was trained on. Chain two to have two "
            "subjects in one model.",
            search_aliases=["load lora", "apply lora"],
            inputs=[
                io.Model.Input("model", tooltip="SD1.x or SD2.x model. It is only read, never changed."),
                io.Clip.Input("clip", tooltip="The same checkpoint's CLIP. It is only read, never changed."),
                SubjectSocket.Input("subject", tooltip="From SuDe Load Subject or SuDe Fine-Tune."),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much of what the UNet learned is added; 1 is all, 0 none.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much of what the text encoder learned is added. A new word has no strength: the CLIP "
                    "knows it.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the subject in it, for any sampler."),
                io.Clip.Output(
                    display_name="CLIP", tooltip="The text encoder with the subject in it, for your prompts."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, clip, subject: Subject, strength_model=1.0, strength_clip=1.0) -> io.NodeOutput:
        """Patch clones. Raises ValueError if the subject is of another family."""
        if model is None or clip is None:
            missing = "model" if model is None else "clip"
            raise ValueError(f"{missing} is missing: connect the {missing.upper()} of a checkpoint.")
        expect(subject, Subject, "subject", "SuDe Fine-Tune or SuDe Load Subject")
        with Progress(cls.hidden.unique_id) as report:
            report.phase("applying", 1)
            patched = apply_subject(model, clip, subject, strength_model, strength_clip)
            report.end("; ".join([subject.metadata["subject"], *differences(model, subject)]))
        return io.NodeOutput(*patched)


def thumbnail(about: dict) -> torch.Tensor | None:
    """[1, H, W, 3] the example's picture in a subject's metadata, None if there is none that can be shown."""
    uri = about.get("example", {}).get("thumbnail", "") if isinstance(about.get("example"), dict) else ""
    if not isinstance(uri, str) or not uri.startswith("data:image/jpeg;base64,"):
        return None
    try:
        image = Image.open(bytes_io.BytesIO(base64.b64decode(uri.split(",", 1)[1])), formats=["JPEG"])
        if max(image.size) > LARGEST_THUMBNAIL:
            return None
        return from_pil(image)
    except (OSError, ValueError, SyntaxError):  # what Pillow makes of broken bytes
        return None
