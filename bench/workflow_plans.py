"""What the shipped workflows are made of; bench/workflows.py builds them in the real frontend."""

from dataclasses import dataclass, field
from pathlib import Path

NEGATIVE = "monochrome, lowres, bad anatomy, worst quality, low quality"  # released code, stable_txt2img.py:253
NOTES = Path(__file__).parent / "workflow_notes"
MINI_OPTIONS = {  # the mini world learns fast and draws in a moment
    "batch_size": 1,
    "gradient_checkpointing": False,
    "prior": "class images",
    "prior.number": 16,
    "prior.steps": 20,
    "prior.cfg": 4,
    "prior.negative_prompt": "",
}
MINI_TRAINING = {"baseline": "DreamBooth", "baseline.w_s": 0.4, "baseline.steps": 200, "baseline.learning_rate": 3e-5}
MINI_SAMPLING = {"seed": 7, "control_after_generate": "fixed", "steps": 20, "cfg": 4}
MINI_SAMPLING |= {"sampler_name": "euler", "scheduler": "normal"}
PAPER_SAMPLING = {"seed": 7, "control_after_generate": "fixed", "steps": 50, "cfg": 10}
PAPER_SAMPLING |= {"sampler_name": "ddim", "scheduler": "ddim_uniform"}
TRAINER = (420, 1010)  # of SuDe Fine-Tune and SuDe Sweep: room for the panel and the chart
OPTIONS = (400, 1030)  # of SuDe Training Options in Nodes 2.0, whose widgets are taller


@dataclass
class Block:
    """A group box: columns of nodes side by side, below other blocks.

    Attributes:
        title: of the group; nothing is drawn around nodes of a block without one.
        x: of its left side.
        under: the blocks above it.
        columns: lists of node identifiers.
    """

    title: str
    x: int
    under: list["Block"] = field(default_factory=list)
    columns: list[list[int]] = field(default_factory=list)


@dataclass
class Plan:
    """One workflow.

    Attributes:
        name: of its files.
        id: of the workflow, so that a page tells it from others.
        blocks: where everything stands.
        nodes: {identifier: {type, title, size, widgets, inputs: {name: (node, slot)}}}, in the order of creation.
    """

    name: str
    id: str
    blocks: list[Block] = field(default_factory=list)
    nodes: dict[int, dict] = field(default_factory=dict)

    def block(self, title: str, x: int, *under: Block) -> Block:
        """Add a group box."""
        self.blocks.append(Block(title, x, list(under)))
        return self.blocks[-1]

    def add(
        self, block: Block, column: int, number: int, kind: str, title: str = "", size=None, widgets=None, **inputs
    ) -> int:
        """Add a node at the bottom of a block's column; returns its identifier."""
        while len(block.columns) <= column:
            block.columns.append([])
        block.columns[column].append(number)
        self.nodes[number] = {
            "type": kind, "title": title, "size": size, "widgets": widgets or {}, "inputs": inputs,
        }  # fmt: skip
        return number

    def note(self, x: int, width: int, height: int, number: int, *under: Block) -> None:
        """Add the workflow's read-me, bench/workflow_notes/NAME.md."""
        text = (NOTES / f"{self.name}.md").read_text(encoding="utf-8").strip()
        self.add(self.block("", x, *under), 0, number, "MarkdownNote", "Read me", (width, height), {"text": text})


def subject(plan: Plan, checkpoint: str, picture: str, category: str) -> Block:
    """Checkpoint 1, picture 2 and category 3."""
    block = plan.block("1 · Your subject", 0)
    plan.add(block, 0, 1, "CheckpointLoaderSimple", size=(380, 110), widgets={"ckpt_name": checkpoint})
    plan.add(block, 0, 2, "LoadImage", "The one picture", (380, 380), {"image": picture})
    plan.add(block, 0, 3, "PrimitiveString", "Category: what it shows", (380, 80), {"value": category})
    return block


def train(
    plan: Plan, block: Block, column: int, number: int, options: int, widgets: dict, title: str = "", kind=""
) -> int:
    """SuDe Fine-Tune (or another trainer) on what `subject` made."""
    return plan.add(
        block, column, number, kind or "SuDeFineTune", title, TRAINER, {"training_seed": 0, **widgets},
        model=(1, 0), clip=(1, 1), vae=(1, 2), image=(2, 0), category=(3, 0), options=(options, 0),
    )  # fmt: skip


def draw(
    plan: Plan, block: Block, column: int, first: int, model, clip, latent: int, sampling: dict, *, prompt=None,
    text: str = "", negative: str = "", label: str = "", vae: int = 1,
) -> int:  # fmt: skip
    """Prompt, negative prompt, KSampler and VAE Decode as nodes `first` to `first` + 3; returns the last one's number.

    `model`, `clip` and `prompt` are (node, slot), `latent` a node; `text` stands where there is no prompt.
    """
    given = {"text": prompt} if prompt else {}
    of = f", {label}" if label else ""
    plan.add(
        block, column, first, "CLIPTextEncode", f"Prompt{of}", (320, 100), {} if prompt else {"text": text}, clip=clip,
        **given,
    )  # fmt: skip
    plan.add(
        block, column, first + 1, "CLIPTextEncode", f"Negative prompt{of}", (320, 100), {"text": negative}, clip=clip
    )
    plan.add(
        block, column + 1, first + 2, "KSampler", f"KSampler{of}" if label else "", (320, 340), sampling, model=model,
        positive=(first, 0), negative=(first + 1, 0), latent_image=(latent, 0),
    )  # fmt: skip
    title = f"VAE Decode{of}" if label else ""
    decode = {"samples": (first + 2, 0), "vae": (vae, 2)}
    return plan.add(block, column + 1, first + 3, "VAEDecode", title, (320, 60), **decode)


def empty(plan: Plan, block: Block, column: int, number: int, side: int, count: int) -> int:
    """The empty latent."""
    return plan.add(
        block, column, number, "EmptyLatentImage", "Size and number of pictures", (320, 130),
        {"width": side, "height": side, "batch_size": count},
    )  # fmt: skip


def show(
    plan: Plan,
    block: Block,
    column: int,
    number: int,
    widgets: dict,
    prefix: str,
    size=(620, 620),
    saved=None,
    **images,
) -> None:
    """SuDe Grid, and Save Image for the grid or the pictures of the node `saved`."""
    plan.add(block, column, number, "SuDeGrid", "All pictures", size, widgets, **images)
    plan.add(
        block, column, number + 1, "SaveImage", "Result", (size[0], 330), {"filename_prefix": f"sude/{prefix}"},
        images=(saved or number, 0),
    )  # fmt: skip


def quickstart() -> Plan:
    """Before and after."""
    plan = Plan("quickstart", "337b2852-d379-4deb-8215-52ab93c6529b")
    first = subject(plan, "miniworld.safetensors", "spike.png", "dog")
    second = plan.block("2 · How to train", 440)
    plan.add(second, 0, 5, "SuDeTrainingOptions", size=OPTIONS, widgets=MINI_OPTIONS)
    third = plan.block("3 · Train", 880)
    train(plan, third, 0, 10, 5, MINI_TRAINING)
    fourth = plan.block("4 · Ask for pictures", 1360)
    plan.add(fourth, 0, 6, "SuDePrompt", size=(320, 130), widgets={"attribute": "running"}, subject=(10, 2))
    empty(plan, fourth, 0, 7, 64, 4)
    plan.add(
        fourth, 0, 8, "SuDeSaveSubject", "Keep the subject", (320, 160), {"filename_prefix": "spike"}, subject=(10, 2)
    )
    after = draw(plan, fourth, 1, 11, (10, 0), (10, 1), 7, MINI_SAMPLING, prompt=(6, 0), label="after")
    before = draw(plan, fourth, 1, 21, (1, 0), (1, 1), 7, MINI_SAMPLING, text="photo of a running dog", label="before")
    fifth = plan.block("5 · Before and after", 2560)
    labels = {"row_labels": "before: any dog\nafter: sks dog", "title": "photo of a running dog"}
    show(plan, fifth, 0, 30, labels, "quickstart", (640, 800), after, images=(before, 0), images_2=(after, 0))
    plan.note(0, 820, 300, 4, first, second)
    return plan


BASELINES = {  # the mini world's settings and the paper's w_s
    "DreamBooth": ({"steps": 140, "learning_rate": 3e-5}, 0.4),
    "Custom Diffusion": ({"steps": 200, "learning_rate": 2e-4, "augmentation": "off"}, 2.0),
    "ViCo": ({"steps": 200, "learning_rate": 1e-3, "token_learning_rate": 0.02}, 1.5),
}


def compare_baselines() -> Plan:
    """Three baselines, each with and without SuDe."""
    plan = Plan("compare_baselines", "6b1f6a1e-5c1d-4f0e-9a53-3a7d1c0b9e10")
    first = subject(plan, "miniworld.safetensors", "spike.png", "dog")
    plan.add(first, 0, 4, "PrimitiveString", "Attribute", (380, 80), {"value": "running"})
    plan.add(first, 0, 5, "PrimitiveString", "Context", (380, 80), {"value": ""})
    empty(plan, first, 0, 6, 64, 2)
    second = plan.block("2 · How to train", 440)
    plan.add(second, 0, 8, "SuDeTrainingOptions", "Training options: class images", OPTIONS, MINI_OPTIONS)
    plan.add(
        second,
        0,
        9,
        "SuDeTrainingOptions",
        "Training options: ViCo",
        widgets={"batch_size": 1, "gradient_checkpointing": False},
    )
    rows, above = {}, []
    for index, (name, (settings, w_s)) in enumerate(BASELINES.items()):
        block = plan.block(f"3 · {name}: without SuDe and with it", 880, *above)
        above = [block]
        base, options = 100 * (index + 1), 9 if name == "ViCo" else 8
        for place, (label, weight) in enumerate((("plain", 0), ("SuDe", w_s))):
            of, number = f"{name}, {label}", base + 10 * (place + 1)
            widgets = {"baseline": name, "baseline.w_s": weight, **{f"baseline.{k}": v for k, v in settings.items()}}
            train(plan, block, place, number, options, widgets, of)
            if place == 0:
                plan.add(
                    block, 2, base + 1, "SuDePrompt", f"SuDe Prompt, {name}", (320, 130), subject=(number, 2),
                    attribute=(4, 0), context=(5, 0),
                )  # fmt: skip
            decoded = draw(
                plan, block, 2, number + 1, (number, 0), (number, 1), 6, MINI_SAMPLING, prompt=(base + 1, 0), label=of
            )
            rows[f"{name} + SuDe" if place else name] = decoded
    last = plan.block("4 · All pictures", 2600)
    sockets = {"images" if i == 0 else f"images_{i + 1}": (node, 0) for i, node in enumerate(rows.values())}
    show(plan, last, 0, 400, {"row_labels": "\n".join(rows)}, "compare_baselines", (640, 1500), **sockets)
    plan.note(0, 820, 470, 7, first, second)
    return plan
