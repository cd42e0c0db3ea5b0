"""Thin V3 nodes: read inputs, call one function, wrap the result. Node ids and socket orders are append-only."""

from comfy_api.latest import ComfyExtension, io

from . import routes
from .export_subject import SuDeExportSubject
from .fine_tune import SuDeFineTune
from .options import SuDeTrainingOptions
from .prompt import SuDePrompt
from .store import SuDeStore
from .subjects import SuDeApplySubject, SuDeLoadSubject, SuDeSaveSubject


class SuDeExtension(ComfyExtension):
    """The pack's nodes and its route."""

    async def on_load(self) -> None:
        """Add the route."""
        routes.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes, in the order of a workflow."""
        return [
            SuDeFineTune,
            SuDeTrainingOptions,
            SuDePrompt,
            SuDeSaveSubject,
            SuDeLoadSubject,
            SuDeApplySubject,
            SuDeExportSubject,
            SuDeStore,
        ]
