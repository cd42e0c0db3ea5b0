"""The shipped workflows beside the quick start and the comparison; see bench/workflow_plans.py."""

from bench.workflow_plans import (
    MINI_OPTIONS,
    MINI_SAMPLING,
    MINI_TRAINING,
    NEGATIVE,
    OPTIONS,
    PAPER_SAMPLING,
    Plan,
    compare_baselines,
    draw,
    empty,
    quickstart,
    show,
    subject,
    train,
)

PAPER_OPTIONS = {"prior": "class images", "preview_prompts": "photo of a [subject]\nphoto of a running [subject]"}


def sweep(plan: Plan, sweep_widgets: dict, grid_widgets: dict, linked: bool, size, count: int) -> Plan:
    """One SuDe Sweep, one sampler, one grid; the grid's labels come from the sweep where `linked`."""
    first = subject(plan, "miniworld.safetensors", "spike.png", "dog")
    second = plan.block("2 · How to train", 440)
    plan.add(second, 0, 5, "SuDeTrainingOptions", size=OPTIONS, widgets=MINI_OPTIONS)
    third = plan.block("3 · Train", 880)
    train(plan, third, 0, 10, 5, {**MINI_TRAINING, **sweep_widgets}, kind="SuDeSweep")
    plan.nodes[10]["size"] = (420, 1210)
    fourth = plan.block("4 · Every model draws every prompt", 1360)
    empty(plan, fourth, 0, 7, 64, count)
    draw(plan, fourth, 0, 11, (10, 0), (10, 1), 7, MINI_SAMPLING, prompt=(10, 4))
    fifth = plan.block("5 · All pictures", 2120)
    links = {"row_labels": (10, 3), "column_labels": (10, 4)} if linked else {}
    show(plan, fifth, 0, 30, grid_widgets, plan.name, size, images=(14, 0), **links)
    plan.note(0, 820, 320, 4, first, second)
    return plan


def sweep_ws() -> Plan:
    """The paper's flexible w_s."""
    return sweep(
        Plan("sweep_ws", "2f0c2c44-6a1e-4f7d-8f53-7d2f6c0b1a21"),
        {
            "multipliers": "0, 0.5, 1, 2",
            "prompts": "photo of a running [subject]\nphoto of a burning [subject]\nphoto of a [subject] in the snow",
        },
        {"title": "how strongly to inherit"},
        True, (760, 1150), 1,
    )  # fmt: skip


def attribute_and_context() -> Plan:
    """Attributes by contexts (paper Fig. 6)."""
    attributes, contexts = ("running", "flying", "burning"), ("", "in the snow", "wearing a hat")
    prompts = "\n".join(f"photo of a {a} [subject] {c}".strip() for a in attributes for c in contexts)
    return sweep(
        Plan("attribute_and_context", "c5f1b7d2-0b52-4a52-9f0a-5a3b8f2d7e33"),
        {"multipliers": "1", "prompts": prompts},
        {"row_labels": "\n".join(attributes), "column_labels": "\n".join(c or "(no context)" for c in contexts)},
        False, (700, 1200), 1,
    )  # fmt: skip


def truncation_ablation() -> Plan:
    """With and without the loss truncation (paper Fig. 5)."""
    plan = Plan("truncation_ablation", "8d4a1f60-93c7-4b1e-b7d5-1c9e5a6f0b44")
    first = subject(plan, "miniworld.safetensors", "spike.png", "dog")
    plan.add(first, 0, 6, "PrimitiveString", "Prompt", (380, 80), {"value": "photo of a running sks dog"})
    empty(plan, first, 0, 7, 64, 4)
    second = plan.block("2 · How to train", 440)
    rows, images = {"truncation on": True, "truncation off": False}, {}
    above = []
    for index, (label, value) in enumerate(rows.items()):
        plan.add(second, 0, 5 + 4 * index, "SuDeTrainingOptions", label, OPTIONS, {**MINI_OPTIONS, "truncation": value})
        block = plan.block(f"3 · SuDe with {label}", 880, *above)
        above = [block]
        number = 10 + 10 * index
        train(plan, block, 0, number, 5 + 4 * index, {**MINI_TRAINING, "baseline.w_s": 2}, f"SuDe Fine-Tune, {label}")
        decoded = draw(
            plan, block, 1, number + 1, (number, 0), (number, 1), 7, MINI_SAMPLING, prompt=(6, 0), label=label
        )
        images["images" if not images else f"images_{len(images) + 1}"] = (decoded, 0)
    last = plan.block("4 · All pictures", 2120)
    labels = {"row_labels": "\n".join(rows), "title": "w_s 2, the same seed"}
    show(plan, last, 0, 30, labels, "truncation_ablation", (640, 800), **images)
    plan.note(0, 820, 300, 4, first, second)
    return plan


def stable_diffusion(name: str, identifier: str, options: dict, training: dict, prefix: str) -> Plan:
    """For a real checkpoint."""
    plan = Plan(name, identifier)
    first = subject(plan, "v1-5-pruned-emaonly-fp16.safetensors", "example.png", "girl")
    second = plan.block("2 · How to train", 440)
    plan.add(second, 0, 5, "SuDeTrainingOptions", size=OPTIONS, widgets={**PAPER_OPTIONS, **options})
    third = plan.block("3 · Train", 880)
    train(plan, third, 0, 10, 5, training)
    fourth = plan.block("4 · Ask for pictures", 1360)
    plan.add(
        fourth, 0, 6, "SuDePrompt", size=(320, 130), widgets={"attribute": "running", "context": "on the beach"},
        subject=(10, 2),
    )  # fmt: skip
    empty(plan, fourth, 0, 7, 512, 2)
    plan.add(
        fourth, 0, 8, "SuDeSaveSubject", "Keep the subject", (320, 160), {"filename_prefix": prefix}, subject=(10, 2)
    )
    after = draw(
        plan, fourth, 1, 11, (10, 0), (10, 1), 7, PAPER_SAMPLING, prompt=(6, 0), negative=NEGATIVE, label="after"
    )
    before = draw(
        plan, fourth, 1, 21, (1, 0), (1, 1), 7, PAPER_SAMPLING, text="photo of a running girl on the beach",
        negative=NEGATIVE, label="before",
    )  # fmt: skip
    fifth = plan.block("5 · Before and after", 2560)
    labels = {"row_labels": "before\nafter", "cell": 384}
    show(plan, fifth, 0, 30, labels, prefix, (640, 940), after, images=(before, 0), images_2=(after, 0))
    plan.note(0, 820, 320, 4, first, second)
    return plan


def sd15_full() -> Plan:
    """The paper's settings."""
    identifier = "17d91008-25f2-4861-aba0-6949732d0e18"
    return stable_diffusion("sd15_full", identifier, {}, {"baseline": "DreamBooth"}, "dreambooth")


def sd15_lowvram() -> Plan:
    """For 8 to 12 GB."""
    identifier = "0cdf1a6b-843c-4991-8106-b631b2adf824"
    training = {"baseline": "DreamBooth LoRA"}
    return stable_diffusion("sd15_lowvram", identifier, {"precision": "bf16"}, training, "lora")


def reuse_subject() -> Plan:
    """A saved subject, drawn without training."""
    plan = Plan("reuse_subject", "5ade0000-0000-4000-8000-000000000005")
    first = plan.block("1 · Checkpoint and subject", 0)
    plan.add(first, 0, 1, "CheckpointLoaderSimple", size=(380, 110), widgets={"ckpt_name": "miniworld.safetensors"})
    saved = {"subject_file": "spike_00001_.safetensors"}
    plan.add(first, 0, 2, "SuDeLoadSubject", "The subject, trained before", (380, 300), saved)
    second = plan.block("2 · Put it in, say what it does", 440)
    plan.add(second, 0, 4, "SuDeApplySubject", size=(320, 150), model=(1, 0), clip=(1, 1), subject=(2, 0))
    plan.add(second, 0, 5, "SuDePrompt", size=(320, 130), widgets={"attribute": "running"}, subject=(2, 0))
    empty(plan, second, 0, 12, 64, 4)
    third = plan.block("3 · Draw", 820)
    draw(plan, third, 0, 6, (4, 0), (4, 1), 12, MINI_SAMPLING, prompt=(5, 0))
    plan.add(third, 2, 11, "SaveImage", "Result", (460, 460), {"filename_prefix": "sude/reuse"}, images=(9, 0))
    plan.note(0, 760, 280, 3, first, second)
    return plan


def plans() -> list[Plan]:
    """All of them."""
    return [
        quickstart(),
        compare_baselines(),
        sweep_ws(),
        reuse_subject(),
        truncation_ablation(),
        attribute_and_context(),
        sd15_full(),
        sd15_lowvram(),
    ]
