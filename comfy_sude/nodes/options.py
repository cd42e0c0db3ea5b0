"""SuDe Training Options: how to train, whatever the baseline."""

import comfy.samplers
from comfy_api.latest import io

from ..recipe import Keeping, Options, Prior, Watching, check_values
from .sockets import CATEGORY, OptionsSocket, widgets

BEFORE_PRIOR = ("precision", "resolution", "batch_size", "optimizer", "gradient_checkpointing")
AFTER_PRIOR = (
    "truncation", "t0", "reference", "flip", "fit", "sample_latent", "weight_decay", "max_grad_norm",
)  # fmt: skip


class SuDeTrainingOptions(io.ComfyNode):
    """The recipe's options as widgets."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and help of the node."""
        help = {name: spec.metadata.get("help") for name, spec in Prior.__dataclass_fields__.items()}
        priors = [
            io.DynamicCombo.Option("preset", []),
            io.DynamicCombo.Option(
                "class images",
                [
                    *widgets(Prior, ("w_r", "number", "steps", "cfg", "negative_prompt")),
                    *(
                        io.Combo.Input(name, options=names, default=getattr(Prior, name), tooltip=help[name])
                        for name, names in (
                            ("sampler", comfy.samplers.SAMPLER_NAMES),
                            ("scheduler", comfy.samplers.SCHEDULER_NAMES),
                        )
                    ),
                    *widgets(Prior, ("image_seed",)),
                ],
            ),
            io.DynamicCombo.Option("distillation", widgets(Prior, ("w_r",))),
            io.DynamicCombo.Option("off", []),
        ]
        return io.Schema(
            node_id="SuDeTrainingOptions",
            display_name="SuDe Training Options",
            category=CATEGORY,
            description="How SuDe Fine-Tune trains. Everything has the published preset; change what your GPU "
            "or picture needs.",
            inputs=[
                *widgets(Options, BEFORE_PRIOR),
                io.DynamicCombo.Input("prior", options=priors, tooltip=f"Prior preservation. {help['kind']}"),
                *widgets(Options, AFTER_PRIOR),
                *widgets(Keeping, optional=True),
                *widgets(Watching, optional=True),
            ],
            outputs=[OptionsSocket.Output(display_name="OPTIONS", tooltip="For SuDe Fine-Tune's options input.")],
        )

    @classmethod
    def execute(cls, prior=None, **values) -> io.NodeOutput:
        """Wrap the values; ValueError for an unknown or missing prior, or values out of bounds."""
        settings = dict(prior or {})
        kind = settings.pop("prior", None)
        if kind is None:
            raise ValueError("prior: no known prior is chosen. Choose one of: preset, class images, distillation, off.")
        keeping, watching = (
            part(**{name: values.pop(name) for name in part.__dataclass_fields__ if name in values})
            for part in (Keeping, Watching)
        )
        options = Options(prior=Prior(kind=kind, **settings), keeping=keeping, watching=watching, **values)
        for part in options.parts:
            check_values(part)
        return io.NodeOutput(options)
