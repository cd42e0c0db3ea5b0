"""The subgraph blueprint: offered to every page, put on the canvas, run; its panel is found inside the subgraph."""

from pathlib import Path

from playwright.sync_api import Page, expect

from bench.comfy_client import ComfyClient

from .conftest import wait_for_new_run

REPO = Path(__file__).resolve().parents[2]
NAME = "Subject from one photo"

# Checkpoint and picture -> the blueprint -> KSampler; few steps, a LoRA, set inside the subgraph.
BUILD = """([checkpoint, image]) => {
    const graph = app.graph;
    const make = (type, values = {}) => {
        const node = LiteGraph.createNode(type);
        graph.add(node);
        for (const [name, value] of Object.entries(values)) {
            const widget = node.widgets.find((one) => one.name === name);
            widget.value = value;
            widget.callback?.(value, app.canvas, node);
        }
        return node;
    };
    const connect = (source, slot, target, input) => source.connect(slot, target, target.findInputSlot(input));
    const loader = make("CheckpointLoaderSimple", { ckpt_name: checkpoint }), picture = make("LoadImage", { image });
    const subject = graph.nodes.find((one) => one.subgraph);
    for (const [name, value] of [["category", "cat"], ["attribute", "flying"]])
        subject.widgets.find((one) => one.name === name).value = value;
    const options = make("SuDeTrainingOptions", { resolution: 64, prior: "off", preview_every: 0 });
    const latent = make("EmptyLatentImage", { width: 64, height: 64 }), sampler = make("KSampler", { steps: 1 });
    const decode = make("VAEDecode"), show = make("PreviewImage");
    for (const [slot, input] of ["model", "clip", "vae"].entries()) connect(loader, slot, subject, input);
    connect(picture, 0, subject, "image");
    connect(options, 0, subject, "options");
    connect(subject, 0, sampler, "model");
    connect(subject, 3, sampler, "positive");
    connect(subject, 4, sampler, "negative");
    connect(latent, 0, sampler, "latent_image");
    connect(sampler, 0, decode, "samples");
    connect(loader, 2, decode, "vae");
    connect(decode, 0, show, "images");
    const trainer = subject.subgraph.nodes.find((one) => one.type === "SuDeFineTune");
    const set = (name, value) => {
        const widget = trainer.widgets.find((one) => one.name === name);
        widget.value = value;
        widget.callback?.(value, app.canvas, trainer);
    };
    set("baseline", "DreamBooth LoRA");
    set("baseline.steps", 2);
    set("baseline.train_text_encoder", false);
    set("training_seed", 13);
    window.subject = subject;
    return subject.outputs.map((one) => one.name);
}"""


def test_the_blueprint_is_offered_and_runs(page: Page, client: ComfyClient, checkpoint):
    assert NAME in [entry["name"] for entry in client.get("/global_subgraphs").values()]
    expect(page.get_by_role("alert")).to_have_count(0)
    page.evaluate("app.graph.clear()")
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.keyboard.type(NAME)
    page.wait_for_timeout(1500)
    page.keyboard.press("Enter")
    page.wait_for_timeout(500)
    page.mouse.click(700, 450)
    page.wait_for_function("app.graph.nodes.some(one => one.subgraph)")
    picture = client.upload_image("blueprint.png", (REPO / "workflows" / "spike.png").read_bytes())
    page.evaluate("app.refreshComboInNodes()")
    made = page.evaluate(BUILD, [checkpoint(), picture])
    assert made == ["MODEL", "CLIP", "SUBJECT", "positive", "negative"]
    queued = page.evaluate("(async () => (await app.graphToPrompt()).output)()")
    (trainer,) = (name for name, node in queued.items() if node["class_type"] == "SuDeFineTune")
    assert queued[trainer]["inputs"]["category"] == "cat" and ":" in trainer

    before = set(client.get("/history"))
    page.evaluate("app.queuePrompt(0)")
    expect(page.get_by_role("alert")).to_have_count(0)
    run = wait_for_new_run(client, before, 120)
    assert run["status"]["status_str"] == "success", run["status"]
    page.evaluate("app.canvas.openSubgraph(subject.subgraph)")
    panel = page.locator(".sude-panel:visible")
    expect(panel).to_contain_text("2 steps")
    assert not page.errors
