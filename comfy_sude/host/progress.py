"""What the person at the node sees while it works, and their wish to stop."""

import logging
import threading
import time

import comfy.model_management
import comfy.utils

from ..watch import Watched
from .live import Live

TEXT_INTERVAL = 0.5  # seconds between two text lines
LOG_INTERVAL = 15.0  # seconds between two log lines
SILENCE = 1.0  # seconds after which the text is sent again, so that nobody takes a slow step for the end


_running: dict[str, "Progress"] = {}  # trainings by node


def finish_early(node_id: str) -> bool:
    """Let the training of a node end after its next step and go on with what there is; whether there is one.

    Args:
        node_id: of the node in its own graph; inside subgraphs the executor's id ends with it ("12:5").
    """
    found = [report for name, report in list(_running.items()) if name == node_id or name.endswith(f":{node_id}")]
    for report in found:
        report.enough = True
    return bool(found)


class Progress:
    """Progress bar, text line on the node and log of a training's phases.

    Every `step` also asks whether the person pressed stop, and raises ComfyUI's InterruptProcessingException then. In a
    `with` statement the text is also repeated while one step or a phase without steps takes long.

    Args:
        node_id: the node; None where there is none to show anything.
        training: what is trained, if this is a training: it has a panel (`host.live`) and may be ended by
            `finish_early`, which sets `enough`.
        workflow: the identifier of the workflow the page has open, if it was queued from there.
    """

    def __init__(self, node_id: str | None = None, training: str = "", workflow: str | None = None):
        self.node_id, self.training, self.workflow = node_id, training, workflow
        self.enough = False
        self._notice = self._part = ""
        self._send_text = self._live = None
        if node_id is not None:
            from server import PromptServer  # only there in a running server

            server = getattr(PromptServer, "instance", None)
            self._send_text = server.send_progress_text if server else None
        self._ended = threading.Event()
        self.phase("starting", 1)

    def __enter__(self) -> "Progress":
        if self.node_id is not None and self.training:
            _running[self.node_id] = self
        if self._send_text is not None:
            if self.training:
                self._live = Live(self.node_id, self.training, self.workflow)
                self._show(self._began, now=True)
            threading.Thread(target=self._repeat, name="SuDe progress", daemon=True).start()
        return self

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: object) -> None:
        self._ended.set()
        if _running.get(self.node_id) is self:
            del _running[self.node_id]
        if self._live is not None:
            self._live.end(error)

    def begin(self, training: str, part: int, parts: int) -> None:
        """Begin one of several trainings, whose panel then starts anew and which is ended early by itself."""
        self.enough, self._part = False, f"{part} of {parts}, "
        if self._live is not None:
            self._live.title, self._live.part, self._live.watched = training, (part, parts), None

    def follow(self, watched: Watched) -> None:
        """Show this training's curves from now on."""
        if self._live is not None:
            self._live.watched = watched

    def notice(self, text: str) -> None:
        """Something the person should know from now on; it stays on the node, a later notice replaces it."""
        logging.warning("SuDe: %s", text)
        self._notice = text

    def _repeat(self) -> None:
        while not self._ended.wait(SILENCE / 3):
            now = time.monotonic()
            if now - self._texted >= SILENCE:
                self._texted = now
                self._send_text(self._text(self._done, self._line, now), self.node_id)
                self._show(now)

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Begin a phase of `total` steps, of which some may be done already."""
        self.name, self.total = name, total
        self._began = time.monotonic()
        self._texted = self._logged = 0.0
        self._first, self._done, self._line = done, done, ""
        self._bar = comfy.utils.ProgressBar(total, node_id=self.node_id)
        self._show(self._began, now=True)
        self.step(done, "")

    def step(self, done: int, line: str) -> None:
        """Report that `done` of the phase's steps are done, with what there is to say about it."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._done, self._line = done, line
        self._bar.update_absolute(done, self.total)
        now = time.monotonic()
        last = done >= self.total
        self._show(now, last)
        if now - self._texted < TEXT_INTERVAL and not last:
            return
        self._texted = now
        text = self._text(done, line, now)
        if self._send_text is not None:
            self._send_text(text, self.node_id)
        if now - self._logged >= LOG_INTERVAL or last:
            self._logged = now
            logging.info("SuDe: %s", text)

    def end(self, line: str) -> None:
        """Say what came of it all."""
        self.close("done", line)

    def close(self, name: str, line: str = "") -> None:
        """A last phase, in which what was paid for is put away: an interrupt that comes now is too late."""
        self.name, self.total, self._first, self._done, self._line = name, 1, 1, 1, line
        self._bar.update_absolute(1, 1)
        self._show(time.monotonic(), now=True)
        text = self._text(1, line, time.monotonic())
        if self._send_text is not None:
            self._send_text(text, self.node_id)
        logging.info("SuDe: %s", text)

    def _show(self, moment: float, now: bool = False) -> None:
        """Let the panel know, if there is one."""
        if self._live is not None:
            rate, left = self._speed(moment)
            phase = {"phase": self.name, "done": self._done, "total": self.total, "line": self._line}
            self._live.update({**phase, "notice": self._notice, "rate": rate, "left": left}, now)

    def _speed(self, moment: float) -> tuple[float | None, float | None]:
        """Steps a second in this phase, and the seconds it still takes; None where nothing is known yet."""
        done, took = self._done - self._first, moment - self._began
        if done <= 0 or self._done >= self.total or took <= 0:
            return None, None
        return float(f"{done / took:.3g}"), round(took / done * (self.total - self._done), 1)

    def _text(self, done: int, line: str, now: float) -> str:
        parts = [self._part + (self.name if self.total <= 1 else f"{self.name} {done}/{self.total}")]
        if line:
            parts.append(line)
        _, left = self._speed(now)
        if left is not None:
            parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        if self._notice:
            parts.append(f"note: {self._notice}")
        return " · ".join(parts)
