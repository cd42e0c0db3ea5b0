"""ComfyUI in this process, on small checkpoints made on the fly; every test in inference mode, like the executor."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.comfy_server import comfyui_folder


def import_comfyui(folder: Path) -> None:
    """Import ComfyUI for the CPU, as its own unit tests do; before collection, since the host rooms import it."""
    sys.path.append(str(folder))  # behind the repository: ComfyUI has a package named tests too
    arguments, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.sd  # noqa: F401 parses the arguments
    finally:
        sys.argv = arguments


if (comfyui_folder() / "main.py").is_file():
    import_comfyui(comfyui_folder())
else:  # the report's header says that there is no ComfyUI
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def inference_mode() -> Iterator[None]:
    """What the executor wraps every node in; without it the worst bugs stay hidden."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory):
    """Loads a small checkpoint, fresh at every call: (MODEL, CLIP, VAE)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    te_options = {"clip_l_model_config": {"num_hidden_layers": 2}}

    def make(variant: str = "small", **options):
        import comfy.sd

        from tests.tiny import write_tiny_checkpoint

        path = folder / f"{variant}-{'-'.join(map(str, options.values()))}.safetensors"
        if not path.exists():
            write_tiny_checkpoint(path, variant, clip_layers=2, **options)
        with torch.inference_mode():
            return comfy.sd.load_checkpoint_guess_config(
                str(path), output_vae=True, output_clip=True, te_model_options=te_options
            )[:3]

    return make


@pytest.fixture(scope="session")
def _shared(load):
    return load("small")


@pytest.fixture
def models(_shared):
    """MODEL, CLIP and VAE shared by the tests of a run, checked to be as they were after each test."""
    from .helpers import fingerprint

    before = fingerprint(*_shared)
    yield _shared
    assert fingerprint(*_shared) == before, "a MODEL, CLIP or VAE that was only lent has changed"


@pytest.fixture
def picture() -> torch.Tensor:
    """[1, 64, 64, 3] a smooth picture with some structure."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    return torch.stack([x, y, ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).float()], -1)[None]
