"""Writes locales/en from the nodes' schemas and fills the other languages from what is translated already.

    python -m bench.locales                          what every language lacks
    python -m bench.locales --take de german.json    take translations {English: German} from a file

A text is translated once and used wherever the nodes say it. Needs COMFYUI_PATH and its Python.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path

from bench.comfy_server import REPO, comfyui_folder

LOCALES = REPO / "locales"


def schemas() -> dict[str, dict]:
    """Every node's object_info, as the server would send it."""
    sys.path.insert(0, str(comfyui_folder()))
    from comfy.cli_args import args

    args.cpu = True
    from comfy_sude.nodes import SuDeExtension

    nodes = asyncio.run(SuDeExtension().get_node_list())
    return {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in nodes}


def english(info: dict) -> dict:
    """The frontend's translation entry of one node."""
    outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {
            name: {"name": label, "tooltip": said(tips)} for name, (label, tips) in inputs(info["input"]).items()
        },
        "outputs": {str(slot): {"name": name, "tooltip": tooltip} for slot, (name, tooltip) in enumerate(outputs)},
    }


def inputs(groups: dict, prefix: str = "") -> dict[str, tuple[str, dict[str, list[str]]]]:
    """Label and tooltips by the frontend's key; a tooltip with the options of a dynamic combo that it belongs to."""
    found: dict[str, tuple[str, dict[str, list[str]]]] = {}
    for group in ("required", "optional"):
        for name, (_, *settings) in groups.get(group, {}).items():
            settings = settings[0] if settings else {}
            found[f"{prefix}{name}"] = (name, {settings.get("tooltip", ""): []})
            for option in settings.get("options") or []:
                if isinstance(option, dict):
                    for key, (label, tips) in inputs(option["inputs"], f"{prefix}{name}_").items():
                        _, known = found.setdefault(key, (label, {}))
                        for tip in tips:
                            known.setdefault(tip, []).append(option["key"])
    return found


def said(tips: dict[str, list[str]]) -> str:
    """One tooltip of all that an input means."""
    if len(tips) == 1:
        return next(iter(tips))
    return " ".join(f"{', '.join(names)}: {tip}" for tip, names in tips.items())


def texts(entry: dict) -> list[tuple[tuple[str, ...], str]]:
    """Every text of a nested translation file and its place."""
    if isinstance(entry, str):
        return [((), entry)]
    return [((name, *place), text) for name, value in entry.items() for place, text in texts(value)]


def filled(source: dict, known: dict[str, str], lacking: list[str]) -> dict:
    """A translation file in another language; what is not known is left out and noted."""
    result: dict = {}
    for (*path, last), text in texts(source):
        keep = last == "name" and (text in known or text.isupper() or "_" in text)  # labels may stay as they are
        if text not in known and not keep:
            lacking.append(text)
            continue
        entry = result
        for name in path:
            entry = entry.setdefault(name, {})
        entry[last] = known.get(text, text)
    for entry in result.values():
        entry.setdefault("inputs", {})  # of a node that has none
    return result


def main() -> int:
    """Write all files; 1 if a language lacks something."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--take", nargs=2, action="append", default=[], metavar=("LANGUAGE", "FILE"))
    options = parser.parse_args()
    old = {path.parent.name: json.loads(path.read_text("utf-8")) for path in LOCALES.glob("*/nodeDefs.json")}
    source = {name: english(info) for name, info in schemas().items()}
    given = {language: json.loads(Path(file).read_text("utf-8")) for language, file in options.take}
    before = dict(texts(old["en"]))
    write("en", source)
    short = False
    for language in sorted((old.keys() | given.keys()) - {"en"}):
        known = {before[place]: text for place, text in texts(old.get(language, {})) if place in before}
        lacking: list[str] = []
        write(language, filled(source, known | given.get(language, {}), lacking))
        for text in dict.fromkeys(lacking):
            short = True
            print(f"{language} lacks: {text}")
    return int(short)


def write(language: str, entries: dict) -> None:
    """One language's file."""
    folder = LOCALES / language
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(entries, ensure_ascii=False, indent=2)
    (folder / "nodeDefs.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
