"""DreamBench's data, its protocol, its results on disk and its command line, without a ComfyUI."""

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.dreambench import __main__ as program
from bench.dreambench import cluster, protocol, runner, subjects, table
from bench.dreambench.protocol import Cell, Guidance, Protocol
from bench.dreambench.results import DONE, FAILED, Results
from bench.dreambench.studio import LIFELINE, Outcome, failed

METRICS = ("CLIP-I", "DINO-I", "CLIP-T", "BLIP-T")
# google/dreambooth, dataset/prompts_and_classes.txt
CLASSES = """
backpack,backpack backpack_dog,backpack bear_plushie,stuffed_animal berry_bowl,bowl can,can candle,candle cat,cat
cat2,cat clock,clock colorful_sneaker,sneaker dog,dog dog2,dog dog3,dog dog5,dog dog6,dog dog7,dog dog8,dog duck_toy,toy
fancy_boot,boot grey_sloth_plushie,stuffed_animal monster_toy,toy pink_sunglasses,glasses poop_emoji,toy rc_car,toy
red_cartoon,cartoon robot_toy,toy shiny_sneaker,sneaker teapot,teapot vase,vase wolf_plushie,stuffed_animal
"""


# --- The data


def test_all_thirty_subjects_are_there_with_their_classes():
    known = dict(pair.replace("_animal", " animal").rsplit(",", 1) for pair in CLASSES.split())
    loaded = subjects.load()
    assert {name: subject.category for name, subject in loaded.items()} == known
    assert len(loaded) == 30 and len(set(known.values())) == 15
    assert {name for name, subject in loaded.items() if subject.kind == "live"} == {
        name for name, category in known.items() if category in ("cat", "dog")
    }


def test_every_subject_has_five_prompts_in_the_papers_template():
    for subject in subjects.load().values():
        assert len(set(subject.prompts)) == 5, subject
        for prompt in subject.prompts:
            assert prompt.startswith("photo of a ") and prompt.count(subjects.PLACE) == 1, prompt
            attribute = prompt.removeprefix("photo of a ")
            assert not attribute.startswith(tuple("aeiou")), f"{prompt}: its article is wrong"
            assert prompt != "photo of a {S*}", "a prompt without an attribute"


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("dog", ["running {S*}", "jumping {S*}", "{S*} with open mouth", "{S*} playing ball"]),
        ("cat", ["{S*} playing ball"]),
        ("teapot", ["golden material {S*}", "clear {S*}"]),
        ("red_cartoon", ["running {S*}"]),
        ("candle", ["burning {S*}"]),
        ("berry_bowl", ["metal {S*}", "metal {S*} with cherry"]),
    ],
)
def test_the_attributes_that_the_paper_names_are_kept_and_marked(name: str, prompts: list[str]):
    entries = {entry["name"]: entry for entry in json.loads(subjects.FILE.read_text("utf-8"))["subjects"]}
    marked = [prompt["text"] for prompt in entries[name]["prompts"] if prompt["source"] == "paper"]
    assert marked == [f"photo of a {prompt}" for prompt in prompts]
    assert {prompt["source"] for entry in entries.values() for prompt in entry["prompts"]} == {"paper", "ours"}


def test_the_papers_table_is_as_printed():
    printed = {  # SuDe, Table 1
        ("DreamBooth", "plain"): (77.4, 59.7, 29.0, 42.1),
        ("DreamBooth", "SuDe"): (77.4, 59.9, 29.5, 43.3),
        ("Custom Diffusion", "plain"): (76.5, 59.6, 30.1, 45.2),
        ("Custom Diffusion", "SuDe"): (76.3, 59.1, 30.4, 46.1),
        ("ViCo", "plain"): (75.4, 53.5, 27.1, 39.1),
        ("ViCo", "SuDe"): (76.1, 56.8, 29.7, 43.3),
    }
    expected = {("SD1.4", *row): dict(zip(METRICS, scores, strict=True)) for row, scores in printed.items()}
    assert table.load_paper() == expected


# --- The protocol


@pytest.mark.parametrize(
    ("baseline", "drawn", "read"),
    [
        ("DreamBooth", "photo of a metal sks bowl with cherry", "photo of a metal bowl with cherry"),
        ("Custom Diffusion", "photo of a metal <new1> bowl with cherry", "photo of a metal bowl with cherry"),
        ("ViCo", "photo of a metal * with cherry", "photo of a metal bowl with cherry"),
    ],
)
def test_each_baseline_is_asked_in_its_template_and_scored_without_identifier(baseline: str, drawn: str, read: str):
    bowl, cell = subjects.load()["berry_bowl"], Cell("SD1.4", "berry_bowl", baseline, 1.0)
    assert protocol.prompts(cell, bowl)[1] == drawn
    assert protocol.texts(cell, bowl)[1] == read


@pytest.mark.parametrize("baseline", protocol.BASELINES)
def test_scoring_reads_the_category_in_every_prompt(baseline: str):
    for subject in subjects.load().values():
        texts = protocol.texts(Cell("SD1.4", subject.name, baseline, 1.0), subject)
        assert texts == [text.replace("{S*}", subject.category) for text in subject.prompts]


def test_w_s_is_the_published_one_times_the_multiplier():
    found = {(b, m): Cell("x", "dog", b, m).w_s for b in protocol.BASELINES for m in protocol.MULTIPLIERS}
    assert [found["DreamBooth", m] for m in (0, 0.5, 1, 2)] == [0, 0.2, 0.4, 0.8]  # paper Sec. 5.1
    assert [found["Custom Diffusion", m] for m in (0, 0.5, 1, 2)] == [0, 1, 2, 4]
    assert [found["ViCo", m] for m in (0, 0.5, 1, 2)] == [0, 0.75, 1.5, 3]


def test_the_published_run_has_so_many_cells_each_of_its_own_name():
    made = list(protocol.cells(("SD1.4", "SD1.5"), subjects.load()))
    assert len(made) == 2 * 30 * 3 * 4 == len({cell.key for cell in made}) == len({cell.folder for cell in made})
    assert {cell.subject for cell in made[:12]} == {"backpack"}, "a subject's cells do not follow one another"


def test_baselines_and_w_s_of_a_prompt_share_their_noise():
    seeds = {Cell("x", "dog", b, m, seed=3).sampling_seed(2) for b in protocol.BASELINES for m in (0.0, 2.0)}
    assert seeds == {3002}


@pytest.mark.parametrize(
    "change",
    [
        {"sampling_steps": 20}, {"size": 768}, {"references": "first"}, {"pictures": 2},
        {"training": {"ViCo": {"baseline.steps": 3}}},
        {"guidance": {"ViCo": Guidance(3.0)}},
    ],
)  # fmt: skip
def test_a_cell_made_with_other_settings_is_another(change: dict):
    cell, dog = Cell("SD1.4", "dog", "ViCo", 1.0), subjects.load()["dog"]
    usual = protocol.fingerprint(cell, dog, Protocol(), "a.safetensors")
    assert protocol.fingerprint(cell, dog, Protocol(), "a.safetensors") == usual
    assert protocol.fingerprint(cell, dog, dataclasses.replace(Protocol(), **change), "a.safetensors") != usual
    assert protocol.fingerprint(cell, dog, Protocol(), "b.safetensors") != usual
    other = dataclasses.replace(dog, prompts=("photo of a {S*}",))
    assert protocol.fingerprint(cell, other, Protocol(), "a.safetensors") != usual


def test_another_baselines_settings_do_not_change_a_cell():
    cell, dog = Cell("SD1.4", "dog", "DreamBooth", 1.0), subjects.load()["dog"]
    changed = Protocol(training={"ViCo": {"baseline.steps": 3}})
    assert protocol.fingerprint(cell, dog, changed, "a") == protocol.fingerprint(cell, dog, Protocol(), "a")


# --- Results on disk


def record(key: str, status: str = DONE, fingerprint: str = "f", **more) -> dict:
    return {"key": key, "fingerprint": fingerprint, "status": status, **more}


def test_results_come_back_as_they_went(tmp_path: Path):
    results = Results(tmp_path / "deep" / "results.jsonl")
    assert results.read() == [] and results.done() == {}
    made = [record("a", scores={"CLIP-I": [[1.5, 2.0]]}), record("b", said="zwölf")]
    for one in made:
        results.append(one)
    assert results.read() == made and set(results.done()) == {"a", "b"}


@pytest.mark.parametrize(
    "torn", [b'{"key": "c", "fing', b'{"key": "c", "fingerprint": "f", "status": "done"}', b"\xff\x00"]
)
def test_a_torn_last_line_is_ignored_and_taken_away_by_the_next(tmp_path: Path, torn: bytes):
    results = Results(tmp_path / "results.jsonl")
    results.append(record("a"))
    with results.path.open("ab") as file:
        file.write(torn)
    assert [one["key"] for one in results.read()] == ["a"]
    results.append(record("b"))
    assert [one["key"] for one in results.read()] == ["a", "b"]
    assert results.path.read_bytes().count(b"\n") == 2


def test_a_damaged_line_elsewhere_is_named(tmp_path: Path):
    results = Results(tmp_path / "results.jsonl")
    results.append(record("a"))
    with results.path.open("ab") as file:
        file.write(b"{broken}\n")
    results_after = Results(results.path)
    with pytest.raises(ValueError, match="line 2"):
        results_after.read()


def test_a_failed_cell_is_still_to_do_and_counts_as_done_after_it_succeeded(tmp_path: Path):
    results = Results(tmp_path / "results.jsonl")
    results.append(record("a", FAILED, error="out of memory"))
    assert results.done() == {} and results.failures() == {"a": ["out of memory"]}
    results.append(record("a", second=False))
    results.append(record("a", second=True))
    assert results.done()["a"]["second"] is False, "a cell's first result does not stand"
    assert results.failures() == {}


def test_results_of_other_settings_are_refused(tmp_path: Path):
    results = Results(tmp_path / "results.jsonl")
    results.append(record("a", fingerprint="old"))
    assert set(results.done({"b": "new"})) == set()
    with pytest.raises(ValueError, match="other settings"):
        results.done({"a": "new"})


# --- Which cells are still to do


@pytest.fixture
def plan(tmp_path: Path) -> runner.Plan:
    """Two subjects with pictures, on a checkpoint that is only a file."""
    known = subjects.load()
    for name in ("dog", "vase"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for file in ("00.jpg", "02.jpg", "01.jpg", "notes.txt"):
            (tmp_path / "data" / name / file).write_bytes(file.encode())
    checkpoint = tmp_path / "sd.safetensors"
    checkpoint.write_bytes(b"")
    chosen = [known["dog"], known["vase"]]
    return runner.Plan(
        Protocol(), {"SD1.4": checkpoint}, chosen, tmp_path / "data", tmp_path, tmp_path / "out", ("ViCo",), (0.0, 1.0)
    )


def outcome(job, picture: bytes = b"png") -> Outcome:
    """A finished cell."""
    scores = {metric: [[50.0] * 4] * 5 for metric in METRICS}
    made = record(
        job.cell.key, fingerprint=job.fingerprint, cell=dataclasses.asdict(job.cell), scores=scores, seconds=1
    )
    return Outcome(made, (picture,) * 20)


def test_a_run_goes_on_where_the_last_one_stopped_and_tries_again_what_failed(plan: runner.Plan):
    jobs = plan.jobs()
    assert len(jobs) == 4 and set(plan.open()) == set(jobs)
    first, second, *rest = jobs.values()
    left = runner.run(plan, iter([(first, outcome(first)), (second, failed(second, "KSampler: out of memory"))]), 4)
    assert left == 3 and set(plan.open()) == set(jobs) - {first.cell.key}
    left = runner.run(plan, ((job, outcome(job)) for job in [second, *rest]), 4)
    assert left == 0 and plan.open() == {} and len(plan.records()) == 4
    assert [one["status"] for one in plan.results.read()].count(FAILED) == 1


def test_a_finished_cell_has_its_pictures_by_prompt_and_number(plan: runner.Plan):
    job = next(iter(plan.jobs().values()))
    runner.run(plan, iter([(job, outcome(job, b"seen"))]), 4)
    files = sorted((plan.output / "pictures" / "SD1.4" / "dog" / "vico_ws0_seed0").iterdir())
    assert [file.name for file in files] == [f"{prompt}_{number}.png" for prompt in range(5) for number in range(4)]
    assert files[0].read_bytes() == b"seen"


def test_the_first_picture_is_trained_on_and_all_are_references(plan: runner.Plan):
    dog = plan.subjects[0]
    assert plan.pictures_of(dog) == [b"00.jpg", b"01.jpg", b"02.jpg"]
    alone = dataclasses.replace(plan, protocol=Protocol(references="first"))
    assert alone.pictures_of(dog) == [b"00.jpg"]


def test_all_that_is_missing_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = ["check", "--backbone", f"SD1.4={tmp_path / 'none.safetensors'}", "--data", str(tmp_path)]
    with pytest.raises(program.BenchError) as raised:
        program.main([*arguments, "--models", str(tmp_path), "--subjects", "dog, vase"])
    said = str(raised.value)
    for part in ("none.safetensors for SD1.4", "00.jpg of dog, vase", "openai/clip-vit-base-patch32", "blip-itm"):
        assert part in said
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backbone", "file.safetensors"], "NAME=FILE"),
        (["--baselines", "DreamBoot"], "DreamBoot, but there are only: DreamBooth, Custom Diffusion, ViCo"),
        (["--subjects", "dog9"], "dog9"),
        (["--seeds", "0,one"], "whole numbers"),
        (["table", "--output", "nowhere-at-all"], "no finished cell"),
    ],
)
def test_a_wrong_command_line_is_refused_in_words(arguments: list[str], said: str):
    with pytest.raises(program.BenchError, match=said):
        program.main(arguments)


# --- The cluster


def test_a_missing_ray_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it now fails, whether it is installed or not
    with pytest.raises(cluster.ClusterError, match="pyproject.toml lists under dreambench"):
        with cluster.connected("auto", {"GPU": 1}):
            pass


def test_no_module_imports_ray_before_it_is_asked_for():
    for path in set(Path(cluster.__file__).parent.glob("*.py")) - {
        Path(cluster.__file__).with_name("prove_cluster.py")
    }:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "ray"], path


def test_resources_are_read_and_refused_in_words():
    assert cluster.read_resources("GPU=1") == {"GPU": 1.0}
    assert cluster.read_resources(" CPU=2, big=0.5,") == {"CPU": 2.0, "big": 0.5}
    with pytest.raises(ValueError, match="NAME=NUMBER"):
        cluster.read_resources("GPU")


@pytest.mark.skipif(os.name == "nt", reason="a process's parent is forgotten there only when it ends itself")
def test_a_server_ends_when_the_process_that_started_it_is_killed(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text("import sys, time\nprint(*sys.argv[1:], flush=True)\ntime.sleep(60)\n", encoding="utf-8")
    command = [sys.executable, str(LIFELINE), str(program), "argument"]
    starter = f"import subprocess\nchild = subprocess.Popen({command!r})\nprint(child.pid, flush=True)\nchild.wait()"
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True) as parent:
        said = sorted(parent.stdout.readline().strip() for _ in range(2))
        assert said[1] == "argument" and said[0].isdigit()
        parent.kill()
        parent.wait()
        assert parent.stdout.read() == ""  # returns when the child, which holds the other end, is gone
