"""Every input of every node explains itself: a tooltip, a place in the help page, a translation in every language."""

import json
import re
from pathlib import Path

import pytest

from bench.comfy_client import ComfyClient
from bench.comfy_server import PACK

REPO = Path(__file__).resolve().parents[2]
LANGUAGES = ("zh", "zh-TW", "ja", "ko", "fr", "de", "es", "ru", "pt-BR")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@pytest.fixture(scope="module")
def infos(server) -> dict[str, dict]:
    """object_info of the pack's nodes."""
    with ComfyClient(server.address) as client:
        return {name: info for name, info in client.object_info().items() if name.startswith("SuDe")}


def locale(language: str, file: str = "nodeDefs") -> dict:
    """A translation file."""
    return json.loads((REPO / "locales" / language / f"{file}.json").read_text("utf-8"))


def test_every_input_and_output_has_a_tooltip(infos):
    for node, info in infos.items():
        for name, said in widget_tooltips(info["input"]).items():
            assert said and all(len(text) > 10 for text in said), f"{node}.{name}"
        assert all(len(text) > 10 for text in info["output_tooltips"]), node
        assert len(info["description"]) > 20, node


def test_the_help_explains_every_input_and_output_and_shows_a_picture(client: ComfyClient, infos):
    for node, info in infos.items():
        status, body = client.request("GET", f"/extensions/{PACK}/docs/{node}.md")
        page = body.decode("utf-8")
        assert status == 200 and page.startswith("# SuDe ") and "## Common mistakes" in page
        shared = widget_names(infos["SuDeFineTune"]["input"]) if node == "SuDeSweep" else []  # explained on that page
        own = [name for name in widget_names(info["input"]) if name not in shared or name in info["input"]["required"]]
        for name in [*own, *info["output_name"]]:
            assert f"**{name}**" in page, f"{node}.md does not explain {name}"
        pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
        assert pictures, f"{node}.md shows no picture"
        for picture in pictures:
            status, data = client.request("GET", f"/extensions/{PACK}/docs/{picture}")
            assert status == 200 and data[:4] == b"\x89PNG" and len(data) < 300_000, picture


def test_english_says_what_the_nodes_say(infos):
    english = locale("en")
    assert english.keys() == infos.keys()
    for node, info in infos.items():
        texts = english[node]
        assert texts["display_name"] == info["display_name"] and texts["description"] == info["description"]
        for slot, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True)):
            assert texts["outputs"][str(slot)] == {"name": name, "tooltip": tooltip}
        for name, said in widget_tooltips(info["input"]).items():
            shown = texts["inputs"][name]["tooltip"]
            assert shown == said[0] if len(said) == 1 else all(text in shown for text in said), name


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_every_language_has_every_text(infos, language: str):
    texts, english = locale(language), locale("en")
    assert texts.keys() == infos.keys()
    for node, info in infos.items():
        assert texts[node]["display_name"] and texts[node]["description"], node
        assert texts[node]["inputs"].keys() == widget_tooltips(info["input"]).keys(), node
        assert list(texts[node].get("outputs", {})) == [str(slot) for slot in range(len(info["output"]))], node
        entries = [*texts[node]["inputs"].values(), *texts[node]["outputs"].values()]
        assert all(entry["name"] and entry["tooltip"] for entry in entries), node
        shown = "".join(text for entry in entries for text in entry.values()) + texts[node]["description"]
        assert not set("|{}@") & set(shown), f"{node}: characters that the frontend interprets"
        for name, entry in texts[node]["inputs"].items():
            said, source = (NUMBER.findall(t["tooltip"]) for t in (entry, english[node]["inputs"][name]))
            assert sorted(x.replace(",", ".") for x in said) == sorted(x.replace(",", ".") for x in source), (
                node,
                name,
            )


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_is_one(language: str):
    own, english = locale(language), locale("en")
    same = [
        f"{node}.{name}"
        for node in english
        for name, entry in english[node]["inputs"].items()
        if own[node]["inputs"][name]["tooltip"] == entry["tooltip"]
    ]
    assert not same, f"not translated: {same}"
    assert locale(language, "main").keys() == locale("en", "main").keys()


def test_the_server_offers_every_language(client: ComfyClient):
    offered = client.get("/i18n")
    for language in LANGUAGES:
        assert (
            offered[language]["nodeDefs"]["SuDeFineTune"]["description"]
            == locale(language)["SuDeFineTune"]["description"]
        )


def widget_names(inputs: dict) -> list[str]:
    """Every input, those of a dynamic combo's options included."""
    found = []
    for group in ("required", "optional"):
        for name, (_, *settings) in inputs.get(group, {}).items():
            found.append(name)
            for option in (settings[0] if settings else {}).get("options") or []:
                found += widget_names(option["inputs"]) if isinstance(option, dict) else []
    return list(dict.fromkeys(found))


def widget_tooltips(inputs: dict, prefix: str = "") -> dict[str, list[str]]:
    """Tooltips by the frontend's translation key; several where options of a dynamic combo say different things."""
    found: dict[str, list[str]] = {}
    for group in ("required", "optional"):
        for name, (_, *settings) in inputs.get(group, {}).items():
            settings = settings[0] if settings else {}
            here = {f"{prefix}{name}": [settings.get("tooltip", "")]}
            for option in settings.get("options") or []:
                if isinstance(option, dict):
                    for key, said in widget_tooltips(option["inputs"], f"{prefix}{name}_").items():
                        here[key] = here.get(key, []) + [text for text in said if text not in here.get(key, [])]
            found.update(here)
    return found
