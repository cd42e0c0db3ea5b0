"""ComfyUI-SuDe: one photograph is enough. Entry point of the pack."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The extension, as ComfyUI asks for it."""
    from .comfy_sude.nodes import SuDeExtension

    return SuDeExtension()
