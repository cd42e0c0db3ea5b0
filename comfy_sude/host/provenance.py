"""Where a Subject comes from: the metadata that goes with it wherever it is copied."""

import base64
import io
from datetime import datetime, timezone

import torch
from torch import Tensor

from .. import __version__, store
from ..baselines import Baseline
from ..data import to_pil, to_square
from ..log import Log
from ..subject import FORMAT
from .model import check_supported, checkpoint_name, family

THUMBNAIL = 128  # px, the side of the example's picture in the metadata


def facts(model, unet_hash: str, pictures: Tensor, side: int, fit: str) -> dict:
    """What is known before training.

    Args:
        model: ComfyUI MODEL.
        unet_hash: of its weights.
        pictures: [N, H, W, 3] the example, in [0, 1].
        side: px, trained at.
        fit: how pictures become square.
    """
    base = {"checkpoint": checkpoint_name(model), "sha256": unet_hash, "family": family(model)}
    return {
        "example": {"sha256": store.tensor_hash([("image", pictures)]), "thumbnail": thumbnail(pictures[:1], fit)},
        "base": {**base, "prediction": check_supported(model).prediction},
        "resolution": side,
    }


def metadata(baseline: Baseline, log: Log, known: dict) -> dict:
    """A trained Subject's metadata from its baseline, its log and `facts`."""
    recipe = baseline.recipe
    values = recipe.as_dict()
    values["baseline"]["steps"] = log.steps  # fewer than asked for if the person had enough
    return {
        "format": FORMAT,
        "category": recipe.category,
        "identifier": recipe.baseline.identifier,
        "subject": baseline.words(recipe),
        "captions": [list(pair) for pair in baseline.all_captions(recipe)],
        "method": recipe.method,
        "recipe": values,
        "steps": log.steps,
        "losses": {term: log.recent(term) for term in log.values},
        **known,
        "versions": {"sude": __version__, "comfyui": comfyui_version(), "torch": torch.__version__},
        "trained": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **baseline.notes(),
    }


def thumbnail(picture: Tensor, fit: str) -> str:
    """[1, H, W, 3] as a small JPEG in a data URI."""
    file = io.BytesIO()
    to_pil(to_square(picture, THUMBNAIL, fit)[0]).save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def comfyui_version() -> str:
    """ComfyUI's version, "" if it does not say."""
    try:
        from comfyui_version import __version__ as version
    except ImportError:
        return ""
    return version
