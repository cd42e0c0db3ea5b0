"""The pack's own socket types and the widgets made from settings dataclasses: default, bounds and help stand once."""

import dataclasses

from comfy_api.latest import io

CATEGORY = "training/SuDe"
SubjectSocket = io.Custom("SUDE_SUBJECT")
OptionsSocket = io.Custom("SUDE_OPTIONS")


def expect(value, kind: type, name: str, source: str) -> None:
    """Raises ValueError for a plain value where a socket's own type belongs, which ComfyUI's API lets through."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} is a {type(value).__name__}: connect {source}.")


def widget(spec: dataclasses.Field, **extra):
    """The input widget of one settings field."""
    help, default = spec.metadata["help"], spec.default
    shared = {"default": default, "tooltip": help, **extra}
    if "options" in spec.metadata:
        return io.Combo.Input(spec.name, options=list(spec.metadata["options"]), **shared)
    if isinstance(default, bool):
        return io.Boolean.Input(spec.name, **shared)
    if isinstance(default, str):
        return io.String.Input(spec.name, multiline=spec.metadata.get("multiline", False), **shared)
    bounds = {"min": spec.metadata["low"], "max": spec.metadata["high"], "step": spec.metadata["step"]}
    if isinstance(default, int):
        return io.Int.Input(spec.name, **shared, **bounds)
    # without an explicit step and rounding the frontend rounds learning rates to zero
    return io.Float.Input(spec.name, **shared, **bounds, round=1e-9)


def widgets(settings: type, names: tuple[str, ...] | None = None, **extra) -> list:
    """Widgets of a settings dataclass, all of its fields or the named ones in that order."""
    fields = {spec.name: spec for spec in dataclasses.fields(settings)}
    return [widget(fields[name], **extra) for name in names or fields]
