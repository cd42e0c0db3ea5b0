"""The protocol: what a cell is, how it is trained, sampled and scored. README.md says where each number comes from."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

from comfy_sude.baselines import REGISTRY
from comfy_sude.recipe import Recipe
from comfy_sude.scores import METRICS, strip_identifier

from .subjects import PLACE, Subject

BASELINES = ("DreamBooth", "Custom Diffusion", "ViCo")  # paper, Table 1
MULTIPLIERS = (0.0, 0.5, 1.0, 2.0)  # of each baseline's w_s: 0 is plain, 1 SuDe; the paper's "flexible" takes the best
# The released code's negative prompt (stable_txt2img.py:253), which it samples DreamBooth with
NEGATIVE = "monochrome, lowres, bad anatomy, worst quality, low quality"


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of one baseline's samples."""

    cfg: float
    negative: str = ""


@dataclass(frozen=True)
class Protocol:
    """How every cell is made. The defaults are the published run; only the smoke run has others.

    Attributes:
        pictures: a prompt, from one seed as one batch.
        sampler: ComfyUI's name.
        scheduler: ComfyUI's name.
        sampling_steps: of each picture.
        size: of the pictures, px.
        guidance: by baseline.
        training: inputs of SuDe Fine-Tune that are not the preset, by baseline, as "baseline.steps".
        options: inputs of SuDe Training Options that are not the preset, by baseline.
        references: what CLIP-I, DINO-I and DINOv2-I compare with: "all" pictures of the subject or the "first".
        metrics: of comfy_sude.scores.
    """

    pictures: int = 4  # paper Sec. 5.1
    sampler: str = "ddim"  # with eta 0
    scheduler: str = "ddim_uniform"
    sampling_steps: int = 50  # paper Sec. 5.1
    size: int = 512
    guidance: Mapping[str, Guidance] = field(
        default_factory=lambda: {
            "DreamBooth": Guidance(10.0, NEGATIVE),  # released code
            "Custom Diffusion": Guidance(6.0),  # its authors' code, sample.py
            "ViCo": Guidance(7.5),  # its authors' code, vico_txt2img.py
        }
    )
    training: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    references: str = "all"
    metrics: tuple[str, ...] = METRICS


@dataclass(frozen=True, order=True)
class Cell:
    """One training with its pictures and scores.

    Attributes:
        backbone: its name, as in "SD1.4".
        subject: its name.
        baseline: of BASELINES.
        multiplier: of the baseline's published w_s.
        seed: of the training; the pictures' noise follows from it too.
    """

    backbone: str
    subject: str
    baseline: str
    multiplier: float
    seed: int = 0

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.backbone} | {self.subject} | {self.baseline} | {self.multiplier:g} | {self.seed}"

    @property
    def folder(self) -> str:
        """Where its pictures lie, below the pictures' folder."""
        baseline = self.baseline.lower().replace(" ", "_")
        return f"{self.backbone}/{self.subject}/{baseline}_ws{self.multiplier:g}_seed{self.seed}"

    @property
    def w_s(self) -> float:
        """Weight of the SuDe loss."""
        return float(f"{REGISTRY[self.baseline].settings().w_s * self.multiplier:.6g}")

    def sampling_seed(self, prompt: int) -> int:
        """Of the noise of a prompt's pictures: the same for every baseline and w_s."""
        return 1000 * self.seed + prompt


def cells(
    backbones: Iterable[str],
    subjects: Iterable[str],
    baselines: Iterable[str] = BASELINES,
    multipliers: Iterable[float] = MULTIPLIERS,
    seeds: Iterable[int] = (0,),
) -> Iterator[Cell]:
    """All cells, so ordered that whole subjects come first: what is done at any time can already be compared."""
    for backbone, seed, subject, baseline, multiplier in product(backbones, seeds, subjects, baselines, multipliers):
        yield Cell(backbone, subject, baseline, multiplier, seed)


def words(baseline: str, category: str) -> str:
    """What names the subject: "sks dog", or "*" for ViCo, whose template has no category. Source: paper Sec. 5.1."""
    kind = REGISTRY[baseline]
    return kind.words(Recipe(category, baseline, kind.settings()))


def prompts(cell: Cell, subject: Subject) -> list[str]:
    """The prompts as they are drawn."""
    return [text.replace(PLACE, words(cell.baseline, subject.category)) for text in subject.prompts]


def texts(cell: Cell, subject: Subject) -> list[str]:
    """The prompts as the scoring models read them: the identifier gone, the category in its place if it stood alone."""
    identifier = REGISTRY[cell.baseline].settings().identifier
    return [strip_identifier(text, identifier, subject.category) for text in prompts(cell, subject)]


def fingerprint(cell: Cell, subject: Subject, protocol: Protocol, checkpoint: str) -> str:
    """16 hexadecimal digits that change with anything that decides a cell's result.

    Args:
        cell: the cell.
        subject: its subject.
        protocol: how it is made.
        checkpoint: its file's name.
    """
    said = {
        "cell": dataclasses.asdict(cell),
        "subject": [subject.category, *subject.prompts],
        "checkpoint": checkpoint,
        "protocol": {**dataclasses.asdict(protocol), "guidance": dataclasses.asdict(protocol.guidance[cell.baseline])},
    }
    for part in ("training", "options"):
        said["protocol"][part] = dict(getattr(protocol, part).get(cell.baseline, {}))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
