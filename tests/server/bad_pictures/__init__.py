"""A test-only node that makes IMAGEs no loader makes. Linked into a test server's custom_nodes, never shipped."""

import torch
from comfy_api.latest import ComfyExtension, io

MAKERS = {
    "empty": lambda: torch.zeros(0, 64, 64, 3),
    "nan": lambda: torch.full((1, 64, 64, 3), float("nan")),
    "infinite": lambda: torch.full((1, 64, 64, 3), float("inf")),
    "two channels": lambda: torch.zeros(1, 64, 64, 2),
    "latent": lambda: {"samples": torch.zeros(1, 4, 8, 8)},
    "no batch": lambda: torch.zeros(64, 64, 3),
}


class BadPicture(io.ComfyNode):
    """One kind of unusable picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """One combo in, one IMAGE out."""
        return io.Schema(
            node_id="BadPicture",
            category="testing",
            inputs=[io.Combo.Input("kind", options=list(MAKERS))],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, kind: str) -> io.NodeOutput:
        """The picture."""
        return io.NodeOutput(MAKERS[kind]())


class BadPictures(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Its node."""
        return [BadPicture]


async def comfy_entrypoint() -> BadPictures:
    """What ComfyUI asks a pack for."""
    return BadPictures()
