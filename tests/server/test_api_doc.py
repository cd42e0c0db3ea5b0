"""docs/api.md: every snippet on it is run against a real server, as it stands there.

The reader's folder is a temporary one with a picture and a small copy of the quick start: the same nodes, links and
titles, but a small checkpoint, few steps and the light baseline. In the snippets only the address is replaced.
"""

import contextlib
import importlib.util
import io
import json
import re
import shutil
import time
from pathlib import Path
from types import ModuleType

import pytest
from comfy_cli.workflow_to_api import convert_ui_to_api
from PIL import Image

from bench.comfy_client import ComfyClient
from bench.comfy_server import ComfyServer

from .snippets import LONG, REPO, TRAINER, Reader, Snippet, snippets

PAGE = (REPO / "docs" / "api.md").read_text(encoding="utf-8")
RUN = {("curl", "sh"), ("Python", "python"), ("comfy run", "sh"), ("What the pictures carry", "python")}
needs_bash = pytest.mark.skipif(
    not shutil.which("bash"), reason="bash is not installed; the snippets are written for it"
)
needs_curl = pytest.mark.skipif(
    not (shutil.which("bash") and shutil.which("curl")), reason="bash or curl is not installed"
)


def within(*sections: str) -> list[Snippet]:
    """The snippets of these sections; the tests run all of them, also those that are added later."""
    return [snippet for snippet in snippets(PAGE) if snippet.section in sections]


def inputs(workflow: dict) -> dict:
    """What is run: the inputs of every node."""
    return {key: node["inputs"] for key, node in workflow.items()}


def same(drawn: dict, workflow: dict, infos: dict) -> None:
    """A UI workflow says what an API workflow says."""
    assert inputs(convert_ui_to_api(drawn, infos)) == inputs(workflow)


def carried(picture: Path | bytes) -> dict[str, dict]:
    """The text chunks of a PNG, read with Pillow."""
    image = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
    return {name: json.loads(text) for name, text in image.text.items()}


@pytest.fixture
def reader(tmp_path: Path, server: ComfyServer, client: ComfyClient, checkpoint, request) -> Reader:
    """Takes the parameters (steps, seed)."""
    return Reader(tmp_path, server, client, checkpoint("abs"), *request.param)


# --- The page --------------------------------------------------------------------------------------------------------


def test_every_snippet_of_the_page_is_one_that_a_test_runs():
    found = list(snippets(PAGE))
    assert {(snippet.section, snippet.language) for snippet in found} == RUN
    assert PAGE.count("```") == 2 * len(found) and "~~~" not in PAGE
    assert not re.search(r"\n\n {4}", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)), "a block without a fence"


def test_a_snippet_that_no_test_runs_is_noticed():
    page = "## curl\n\n```sh\na\n```\n\n## New\n\n```js\nb\n```\n"
    assert list(snippets(page)) == [Snippet("curl", "sh", "a\n"), Snippet("New", "js", "b\n")]
    assert {(snippet.section, snippet.language) for snippet in snippets(page)} - RUN == {("New", "js")}


# --- Its snippets ----------------------------------------------------------------------------------------------------


@needs_curl
@pytest.mark.parametrize("reader", [(5000, 71)], indirect=True)
def test_the_curl_snippets_send_a_picture_train_end_early_and_fetch(reader: Reader):
    said = {}
    for snippet in within("curl"):
        if "/sude/" in snippet.code:
            wait_until_it_trains(reader.client)
        said[snippet.code] = reader.shell(snippet)
    (asked,) = (text for code, text in said.items() if "/sude/trainings" in code)
    assert re.search(rf"^{TRAINER} \| running \| training \| \d+ \| 5000 \| loss ", asked, re.MULTILINE)
    (finished,) = (text for code, text in said.items() if "/sude/finish" in code)
    assert json.loads(finished) == {"node": TRAINER}
    (waited,) = (text for code, text in said.items() if "until " in code)
    assert waited == '"status_str": "success"\n'
    fetched = list(said.values())[-1].split()
    assert {name.split("_0")[0] for name in fetched} == saved_by(reader.workflow)
    for name in fetched:
        chunks = carried(reader.folder / name)
        assert chunks["prompt"]["2"]["inputs"]["image"] == "my_dog.png"
        assert chunks["prompt"]["6"]["inputs"]["attribute"] == "flying"
        same(chunks["workflow"], chunks["prompt"], reader.infos)


def wait_until_it_trains(client: ComfyClient) -> None:
    """Until some steps of the training that the page ends early are done."""
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        for training in client.get("/sude/trainings")["trainings"]:
            if training["node"] == TRAINER and training["can_finish"] and training["done"] >= 2:
                return
        time.sleep(0.2)
    raise AssertionError("the training did not begin")


def saved_by(workflow: dict) -> set[str]:
    """The file names' beginnings of the pictures that a workflow saves."""
    nodes = workflow.values()
    return {node["inputs"]["filename_prefix"].split("/")[-1] for node in nodes if node["class_type"] == "SaveImage"}


@pytest.mark.parametrize("reader", [(8, 72)], indirect=True)
def test_the_python_snippets_train_watch_fetch_and_look(reader: Reader):
    said = {snippet.code.split()[1]: reader.python(snippet) for snippet in within("Python", "What the pictures carry")}
    told = said["train.py"]
    assert re.search(
        r"^[^|\n]+ \| training [1-8]/8 \| loss \d\.\d{4} \| gate \d+% open( \| \d+ s left)?$", told, re.M
    ), told
    assert re.search(r"^node \d+: \d+ of \d+$", told, re.M)
    fetched = re.findall(r"^pictures.*\.png$", told, re.M)
    assert {Path(path).name.split("_0")[0] for path in fetched} == saved_by(reader.workflow)
    for path in fetched:
        chunks = carried(reader.folder / path)
        assert chunks["prompt"]["2"]["inputs"]["image"] == "my_dog.png"
        assert chunks["prompt"]["3"]["inputs"]["value"] == "puppy"
        assert chunks["prompt"]["6"]["inputs"]["attribute"] == "sleeping"
        same(chunks["workflow"], chunks["prompt"], reader.infos)
    refusal = "Load Checkpoint (node 1): Value not in list: ckpt_name: 'not_there.safetensors' not in ["
    assert said["refused.py"].startswith(refusal) and refusal in PAGE
    assert said["look.py"].count("carries prompt and workflow and shows: sleeping") == len(fetched)
    check_what_the_helpers_promise(reader)
    check_the_table_of_fields(reader.client)


def check_what_the_helpers_promise(reader: Reader) -> None:
    """What sude_api.py does when something is not as hoped."""
    module = imported(reader.folder / "sude_api.py")
    job = {"prompt": json.loads(json.dumps(reader.workflow)), "workflow": json.loads(json.dumps(reader.drawn))}
    with pytest.raises(ValueError, match="category of .* comes from node 3: change that one"):
        module.change(job, "SuDe Fine-Tune", "category", "cat")
    module.change(job, "SuDe Fine-Tune", "baseline.w_s", 0.2)
    assert inputs(convert_ui_to_api(job["workflow"], reader.infos)) == inputs(job["prompt"]) != inputs(reader.workflow)
    module.change(job, "SuDe Training Options", "truncation", False)  # one of several that are on
    assert job["workflow"] is None and job["prompt"]["5"]["inputs"]["truncation"] is False
    broken = {"string": "text", "regex_pattern": "(", "replace": ""}
    failing = {
        "1": reader.client.node("RegexReplace", broken, "Replace"),
        "2": reader.client.node("PreviewAny", {"source": ["1", 0]}),
    }
    failing["3"] = reader.client.node("PreviewAny", title="Nothing to show")
    socket = module.connect()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run = module.queue({"prompt": failing, "workflow": None})
    assert printed.getvalue() == "Nothing to show (node 3): Required input is missing: source\n"
    with pytest.raises(RuntimeError, match=r"RegexReplace \(node 1\): .*unterminated subpattern"):
        list(module.events(socket, run))
    with pytest.raises(ValueError, match="'Missing' not found"):
        module.queue({"prompt": {"1": {"class_type": "Missing", "inputs": {}}}, "workflow": None})
    reader.workflow[TRAINER]["inputs"].update({"baseline.steps": 5000, "training_seed": 73})
    run = module.queue({"prompt": reader.workflow, "workflow": None})
    with pytest.raises(RuntimeError, match=rf"interrupted at SuDeFineTune \(node {TRAINER}\)"):
        for kind, data in module.events(socket, run):
            if kind == "sude.training" and data["can_finish"] and data["steps"] == 5000:
                module.call("/interrupt", json.dumps({"prompt_id": run}).encode())
    socket.close()
    assert not list(module.pictures(run, reader.folder))


def check_the_table_of_fields(client: ComfyClient) -> None:
    """The page names every field of the event, and no other."""
    table = PAGE.split("### The event sude.training")[1]
    named = {field for row in re.findall(r"^\| (`[^|]*) \|", table, re.M) for field in re.findall(r"`(\w+)`", row)}
    known = client.get("/sude/trainings")["trainings"]
    assert known and all(training.keys() == named for training in known)
    curves = re.search(r"^\| `curves` \| (.*?):", table, re.M)[1]
    assert {"every", *re.findall(r"`(\w+)`", curves)} == known[-1]["curves"].keys()


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_bash
@pytest.mark.parametrize("reader", [(2, 74)], indirect=True)
def test_comfy_run_takes_both_formats_and_its_pictures_carry_the_prompt_only(reader: Reader):
    reader.change(TRAINER, {"training_seed": 75})  # else all is cached, and no picture is written
    for node in reader.drawn["nodes"]:
        if node["type"] == "SaveImage":
            node["widgets_values"][0] += "_drawn"
    reader.write()
    drawn = convert_ui_to_api(reader.drawn, reader.infos)
    for snippet in within("comfy run"):
        before = reader.pictures()
        said = reader.shell(snippet)
        expected = drawn if "workflows/quickstart.json" in snippet.code else reader.workflow
        written = reader.pictures() - before
        assert {path.name.split("_0")[0] for path in written} == saved_by(expected)
        for path in written:
            chunks = carried(path)
            assert chunks.keys() == {"prompt"} and inputs(chunks["prompt"]) == inputs(expected)
            assert path.name in said
    events = [json.loads(line) for line in (reader.folder / "events.ndjson").read_text("utf-8").splitlines()]
    assert {"converted", "queued", "executing", "progress", "executed"} <= {event["type"] for event in events}
    assert events[-1]["type"] == "envelope" and events[-1]["ok"]
