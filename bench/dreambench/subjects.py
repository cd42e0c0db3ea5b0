"""The 30 subjects with their attribute prompts, and their pictures in a folder of DreamBench's layout."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("subjects.json")
PLACE = "{S*}"  # in a prompt, of what names the subject
FIRST = "00.jpg"  # the one picture of a subject that is trained on. Source: paper Sec. 5.1
PICTURES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class Subject:
    """What is learned.

    Attributes:
        name: also of its folder in the data.
        category: what training and prompts call it; DreamBench's "class".
        prompts: each with PLACE in it.
        kind: "live" or "object", as DreamBench divides them.
        own: how many of the prompts the paper does not name.
    """

    name: str
    category: str
    prompts: tuple[str, ...]
    kind: str = "object"
    own: int = 0


def load(path: Path = FILE) -> dict[str, Subject]:
    """All subjects by name, in the file's order."""
    found = {}
    for entry in json.loads(path.read_text("utf-8"))["subjects"]:
        prompts = tuple(prompt["text"] for prompt in entry["prompts"])
        own = sum(prompt["source"] != "paper" for prompt in entry["prompts"])
        found[entry["name"]] = Subject(entry["name"], entry["class"], prompts, entry["kind"], own)
    return found


def photographs(data: Path, subject: Subject, references: str = "all") -> list[Path]:
    """A subject's pictures, the one that is trained on first; empty if that one is not there.

    Args:
        data: a folder of the layout of DreamBench's dataset/: <subject>/00.jpg and more.
        subject: whose.
        references: "all", or "first" for the one that is trained on alone.
    """
    first = data / subject.name / FIRST
    if not first.is_file():
        return []
    others = sorted(path for path in first.parent.iterdir() if path.suffix.lower() in PICTURES and path != first)
    return [first, *(others if references == "all" else ())]


def lacking(data: Path, subjects: Sequence[Subject]) -> list[str]:
    """What is missing in the data, each as a sentence."""
    absent = [subject.name for subject in subjects if not photographs(data, subject)]
    if not absent:
        return []
    return [f"{data} lacks {FIRST} of {', '.join(absent)}: give --data the folder dataset/ of google/dreambooth."]
