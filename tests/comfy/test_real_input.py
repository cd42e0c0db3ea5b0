"""Real photographs (DreamBench) through the real SD autoencoder (TAESD) and the node; skipped where they are not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from comfy_sude import data
from comfy_sude.host import images
from comfy_sude.host.apply import apply_subject

from .helpers import Silent, recipe, sample, train

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PHOTOGRAPHS = sorted((DATA / "dreambench").glob("*/00.jpg"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PHOTOGRAPHS, reason="no DreamBench photographs beside the project"),
]


def photograph(path: Path) -> torch.Tensor:
    """[1, H, W, 3] as ComfyUI's Load Image gives it."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    return torch.from_numpy(np.array(image).astype(np.float32) / 255)[None]


@pytest.fixture(scope="module")
def taesd():
    """The real TAESD, put together as ComfyUI's Load VAE does."""
    import comfy.sd
    from safetensors.torch import load_file

    state = {"vae_scale": torch.tensor(0.18215), "vae_shift": torch.tensor(0.0)}
    for part in ("encoder", "decoder"):
        weights = load_file(DATA / "taesd" / f"taesd_{part}.safetensors")
        state |= {f"taesd_{part}.{name}": weight for name, weight in weights.items()}
    with torch.inference_mode():
        return comfy.sd.VAE(sd=state)


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.parent.name)
def test_photograph_survives_the_way_to_latents_of_the_models_scale(taesd, models, path):
    pixels = data.to_square(data.check_images(photograph(path)), 256)
    latent_format = models[0].get_model_object("latent_format")
    latents = images.encode(taesd, latent_format, pixels, Silent(), "encoding")
    assert latents.mean.shape == (1, 2, 4, 32, 32) and latents.std is None
    assert 0.4 < latents.mean.std() < 2.0, "not the scale the UNet was trained on"
    for mirrored in (0, 1):
        decoded = taesd.decode(latent_format.process_out(latents.mean[:, mirrored])).clamp(0, 1)
        expected = pixels.flip(2) if mirrored else pixels
        psnr = -10 * (decoded.cpu() - expected).square().mean().log10()
        # TAESD's own limit at this size: 19.6 dB on the busiest of the ten photographs
        assert psnr > 18, "the autoencoder does not give the photograph back"


@pytest.mark.parametrize("name", ["dog", "teapot"])
def test_photograph_trains_and_samples(taesd, models, tmp_path, name):
    (path,) = (path for path in PHOTOGRAPHS if path.parent.name == name)
    model, clip, _ = models
    report = Silent()
    made = recipe(category=name, resolution=128, steps=2)
    subject = train((model, clip, taesd), photograph(path), tmp_path, made, report)
    assert subject.metadata["resolution"] == 128 and subject.log.steps == 2
    assert all(np.isfinite(subject.log.values[term]).all() for term in subject.log.values)
    assert torch.isfinite(sample(*apply_subject(model, clip, subject), subject.prompt("golden"))).all()
