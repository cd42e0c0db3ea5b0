"""SuDe Store: what the pack keeps on disk."""

import time

from comfy_api.latest import io

from ..host import folders
from ..host.progress import Progress
from ..store import GIGABYTE
from .sockets import CATEGORY

WHAT = {
    "subject": "finished trainings",
    "state": "states to train on from",
    "class_images": "class images",
    "text": "text encodings",
}


class SuDeStore(io.ComfyNode):
    """Report on the store."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and help of the node."""
        return io.Schema(
            node_id="SuDeStore",
            display_name="SuDe Store",
            category=CATEGORY,
            description="Says what SuDe keeps in ComfyUI's user folder (user/sude): finished trainings, states of "
            "unfinished ones, class images. Delete there what you like: it would only be computed again.",
            search_aliases=["cache", "disk"],
            is_output_node=True,
            not_idempotent=True,
            inputs=[],
            outputs=[
                io.String.Output(display_name="report", tooltip="One line a kind: how many files, how large."),
                io.Float.Output(display_name="gigabytes", tooltip="All of it, in gigabytes (10^9 bytes)."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls) -> float:
        """Always looked at anew."""
        return time.time()

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Count the entries."""
        store = folders.store(0)
        entries = store.entries()
        lines = []
        for kind, name in WHAT.items():
            sizes = [entry.bytes for entry in entries if entry.kind == kind]
            lines.append(f"{len(sizes)} {name}: {sum(sizes) / GIGABYTE:.2f} GB")
        total = sum(entry.bytes for entry in entries) / GIGABYTE
        with Progress(cls.hidden.unique_id) as report:
            report.end(", ".join(lines))
        return io.NodeOutput("\n".join([*lines, f"in {store.folder}"]), total)
