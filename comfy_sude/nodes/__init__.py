"""Thin V3 nodes: read inputs, call one function, wrap the result. Node ids and socket orders are append-only."""

from comfy_api.latest import ComfyExtension, io

from ..host import folders
from . import routes
from .export_subject import SuDeExportSubject
from .fine_tune import SuDeFineTune
from .grid import SuDeGrid
from .options import SuDeTrainingOptions
from .prompt import SuDePrompt
from .score import SuDeScore
from .store import SuDeStore
from .subjects import SuDeApplySubject, SuDeLoadSubject, SuDeSaveSubject
from .sweep import SuDeSweep


class SuDeExtension(ComfyExtension):
    """The pack's nodes and its routes."""

    async def on_load(self) -> None:
        """Add the routes and the folder of the models that score."""
        routes.register()
        folders.register()

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
            SuDeSweep,
            SuDeGrid,
            SuDeScore,
        ]
