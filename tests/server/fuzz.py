"""Makes hostile prompts for the pack's nodes, whichever those are, and finds what a server did outside its folders.

What is not made, because it is ComfyUI's own and no node can help it (seen in 0.30.0):
- A link to a node or an output that does not exist, where links are not validated: in an input that the node does not
  have, in a dynamic combo, or in {"__value__": link}. The executor's thread dies of it; the queue hangs for good.
- Values nested a few hundred levels deep: the queue copies a prompt recursively, and the same thread dies.
- Lone surrogates in the name of an input that the node does not have: they end up in a message, which cannot be written
  to the log, and that thread dies again.
- JSON that Python's parser refuses (integers above 4300 digits): the request itself is answered 500.
"""

import copy
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.comfy_client import defaults

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
MARK = "sudefuzz"  # in the name of every file that a hostile path would write
TARGET = "target"
NAN, INFINITE = float("nan"), float("inf")
NUMBERS = (
    0, 1, -1, 2, 7, 63, 64, 65, 1000, 2**31, 2**53 + 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**400, -(10**400),
    0.0, -0.0, 0.5, 1.5, -0.1, 1e-320, 1e300, -1e300, NAN, INFINITE, -INFINITE, True, False,
)  # fmt: skip
TEXTS = (
    "", " ", "\n", "\t\r\n", "\0", "a\0b", "\ufeff", "\u200b\u202edog", "\ud800", "\udfff\ud800", "\U0010ffff",
    "é" * 300, "e" + "\u0301" * 500, "👩‍👩‍👧‍👦" * 50, "ﷺ" * 100, "Иİıſẞŉΐ", "犬" * 400, "x" * 300, "dog " * 2000,
    "NaN", "inf", "-1", "1e999", "0x10", "1_000", "١٢٣", "9" * 5000, "True", "None", "null", "{}", "[]",
    "{0.__class__}", "%s%n%d", "${HOME}", "$(touch sudefuzz)", "`touch sudefuzz`", "; rm -rf sudefuzz",
    "'; DROP TABLE subjects; --", "<script>alert(1)</script>", "sks", "SKS dog", "<new1>", "*", "embedding:x",
    "((((dog:1.5", "(dog:nan)", "\\", "\\(", "(?P<a>.*)+$", "dog|cat",
)  # fmt: skip
PATHS = (
    "../sudefuzz", "../" * 12 + "sudefuzz", "..\\..\\..\\sudefuzz", "a/../../../sudefuzz", "....//....//sudefuzz",
    "..%2f..%2fsudefuzz", "%2e%2e/sudefuzz", "..\0/../sudefuzz", "../\u200b../sudefuzz", "．．/．．/sudefuzz", "..",
    "../", ".", "/", "\\", "//", "/sudefuzz", "//sudefuzz/share", "\\\\sudefuzz\\share\\x", "\\\\?\\C:\\sudefuzz",
    "C:\\sudefuzz", "C:sudefuzz", "file:///sudefuzz", "~/sudefuzz", "~root/sudefuzz", "%USERPROFILE%\\sudefuzz",
    "%date:../../x%/sudefuzz", "con", "NUL", "aux.txt", "COM1", "com¹", "lpt1.safetensors", "a/con/b", "name.",
    "name ", " /x", "-rf", "a:sudefuzz", ".hidden", "x" * 250 + "/" + "y" * 250, "a/" * 200 + "sudefuzz",
    "sudefuzz.safetensors", "sudefuzz_00001_.tmp", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/etc/passwd",
)  # fmt: skip
STRUCTURES: tuple[Any, ...] = (
    None, [], {}, [[]], [None], [1], ["x"], [1, 2, 3], [None, None], {"": None}, {"a": {"b": [1, {"c": NAN}]}},
    {"__value__": None}, {"__value__": [1, 2]}, {"__value__": {"__value__": "x"}}, {"__type__": "IMAGE"},
    {"baseline": "DreamBooth"}, {"prior": "off"}, {"metadata": {}, "tensors": {}}, list(range(500)), {"x" * 500: "x"},
)  # fmt: skip
STRAY = (
    "", " ", "x", "self", "cls", "prior", "baseline", "baseline.", ".baseline", "baseline.baseline", "prior.prior",
    "prior.w_r", "baseline.w_s", "baseline.w_s.x", "baseline.identifier", "a.b.c.d", "unique_id", "hidden", "prompt",
    "cache", "report", "__class__", "__init__", "kwargs", "**", "\0", "x" * 5000, "../sudefuzz",
    "filename_prefix", "subject",
)  # fmt: skip
FRAMES: tuple[Any, ...] = (
    None, 0, "x", [], {}, [1], {"1": None}, {"1": 5}, {"1": "x"}, {"1": []}, {"1": {}}, {"1": {"inputs": {}}},
    {"1": {"class_type": None, "inputs": {}}}, {"1": {"class_type": [], "inputs": {}}}, {"1": {"class_type": "SuDeX"}},
    {"1": {"class_type": "SuDePrompt", "inputs": {}}}, {"1": {"class_type": "SuDePrompt"}}, {"": {"class_type": ""}},
)  # fmt: skip


class Case(NamedTuple):
    """One prompt.

    Attributes:
        node: the class of the node it attacks; empty if the prompt has no frame of nodes at all.
        prompt: the body's "prompt".
        typed: whether every socket that has a link has one of its type, so that only the widgets' values are hostile.
    """

    node: str
    prompt: Any
    typed: bool = False


class Fuzzer:
    """An endless stream of prompts, the same for the same seed, nodes and sources.

    A node that trains never gets a picture it could train on.

    Args:
        info: the server's /object_info, of all nodes.
        seed: of all choices.
        outside: a folder that nothing may be written to; its path goes into paths.
        graph: nodes that stand in every prompt.
        sources: link to one of them for each socket type.
    """

    def __init__(
        self, info: Mapping[str, dict], seed: int, outside: Path, graph: dict[str, dict], sources: Mapping[str, list]
    ) -> None:
        self.info, self.graph, self.sources = info, graph, sources
        self.outputs = [
            [node, slot] for node in graph for slot, _ in enumerate(info[graph[node]["class_type"]]["output"])
        ]
        self.nodes = sorted(name for name in info if name.startswith("SuDe"))
        self.random = random.Random(seed)
        places = (str(outside / MARK), f"{outside}/../{MARK}", str(outside / "canary.safetensors"), outside.as_uri())
        self.paths = (*PATHS, *places, os.path.relpath(outside / MARK), "../" * 30 + str(outside / MARK))
        self.operations: tuple[tuple[int, Callable[[dict], None]], ...] = (
            (10, self.replace), (3, self.link), (2, self.remove), (2, self.stray), (2, self.unknown_option),
            (1, self.wrap),
        )  # fmt: skip

    def __iter__(self) -> Iterator[Case]:
        yield from (Case("", frame) for frame in FRAMES)
        for node in self.nodes:  # every path in every text: one that leads out must not be missed by chance
            texts = [name for name, value in self.valid(self.info[node]).items() if isinstance(value, str)]
            yield from (self.case(node, {name: path}) for name in texts for path in self.paths)
        while True:
            for node in self.nodes:
                if any(self.info[node]["input"].get(group) for group in ("required", "optional")):
                    yield self.case(node)
                elif self.random.random() < 0.1:  # there is little to attack
                    yield self.case(node)

    def case(self, name: str, change: Mapping[str, Any] | None = None) -> Case:
        """A prompt around one node of this class, with these inputs changed or a few at random."""
        pick, info = self.random, self.info[name]
        sockets = self.sockets(info)
        inputs = self.valid(info)
        asked = {socket: inputs.get(socket) for socket in sockets}
        inputs.update(change or {})
        weights, operations = zip(*self.operations, strict=True)
        for operation in pick.choices(operations, weights, k=0 if change else pick.choice((0, 1, 1, 1, 2, 3))):
            operation(inputs)
        if "SUDE_SUBJECT" in info["output"] and "MODEL" in sockets.values():
            for socket in (socket for socket in sockets if sockets[socket] == "IMAGE" and socket in inputs):
                inputs[socket] = asked[socket] = pick.choice(NUMBERS)  # nothing to train on
        nodes = {**copy.deepcopy(self.graph), TARGET: {"class_type": name, "inputs": inputs}}
        if info["output"]:
            source = [TARGET, pick.randrange(len(info["output"]))]
            nodes["sink"] = {"class_type": "PreviewAny", "inputs": {"source": source}}
        unchecked = list(self.unchecked(info, inputs))
        for link in unchecked:
            if link not in [*self.outputs, *([TARGET, slot] for slot in range(len(info["output"])))]:
                link[:] = pick.choice(self.outputs)  # see the module's docstring
        typed = not unchecked and all(inputs.get(socket) == asked[socket] for socket in sockets)
        return Case(name, nodes, typed and all(kind in self.sources for kind in sockets.values()))

    # --- A node as it should be ---

    def declared(self, info: dict, inputs: Mapping[str, Any]) -> set[str]:
        """The inputs that a node has in ComfyUI's eyes: a dynamic combo only if one of its options is chosen."""
        found = set()

        def walk(groups: Mapping[str, Mapping], prefix: str) -> None:
            for name, (_, *settings) in (one for group in groups.values() for one in group.items()):
                options = (settings[0] if settings else {}).get("options") or [None]
                for option in options:
                    if not isinstance(option, dict):
                        found.add(prefix + name)
                    elif option["key"] == inputs.get(prefix + name):
                        found.add(prefix + name)
                        walk(option["inputs"], f"{prefix}{name}.")

        walk({group: info["input"].get(group, {}) for group in ("required", "optional")}, "")
        return found

    def unchecked(self, info: dict, inputs: Mapping[str, Any]) -> Iterator[list]:
        """The links of a node that ComfyUI does not validate."""
        declared = self.declared(info, inputs)
        for name, value in inputs.items():
            value = value.get("__value__") if isinstance(value, dict) else value if name not in declared else None
            if is_link(value):
                yield value

    def sockets(self, info: dict) -> dict[str, str]:
        """The type of every input of a node that takes links only."""
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        return {name: kind for name, (kind, *_) in inputs.items() if isinstance(kind, str) and kind not in WIDGETS}

    def valid(self, info: dict) -> dict[str, Any]:
        """Inputs the server would take, as far as there are sources; an option of every dynamic combo at random."""
        pick, required = self.random, info["input"].get("required", {})
        chosen: dict[str, Any] = {}
        for name, (kind, *settings) in {**required, **info["input"].get("optional", {})}.items():
            options = (settings[0] if settings else {}).get("options") or []
            if options and isinstance(options[0], dict):
                chosen[name] = pick.choice(options)["key"]
            elif kind in self.sources and (name in required or pick.random() < 0.5):
                chosen[name] = list(self.sources[kind])
            elif name in required and name in self.sockets(info):
                chosen[name] = self.value()  # ComfyUI lets a value pass where a link should be
        return {**defaults(info["input"], chosen), **chosen}

    # --- What can be wrong with it ---

    def value(self) -> Any:
        """Anything but a link."""
        pools = (NUMBERS, TEXTS, self.paths, STRUCTURES)
        return copy.deepcopy(self.random.choice(self.random.choices(pools, (3, 3, 3, 2))[0]))

    def some_link(self, *nodes: Any) -> list:
        """A link to any socket of the nodes that are in every prompt, or of these."""
        slot = self.random.choice((0, 0, 0, 1, 2, 99, -1, 2**70, 0.5, True, "0", "x", None, []))
        return [self.random.choice([*self.graph, TARGET, *nodes]), slot]

    def name(self, inputs: dict) -> str:
        """One of the inputs."""
        return self.random.choice(sorted(inputs) or ["x"])

    def replace(self, inputs: dict) -> None:
        """Another value for an input."""
        inputs[self.name(inputs)] = self.value()

    def link(self, inputs: dict) -> None:
        """A link to a wrong socket, a missing node, the node itself, what comes after it, or nonsense."""
        inputs[self.name(inputs)] = self.some_link("sink", "missing", "", "\0", 1, None, [], {}, f"../{MARK}")

    def remove(self, inputs: dict) -> None:
        """One input less."""
        inputs.pop(self.name(inputs), None)

    def stray(self, inputs: dict) -> None:
        """An input that the node may not have."""
        inputs.setdefault(self.random.choice(STRAY), self.value() if self.random.random() < 0.8 else self.some_link())

    def unknown_option(self, inputs: dict) -> None:
        """Something unknown for a choice, the other inputs left as they are."""
        texts = sorted(name for name, value in inputs.items() if isinstance(value, str))
        if texts:
            inputs[self.random.choice(texts)] = self.random.choice(("magic", "", " ", "dreambooth", "0", *self.paths))

    def wrap(self, inputs: dict) -> None:
        """The value in the wrapper that ComfyUI's frontend uses for lists."""
        name = self.name(inputs)
        inputs[name] = {
            "__value__": self.some_link() if self.random.random() < 0.3 else copy.deepcopy(inputs.get(name))
        }


def is_link(value: Any) -> bool:
    """Whether ComfyUI's executor takes a value for a link."""
    return (
        isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int | float)
    )


def snapshot(folder: Path, *without: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file below a folder, and every folder; those below `without` left out."""
    found = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(place) / name not in without]
        found.update(dict.fromkeys((Path(place) / name for name in folders), (0, 0)))
        for path in (Path(place) / name for name in names if Path(place) / name not in without):
            found[path] = (path.lstat().st_size, path.lstat().st_mtime_ns)
    return found


def marked(folder: Path, deep: bool = True) -> list[Path]:
    """Files and folders with `MARK` in their name in a folder, hidden folders aside; `deep`: or anywhere below it."""
    found = []
    for place, folders, names in os.walk(folder):
        found += [Path(place) / name for name in (*folders, *names) if MARK in name]
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
    return found
