"""Trainings as the panels on their nodes see them: one snapshot of bounded size that says everything.

A snapshot goes out as the websocket event "sude.training", at most about twice a second, and can be asked for at any
time (`trainings`), so a page that was reloaded catches up.
"""

import itertools
import time
import uuid
from pathlib import Path

import comfy.model_management
import folder_paths
from torch import Tensor

from ..data import to_pil
from ..watch import Watched

EVENT = "sude.training"
INTERVAL = 0.5  # seconds between two snapshots
KEPT = 16  # trainings that are remembered after their end
FOLDER = "sude"  # of previews, below ComfyUI's temp
CURVES = ("l_sub", "l_sude", "gap", "gate", "l_prior")
LONGEST = 2000  # characters of an error

_numbers = itertools.count(1)
_known: dict[tuple, "Live"] = {}  # the last run of every training node


def trainings() -> list[dict]:
    """A snapshot of each training that runs, and of the last one of each node."""
    return [live.snapshot() for live in list(_known.values())]


class Live:
    """One run of a training node.

    Args:
        node_id: the executor's name of the node, "12:5" inside a subgraph.
        title: what is trained.
        workflow: the identifier of the workflow the page has open, if it was queued from there.
    """

    def __init__(self, node_id: str, title: str = "", workflow: str | None = None):
        from server import PromptServer  # only there in a running server

        self.id, self.node_id, self.title, self.workflow = uuid.uuid4().hex, node_id, title, workflow
        self.server = PromptServer.instance
        self.client, self.prompt = self.server.client_id, getattr(self.server, "last_prompt_id", None)
        self.part: tuple[int, int] | None = None
        self.watched: Watched | None = None
        self.state, self.error = "running", ""
        self.phase = {"phase": "", "done": 0, "total": 1, "line": "", "notice": "", "rate": None, "left": None}
        self._began, self._elapsed, self._sent = time.monotonic(), None, 0.0
        key = (self.client, workflow, node_id)
        _known.pop(key, None)
        _known[key] = self
        for old in [key for key, live in _known.items() if live.state != "running"][: max(0, len(_known) - KEPT)]:
            del _known[old]

    def update(self, phase: dict, now: bool = False) -> None:
        """Take what the progress says; send it if it is time or has to be `now`."""
        self.phase = phase
        moment = time.monotonic()
        if now or moment - self._sent >= INTERVAL:
            self._sent = moment
            self.send()

    def end(self, error: BaseException | None) -> None:
        """The node is done, was stopped or failed."""
        self._elapsed = time.monotonic() - self._began
        if error is None:
            self.state = "finished"
        elif isinstance(error, comfy.model_management.InterruptProcessingException):
            self.state = "stopped"
        else:
            self.state, self.error = "failed", str(error)[:LONGEST]
        self.send()

    def send(self) -> None:
        """Send a snapshot to whoever queued this."""
        if self.client is not None:
            self.server.send_sync(EVENT, self.snapshot(), self.client)

    def snapshot(self) -> dict:
        """Everything the panel shows, as JSON values."""
        watched, running = self.watched, self.state == "running"
        return {
            "id": self.id,
            "number": next(_numbers),
            "node": self.node_id,
            "client": self.client,
            "prompt": self.prompt,
            "workflow": self.workflow,
            "title": self.title,
            "part": list(self.part) if self.part else None,
            "state": self.state,
            **self.phase,
            "error": self.error,
            "elapsed": round(time.monotonic() - self._began if self._elapsed is None else self._elapsed, 1),
            "memory": memory() if running else None,
            "can_finish": running and self.phase["phase"] == "training",
            "w_s": watched.w_s if watched else None,
            "steps": watched.total if watched else None,
            "curves": curves(watched),
            "validation": [[step, _short(value)] for step, value in _some(watched.log.validation)] if watched else [],
            "previews": previews(watched) if watched else None,
        }


def curves(watched: Watched | None) -> dict:
    """The terms' curves; a term that is no part of this training has no points."""
    means = watched.curves.means() if watched else {}
    if watched and not watched.w_s:
        means = {term: means[term] for term in ("l_sub", "l_prior") if term in means}
    if not any(means.get("l_prior", ())):
        means = means | {"l_prior": []}
    shown = {term: [_short(value) for value in means.get(term, ())] for term in CURVES}
    return {"every": watched.curves.every if watched else 1, **shown}


def previews(watched: Watched) -> dict | None:
    """The rows of previews and what they cost."""
    drawn = watched.previews
    if drawn is None:
        return None
    asked = watched.watching
    return {
        "prompts": drawn.prompts,
        "every": asked.preview_every,
        "share": round(watched.share, 4),
        "limit": asked.preview_limit / 100,
        "note": drawn.note,
        "shots": [{"step": row.step, "pictures": row.pictures} for row in drawn.rows],
    }


def memory() -> list[int] | None:
    """Bytes of the GPU in use and in all; None without one."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cpu":
        return None
    total = comfy.model_management.get_total_memory(device)
    return [int(total - comfy.model_management.get_free_memory(device)), int(total)]


def save_previews(pixels: Tensor, name: str) -> list[dict]:
    """Write pictures [N, H, W, 3] in [0, 1] to ComfyUI's temp folder; how GET /view is asked for each.

    Raises:
        OSError: the disk is full.
    """
    folder = Path(folder_paths.get_temp_directory()) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for index, picture in enumerate(pixels):
        path = folder / f"{name}_{index}.jpg"
        to_pil(picture).save(path, quality=90)
        found.append({"filename": path.name, "subfolder": FOLDER, "type": "temp"})
    return found


def _short(value: float) -> float | None:
    """Four digits; None for what JSON cannot say."""
    return float(f"{value:.4g}") if value - value == 0 else None


def _some(pairs: list, most: int = 100) -> list:
    """At most so many pairs, the last among them."""
    step = -(-len(pairs) // most) or 1
    return pairs[::-1][::step][::-1]
