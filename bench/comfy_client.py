"""A small client of ComfyUI's HTTP and websocket API: queue a workflow, follow it live, fetch what it made.

client = ComfyClient("http://127.0.0.1:8188")
result = client.submit(workflow, on_event=print)
picture = client.view(result.images("9")[0])
"""

import http.client
import json
import struct
import time
import urllib.parse
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import websocket

PREVIEW, TEXT, PREVIEW_WITH_METADATA = 1, 3, 4  # the kinds of binary websocket frames that matter here
SILENCE_SECONDS = 600  # a workflow that says nothing for so long counts as dead


@dataclass(frozen=True)
class Failure:
    """Why a workflow did not finish.

    Attributes:
        kind: "rejected" (by validation, before anything ran), "failed" (a node raised) or "interrupted".
        message: what ComfyUI says about it.
        node: the identifier of the node, if it is about one.
        details: the server's answer or event, whole.
    """

    kind: str
    message: str
    node: str | None
    details: dict[str, Any]


@dataclass
class Result:
    """What one run of a workflow did.

    Attributes:
        prompt_id: the server's name for this run; empty if it was rejected.
        ran: the nodes that were executed, in order.
        cached: the nodes whose earlier result was used again.
        progress: (node, value, maximum) of every step of a progress bar.
        texts: (node, text) of every progress text.
        previews: how many preview pictures arrived.
        events: every other event, as (type, data).
        outputs: what the nodes showed, as in the history: {node: {"images": [...], ...}}.
        error: why it did not finish, or None.
        seconds: from queueing to the end.
    """

    prompt_id: str = ""
    ran: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    progress: list[tuple[str, float, float]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    previews: int = 0
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: Failure | None = None
    seconds: float = 0.0

    def images(self, node: str) -> list[dict[str, str]]:
        """The pictures that a node showed, each as the file name, subfolder and type that `view` takes."""
        return self.outputs.get(node, {}).get("images", [])


class ComfyClient:
    """One client of one server, with its own websocket.

    Args:
        address: the server, for example "http://127.0.0.1:8188".
    """

    def __init__(self, address: str) -> None:
        self.host = urllib.parse.urlsplit(address).netloc
        self.identifier = str(uuid.uuid4())
        self.known: dict[str, dict[str, Any]] = {}
        self.socket = websocket.create_connection(
            f"ws://{self.host}/ws?clientId={self.identifier}", timeout=SILENCE_SECONDS, enable_multithread=True
        )
        self.socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))

    def __enter__(self) -> "ComfyClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    # --- Requests ---

    def request(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[int, bytes]:
        """Send one HTTP request and return the status and the body of the answer."""
        connection = http.client.HTTPConnection(self.host, timeout=120)
        try:
            connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """The JSON at a path of the server."""
        status, body = self.request("GET", path)
        if status != 200:
            raise RuntimeError(f"GET {path}: the server answered {status}: {body[:300]!r}")
        return json.loads(body)

    def post(self, path: str, data: dict[str, Any]) -> tuple[int, Any]:
        """Post JSON; return the status and the answer (None if it is empty or no JSON)."""
        status, body = self.request("POST", path, json.dumps(data).encode())
        try:
            return status, json.loads(body)
        except ValueError:
            return status, None

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """What the server knows about all nodes, or about one."""
        return self.get(f"/object_info/{node}" if node else "/object_info")

    def node(self, class_type: str, inputs: Mapping[str, Any] | None = None, title: str = "") -> dict[str, Any]:
        """A node for a workflow in API format: the given inputs, and the default of every other required widget.

        Args:
            class_type: the node's identifier, for example "KSampler".
            inputs: values and links; a dynamic combo's own inputs are named "combo.input".
            title: the node's title, if it should have one.
        """
        if class_type not in self.known:
            self.known[class_type] = self.object_info(class_type)[class_type]
        inputs = dict(inputs or {})
        node = {"class_type": class_type, "inputs": {**defaults(self.known[class_type]["input"], inputs), **inputs}}
        return {**node, "_meta": {"title": title}} if title else node

    def history(self, prompt_id: str) -> dict[str, Any]:
        """What the server remembers of a run; empty if it remembers nothing."""
        return self.get(f"/history/{prompt_id}").get(prompt_id, {})

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stop the run, or whatever is running."""
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self) -> None:
        """Let the server forget cached results and unload its models."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def view(self, image: dict[str, str]) -> bytes:
        """The file that an output points at."""
        query = {key: image.get(key, "") for key in ("filename", "subfolder", "type")}
        status, body = self.request("GET", "/view?" + urllib.parse.urlencode(query))
        if status != 200:
            raise RuntimeError(f"The server has no file {image}")
        return body

    def upload_image(self, name: str, data: bytes) -> str:
        """Put a picture into the server's input folder and return the name to give to LoadImage."""
        boundary = uuid.uuid4().hex
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: image/png\r\n\r\n".encode(),
            data,
            f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'
            f"--{boundary}--\r\n".encode(),
        ]
        kind = f"multipart/form-data; boundary={boundary}"
        status, body = self.request("POST", "/upload/image", b"".join(parts), kind)
        if status != 200:
            raise RuntimeError(f"The server did not take the picture {name}: {body[:300]!r}")
        answer = json.loads(body)
        return f"{answer['subfolder']}/{answer['name']}" if answer["subfolder"] else answer["name"]

    # --- Workflows ---

    def submit(
        self,
        workflow: dict[str, Any],
        *,
        extra_data: dict[str, Any] | None = None,
        on_event: Callable[[str, str, dict[str, Any]], None] | None = None,
    ) -> Result:
        """Queue a workflow in API format and follow it until it ends.

        Args:
            workflow: the nodes, by identifier.
            extra_data: for example {"extra_pnginfo": {"workflow": ...}}.
            on_event: called with (prompt_id, type, data) for every event while it runs; "text" and "preview" included.
        """
        start = time.monotonic()
        body = {"prompt": workflow, "client_id": self.identifier}
        status, answer = self.post("/prompt", {**body, "extra_data": extra_data} if extra_data else body)
        if status != 200:
            return Result(error=rejection(answer or {}), seconds=time.monotonic() - start)
        result = Result(prompt_id=answer["prompt_id"])
        if answer.get("node_errors"):  # an output that cannot run was dropped, and the rest runs
            result.events.append(("node_errors", answer["node_errors"]))
        self.follow(result, on_event or (lambda *_: None))
        result.outputs = self.history(result.prompt_id).get("outputs", {})
        result.seconds = time.monotonic() - start
        return result

    def follow(self, result: Result, on_event: Callable[[str, str, dict[str, Any]], None]) -> None:
        """Read events until the run ends, and file them in the result."""
        while True:
            frame = self.socket.recv()
            if not frame:
                raise RuntimeError("The server hung up while the workflow ran; its log says why.")
            kind, data = binary_event(frame) if isinstance(frame, bytes) else json_event(frame)
            if kind in ("status", "feature_flags") or data.get("prompt_id") not in (None, result.prompt_id):
                continue
            if kind == "executing" and data["node"] is None:
                return
            self.file(result, kind, data)
            on_event(result.prompt_id, kind, data)

    @staticmethod
    def file(result: Result, kind: str, data: dict[str, Any]) -> None:
        """Put one event where it belongs in the result."""
        if kind == "executing":
            result.ran.append(data["node"])
        elif kind == "execution_cached":
            result.cached = list(data["nodes"])
        elif kind == "progress":
            result.progress.append((data["node"], data["value"], data["max"]))
        elif kind == "text":
            result.texts.append((data["node"], data["text"]))
        elif kind == "preview":
            result.previews += 1
        elif kind == "execution_error":
            result.error = Failure("failed", data["exception_message"].strip(), data["node_id"], data)
        elif kind == "execution_interrupted":
            result.error = Failure("interrupted", "The workflow was interrupted.", data.get("node_id"), data)
        else:
            result.events.append((kind, data))


def defaults(spec: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The default of every required widget in a node's (or dynamic combo option's) inputs that is not given."""
    values = {}
    for name, (kind, *settings) in spec.get("required", {}).items():
        name, settings = prefix + name, settings[0] if settings else {}
        options = kind if isinstance(kind, list) else settings.get("options")
        dynamic = bool(options) and isinstance(options[0], dict)
        if name not in given:
            if "default" in settings:
                values[name] = settings["default"]
            elif options:
                values[name] = options[0]["key"] if dynamic else options[0]
        chosen = {**values, **given}.get(name)
        for option in options if dynamic else []:
            if option["key"] == chosen:
                values.update(defaults(option["inputs"], given, f"{name}."))
    return values


def json_event(frame: str) -> tuple[str, dict[str, Any]]:
    """The type and data of a websocket text frame."""
    event = json.loads(frame)
    data = event.get("data")
    return event["type"], data if isinstance(data, dict) else {"value": data}


def binary_event(frame: bytes) -> tuple[str, dict[str, Any]]:
    """The type and data of a websocket binary frame."""
    kind = struct.unpack(">I", frame[:4])[0]
    if kind == TEXT:
        length = struct.unpack(">I", frame[4:8])[0]
        return "text", {"node": frame[8 : 8 + length].decode(), "text": frame[8 + length :].decode()}
    return "preview" if kind in (PREVIEW, PREVIEW_WITH_METADATA) else f"binary {kind}", {"bytes": len(frame)}


def rejection(answer: dict[str, Any]) -> Failure:
    """The reason why a workflow was not accepted: what is said about a node, before what is said about all."""
    for node, errors in answer.get("node_errors", {}).items():
        for error in errors.get("errors", []):
            return Failure("rejected", f"{error['message']}: {error['details']}".rstrip(": "), node, answer)
    error = answer.get("error", {})
    message = error.get("message", "no reason given") if isinstance(error, dict) else str(error)
    return Failure("rejected", message, None, answer)
