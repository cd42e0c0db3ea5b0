"""SuDe Sweep: the same training at several strengths of the SuDe loss (the paper's "flexible w_s")."""

import dataclasses
import math

import torch
from comfy_api.latest import io, ui

from .. import captions
from ..host.progress import Progress
from ..recipe import Recipe
from ..watch import SUBJECT
from .fine_tune import Training, title, training_inputs, workflow_id
from .sockets import CATEGORY, SubjectSocket

MULTIPLIERS = "0.5, 1, 2"  # of w_s. Source: paper Sec. 5.1 ("flexible w_s")
MOST = 20  # trainings in one sweep


class SuDeSweep(io.ComfyNode):
    """One training for each multiplier of w_s."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and help of the node."""
        return io.Schema(
            node_id="SuDeSweep",
            display_name="SuDe Sweep",
            category=CATEGORY,
            description="Trains your subject at several strengths of SuDe, each once, and gives lists: connect them to "
            "one CLIP Text Encode and one KSampler as if they were single, and SuDe Grid shows all results.",
            search_aliases=["xy plot", "grid search", "compare", "w_s"],
            inputs=[
                *training_inputs(),
                io.String.Input(
                    "multipliers",
                    default=MULTIPLIERS,
                    optional=True,
                    tooltip="Of w_s, one training each, separated by commas. 0 is the baseline without SuDe. The paper "
                    "picks the best of 0.5, 1 and 2.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="One a line; every model draws every prompt. [subject] stands for what names your subject. "
                    "Empty: write the prompts elsewhere.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", is_output_list=True, tooltip="The model of each pair of w_s and prompt."
                ),
                io.Clip.Output(
                    display_name="CLIP", is_output_list=True, tooltip="The text encoder of each, for CLIP Text Encode."
                ),
                SubjectSocket.Output(
                    display_name="SUBJECT", is_output_list=True, tooltip="What was learned for each, to be saved."
                ),
                io.String.Output(
                    display_name="label", is_output_list=True, tooltip="'w_s 0.2' of each: row_labels of SuDe Grid."
                ),
                io.String.Output(
                    display_name="prompt",
                    is_output_list=True,
                    tooltip="The prompt of each: text of CLIP Text Encode and column_labels of SuDe Grid.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, multipliers=MULTIPLIERS, prompts="", **inputs) -> io.NodeOutput:
        """Train one after the other. Raises ValueError on what cannot be trained, before anything is."""
        training = Training(**inputs)
        recipe = training.recipe()
        recipes = [scaled(recipe, factor) for factor in read_multipliers(multipliers)]
        lines = read_prompts(prompts)
        rows, charts = [], []
        with Progress(cls.hidden.unique_id, title(recipes[0]), workflow_id(cls.hidden.extra_pnginfo)) as report:
            for index, one in enumerate(recipes):
                report.begin(title(one), index + 1, len(recipes))
                (*patched, subject), picture = training.run(one, report)
                words = subject.metadata["subject"]
                written = [captions.normalize(line.replace(SUBJECT, words)) for line in lines]
                rows += [(*patched, subject, label(one), prompt) for prompt in written]
                charts.append(picture)
        shown = ui.PreviewImage(torch.cat(charts), cls=cls)
        return io.NodeOutput(*(list(column) for column in zip(*rows, strict=True)), ui=shown)


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with w_s times a factor, checked."""
    w_s = float(f"{recipe.baseline.w_s * factor:.6g}")  # 0.4 x 3 is 1.2, not 1.2000000000000002
    return dataclasses.replace(recipe, baseline=dataclasses.replace(recipe.baseline, w_s=w_s)).checked()


def label(recipe: Recipe) -> str:
    """What tells this training from the sweep's others."""
    return f"w_s {recipe.baseline.w_s:g}" if recipe.baseline.w_s else "w_s 0 (plain)"


def read_multipliers(text: str) -> list[float]:
    """The numbers in a text, each once, in their order. Raises ValueError if it is no list of numbers from 0 on."""
    numbers = []
    for part in str(text).replace(";", ",").split(","):
        if not part.strip():
            continue
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not 0 <= number <= 1000:
            raise ValueError(
                f"multipliers holds {part.strip()[:40]!r}, but each must be a number from 0 to 1000: for example "
                f"{MULTIPLIERS}."
            )
        numbers.append(number)
    numbers = list(dict.fromkeys(numbers))
    if not 1 <= len(numbers) <= MOST:
        raise ValueError(
            f"multipliers has {len(numbers)} numbers, but it must have 1 to {MOST}: for example {MULTIPLIERS}."
        )
    return numbers


def read_prompts(text: str) -> list[str]:
    """The prompts, one a line; a single empty one if there are none."""
    captions.check_text("prompts", text)
    return [line for line in text.splitlines() if line.strip()] or [""]
