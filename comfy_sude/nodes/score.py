"""SuDe Score: is it the subject, does it show what the prompt says, and which of a sweep is best."""

import json

from comfy_api.latest import io, ui
from torch import Tensor

from .. import captions, score_table, scores
from ..data import check_images
from ..host.folders import score_folders
from ..host.progress import Progress
from ..host.scoring import scoring_models
from ..score_models import MissingModel, Models
from ..score_table import ALL
from ..scores import ALIGNMENT, FIDELITY, METRICS
from ..subject import Subject
from ..watch import SUBJECT
from .grid import first, labels_of
from .sockets import CATEGORY, SubjectSocket, expect

PAPER = "CLIP-I, DINO-I, CLIP-T, BLIP-T"  # Source: paper Sec. 5.1
PLAIN = "w_s 0 (plain)"  # as SuDe Sweep labels it
POINTS = 1.0  # of fidelity
RULE = {"alignment": "BLIP-T", "fidelity": "DINO-I", "fidelity_within": POINTS, "plain_label": PLAIN}
FORMAT = 1  # of the JSON


class SuDeScore(io.ComfyNode):
    """IMAGE lists, the example, prompts and labels -> a table and the best label."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and help of the node."""
        return io.Schema(
            node_id="SuDeScore",
            display_name="SuDe Score",
            category=CATEGORY,
            description="Scores pictures by the paper's metrics: do they show your subject, and do they show what the "
            "prompt says. Behind SuDe Sweep it also names the best w_s by a rule you set.",
            search_aliases=["metrics", "CLIP-I", "CLIP-T", "DINO", "BLIP", "evaluate", "fidelity"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="What was drawn: a batch, or a list as it comes from a sampler after SuDe Sweep.",
                ),
                io.Image.Input(
                    "example",
                    tooltip="Real pictures of the subject to compare with: the one it was trained on, or better others "
                    "of it as a batch.",
                ),
                SubjectSocket.Input(
                    "subject",
                    tooltip="From SuDe Fine-Tune, SuDe Sweep or SuDe Load Subject. Says which word of the prompts the "
                    "scoring models cannot know.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="What each picture was to show: one for all, or one a line for each entry of the list or "
                    "each picture. Or connect the prompt output of SuDe Sweep.",
                ),
                io.String.Input(
                    "labels",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Pictures of one label are one row of the table. One a line for each entry or picture, or "
                    "connect the label output of SuDe Sweep. Empty: one row.",
                ),
                io.String.Input(
                    "metrics",
                    default=PAPER,
                    optional=True,
                    tooltip=f"Separated by commas, of {', '.join(METRICS)}. Each needs its model in "
                    "models/sude_scores; the help page says which.",
                ),
                io.Combo.Input(
                    "alignment",
                    options=list(ALIGNMENT),
                    default=RULE["alignment"],
                    optional=True,
                    tooltip="The best label has the highest of this: how well pictures show what the prompt says.",
                ),
                io.Combo.Input(
                    "fidelity",
                    options=list(FIDELITY),
                    default=RULE["fidelity"],
                    optional=True,
                    tooltip="The best label may not lose this: how well pictures show your subject.",
                ),
                io.Float.Input(
                    "fidelity_within",
                    default=POINTS,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="Points of fidelity, in percent, that the best label may lose against plain_label.",
                ),
                io.String.Input(
                    "plain_label",
                    default=PLAIN,
                    optional=True,
                    tooltip="The label of the baseline without SuDe, which a multiplier of 0 gives in SuDe Sweep. "
                    "Empty: the label of the highest fidelity takes its part.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="The means of each label and the rule, as text."),
                io.Image.Output(display_name="picture", tooltip="The same as a picture, for Save Image."),
                io.String.Output(display_name="json", tooltip="Everything, each picture's own scores too, as JSON."),
                io.String.Output(display_name="best", tooltip="The best label, such as w_s 0.4."),
                io.Int.Output(
                    display_name="best_index",
                    tooltip="Place of the best label's first entry in the lists, counted from 0: picks its MODEL from "
                    "those of SuDe Sweep.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images, example, subject, prompts=(), labels=(), metrics=(), **choosing) -> io.NodeOutput:
        """Score and choose. Every input comes as a list. Raises ValueError before any model is loaded."""
        pictures, counts = read_pictures("images", images)
        real, _ = read_pictures("example", example)
        wanted = read_metrics(first(metrics, PAPER))
        written = for_each("prompts", labels_of("prompts", prompts), counts)
        texts = read_texts(written, subject, any(metric in ALIGNMENT for metric in wanted)) or [""] * len(pictures)
        named = for_each("labels", labels_of("labels", labels), counts) or [ALL] * len(pictures)
        rule = {name: first(choosing.get(name), default) for name, default in RULE.items()}
        check_rule(rule, list(dict.fromkeys(named)), wanted)
        try:
            Models(score_folders()).check(wanted)
        except MissingModel as error:
            raise ValueError(str(error)) from error  # ComfyUI shows the error's class, module and all

        with Progress(cls.hidden.unique_id) as report:
            with scoring_models(report) as models:
                found = scores.evaluate(pictures, real, texts, models, wanted)
            table = score_table.rows(named, found)
            choice = score_table.choose(table, **rule)
            report.end(choice.rule(table) if choice else f"{len(pictures)} pictures scored")
        best = choice.best if choice else table[0].label
        index = entry_of(named.index(best), counts)
        document = {
            "format": FORMAT,
            **score_table.values(table, choice),
            "best_index": index,
            "models": {metric: scores.USED_BY[metric] for metric in wanted},
            "references": len(real),
            "scored": [
                {"label": label, "text": text, **{metric: found[metric][place] for metric in wanted}}
                for place, (label, text) in enumerate(zip(named, texts, strict=True))
            ],
        }
        picture = score_table.draw(table, choice)
        said = json.dumps(document, ensure_ascii=False, indent=1)
        shown = ui.PreviewImage(picture, cls=cls)
        return io.NodeOutput(score_table.text(table, choice), picture, said, best, index, ui=shown)


def read_pictures(name: str, batches) -> tuple[list[Tensor], list[int]]:
    """The pictures [H, W, 3] of all batches and how many each batch has. Raises ValueError if there are none."""
    checked = [check_images(batch, name) for batch in batches if batch is not None]
    if not checked:
        raise ValueError(f"{name} is empty: connect at least one picture.")
    return [picture for batch in checked for picture in batch], [len(batch) for batch in checked]


def read_metrics(text: str) -> list[str]:
    """The metrics in a text, each once, in their order. Raises ValueError for one that is not known, or none."""
    known = {metric.lower(): metric for metric in METRICS}
    parts = [part.strip() for part in str(text).replace(";", ",").split(",") if part.strip()]
    for part in parts:
        if part.lower() not in known:
            raise ValueError(
                f"metrics holds {part[:40]!r}, but each must be one of {', '.join(METRICS)}: for example {PAPER}."
            )
    if not parts:
        raise ValueError(f"metrics is empty: name at least one, for example {PAPER}.")
    return list(dict.fromkeys(known[part.lower()] for part in parts))


def for_each(name: str, given: list[str], counts: list[int]) -> list[str]:
    """One text for each picture, from one for all, for each batch or for each picture; none from none.

    Args:
        name: of the input, for the message.
        given: what came in.
        counts: pictures in each batch.
    """
    total = sum(counts)
    if not given or len(given) == total:
        return given
    if len(given) == 1:
        return given * total
    if len(given) != len(counts):
        entries = f"{len(counts)} entries with {total} pictures" if len(counts) > 1 else f"{total} pictures"
        raise ValueError(
            f"{name} has {len(given)} lines, but images has {entries}: give one line for all, or one for each."
        )
    return [text for text, count in zip(given, counts, strict=True) for _ in range(count)]


def read_texts(prompts: list[str], subjects, needed: bool) -> list[str]:
    """What the scoring models read of each prompt: the category for the subject, no identifier.

    Raises ValueError if subjects of different names are mixed, or if a text is needed and there is none.
    """
    for one in subjects:
        expect(one, Subject, "subject", "SuDe Fine-Tune, SuDe Sweep or SuDe Load Subject")
    names = {tuple(one.metadata[name] for name in ("identifier", "category", "subject")) for one in subjects}
    if len(names) != 1:
        said = ", ".join(sorted(name for *_, name in names)) or "none"
        raise ValueError(f"subject must be one subject, but there are: {said}. Score each with its own SuDe Score.")
    ((identifier, category, name),) = names
    texts = [scores.strip_identifier(prompt.replace(SUBJECT, name), identifier, category) for prompt in prompts]
    if needed and not (texts and all(texts)):
        raise ValueError(
            "prompts is empty, or one of them is: type what the pictures were to show, or connect the prompt output of "
            f"SuDe Sweep. {' and '.join(FIDELITY)} alone need no prompts."
        )
    return texts


def check_rule(rule: dict, labels: list[str], metrics: list[str]) -> None:
    """Empty a `plain_label` that nobody chose and no label has. Raises ValueError if the best could not be told."""
    for name, known in (("alignment", ALIGNMENT), ("fidelity", FIDELITY)):
        if rule[name] not in known:
            raise ValueError(f"{name} is {rule[name]!r}, but it must be one of: {', '.join(known)}.")
        if len(labels) > 1 and rule[name] not in metrics:
            raise ValueError(f"{name} is {rule[name]}, which metrics does not name: add it there, or choose another.")
    if not 0 <= rule["fidelity_within"] <= 100:
        raise ValueError(f"fidelity_within is {rule['fidelity_within']}, but it must be a number from 0 to 100.")
    plain = captions.normalize(rule["plain_label"])
    if plain == PLAIN and plain not in labels:  # the default, behind a sweep without a multiplier of 0
        plain = ""
    rule["plain_label"] = plain
    if len(labels) > 1 and plain and plain not in labels:
        raise ValueError(
            f"plain_label is {plain!r}, but labels has {', '.join(labels)}: add 0 to the multipliers of SuDe Sweep, "
            "type one of these labels, or leave plain_label empty."
        )


def entry_of(place: int, counts: list[int]) -> int:
    """The batch that the picture at a place is in."""
    for index, count in enumerate(counts):
        if place < count:
            return index
        place -= count
    raise IndexError(place)
