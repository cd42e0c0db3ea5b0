"""SuDe Fine-Tune: MODEL, CLIP, VAE, a picture and its category in; patched MODEL and CLIP and the SUBJECT out."""

from dataclasses import dataclass

from comfy_api.latest import io, ui
from torch import Tensor

from .. import chart
from ..baselines import REGISTRY
from ..finetune import fine_tune
from ..host import folders
from ..host.apply import apply_subject
from ..host.progress import Progress
from ..recipe import Options, Recipe
from ..subject import Subject
from .sockets import CATEGORY, OptionsSocket, SubjectSocket, expect, widgets


def training_inputs() -> list:
    """What a training takes, in the order of the sockets of SuDe Fine-Tune (and SuDe Sweep)."""
    methods = [io.DynamicCombo.Option(name, widgets(baseline.settings)) for name, baseline in REGISTRY.items()]
    return [
        io.Model.Input("model", tooltip="SD1.x or SD2.x model. It is only read, never changed."),
        io.Clip.Input("clip", tooltip="The same checkpoint's CLIP. It is only read, never changed."),
        io.Vae.Input("vae", tooltip="The same checkpoint's VAE."),
        io.Image.Input("image", tooltip="A picture of your subject. One is enough; several are drawn from at random."),
        io.String.Input(
            "category",
            default="dog",
            tooltip="What the picture shows, in one or two words: dog, teapot, stuffed animal. Its attributes "
            "are what the subject inherits.",
        ),
        io.DynamicCombo.Input(
            "baseline",
            options=methods,
            tooltip="The fine-tuning method SuDe is added to, with its published presets. "
            + " ".join(f"{name}: {baseline.help}" for name, baseline in REGISTRY.items()),
        ),
        io.Int.Input(
            "training_seed",
            default=0,
            min=0,
            max=2**64 - 1,
            tooltip="Seed of every random number of the training. Same inputs and seed give the same result.",
        ),
        io.Image.Input(
            "class_images",
            optional=True,
            tooltip="Your own pictures of other members of the category, instead of drawing them with the model.",
        ),
        OptionsSocket.Input("options", optional=True, tooltip="From SuDe Training Options; the presets without it."),
        io.Boolean.Input(
            "retrain",
            optional=True,
            default=False,
            tooltip="A training that was done before with the very same inputs is found again on disk, and an "
            "interrupted one goes on where it was. On trains from the start all the same.",
        ),
    ]


class SuDeFineTune(io.ComfyNode):
    """The trainer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and help of the node."""
        return io.Schema(
            node_id="SuDeFineTune",
            display_name="SuDe Fine-Tune",
            category=CATEGORY,
            description="Learns your subject from one picture and lets it inherit what its category can do (SuDe, "
            "CVPR 2024). Sample the outputs with prompts such as 'photo of a running sks dog'.",
            search_aliases=["dreambooth", "train", "subject", "one-shot", "lora training", "personalize"],
            inputs=training_inputs(),
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the subject in it, for any sampler."),
                io.Clip.Output(
                    display_name="CLIP", tooltip="The text encoder with the subject in it, for your prompts."
                ),
                SubjectSocket.Output(
                    display_name="SUBJECT", tooltip="What was learned, for SuDe Prompt and SuDe Save Subject."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        """Train, then patch clones of MODEL and CLIP. Raises ValueError on what cannot be trained."""
        training = Training(**inputs)
        recipe = training.recipe()
        with Progress(cls.hidden.unique_id, title(recipe), workflow_id(cls.hidden.extra_pnginfo)) as report:
            outputs, picture = training.run(recipe, report)
        return io.NodeOutput(*outputs, ui=ui.PreviewImage(picture, cls=cls))


@dataclass(frozen=True)
class Training:
    """What a node that trains was given, by the names of `training_inputs`."""

    model: object
    clip: object
    vae: object
    image: Tensor
    category: str
    baseline: dict | None = None
    training_seed: int = 0
    class_images: Tensor | None = None
    options: Options | None = None
    retrain: bool = False

    def recipe(self) -> Recipe:
        """The checked Recipe; ValueError for what no training can use."""
        return read_recipe(self.category, self.baseline, self.training_seed, self.options, self.class_images)

    def run(self, recipe: Recipe, report: Progress) -> tuple[tuple, Tensor]:
        """Train: patched MODEL and CLIP and the Subject, and the chart as an IMAGE."""
        entries = folders.store(recipe.options.keeping.store_limit)
        models = self.model, self.clip, self.vae
        subject = fine_tune(*models, self.image, recipe, report, entries, self.class_images, self.retrain)
        patched = apply_subject(self.model, self.clip, subject)
        report.end(story(subject))
        return (*patched, subject), chart.draw(subject.log, f"{title(recipe)}, {subject.log.steps} steps")


def title(recipe: Recipe) -> str:
    """What is trained, in a few words."""
    return f"{recipe.method} of {recipe.category!r}, w_s {recipe.baseline.w_s:g}"


def story(subject: Subject) -> str:
    """How it went, in a few words."""
    remark = subject.metadata.get("remark")
    return subject.story + (f" · {remark}" if remark else "")


def workflow_id(extra_pnginfo) -> str | None:
    """The identifier of the page's workflow, from what a page sends along with a prompt."""
    workflow = extra_pnginfo.get("workflow") if isinstance(extra_pnginfo, dict) else None
    name = workflow.get("id") if isinstance(workflow, dict) else None
    return name if isinstance(name, str) else None


def read_recipe(category: str, baseline: dict | None, seed: int, options: Options | None, class_images=None) -> Recipe:
    """The checked Recipe of the node's inputs; ValueError for what no training can use."""
    options = Options() if options is None else options
    expect(options, Options, "options", "SuDe Training Options, or nothing")
    values = dict(baseline or {})
    method = values.pop("baseline", None)
    if method not in REGISTRY:
        given = f"{method!r} is not a baseline" if method else "no known baseline is chosen"
        raise ValueError(f"baseline: {given}. Choose one of: {', '.join(REGISTRY)}.")
    try:
        settings = REGISTRY[method].settings(**values)
    except TypeError as error:
        raise ValueError(f"baseline {method!r} was given inputs it does not have: {error}.") from error
    recipe = Recipe(category, method, settings, options, seed).checked()
    if class_images is not None and recipe.options.prior.kind != "class images":
        raise ValueError(
            f"class_images are connected, but the prior is {recipe.options.prior.kind!r} and would not use them: "
            "disconnect them or set the prior to 'class images' in SuDe Training Options (ViCo has none)."
        )
    return recipe
