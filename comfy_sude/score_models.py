"""The models that score pictures: where their files lie, how they want pictures and texts, and their embeddings.

Nothing is downloaded and no pickle is read: weights are safetensors files in a folder or in the hub's local cache.
Preprocessing is written out here (Pillow on 8-bit pixels, as the models' own code did it): transformers' processors
change their resizing from version to version, and that of facebook/dino-vits16 is not the one DINO-I uses.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import cached_file

from .data import to_pil

CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"
DINOV2, BLIP = "facebook/dinov2-base", "Salesforce/blip-itm-base-coco"
USED_BY = {"CLIP-I": CLIP, "DINO-I": DINO, "DINOv2-I": DINOV2, "CLIP-T": CLIP, "BLIP-T": BLIP}  # metric -> model
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
BATCH = 16  # pictures or texts at a time
SQUASHED = 512  # px. Source: textual inversion's evaluator, whose data set does so (evaluation/clip_eval.py:7-59)
# Means and standard deviations of RGB in [0, 1]. Source: openai/CLIP clip.py, torchvision's ImageNet models
CLIP_COLORS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_COLORS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Kind:
    """How one model is used.

    Attributes:
        architecture: the class of transformers.
        side: px of the square it sees.
        shorter: px the shorter edge is resized to before the square is cut from the centre; None squashes.
        colors: mean and standard deviation of its pixels.
        tokens: that a text may have; None for a model without texts.
        options: for the architecture.
    """

    architecture: str
    side: int
    shorter: int | None
    colors: tuple[tuple[float, ...], tuple[float, ...]]
    tokens: int | None = None
    options: tuple[tuple[str, object], ...] = ()


KINDS = {
    CLIP: Kind("CLIPModel", 224, 224, CLIP_COLORS, tokens=77),  # Source: openai/CLIP clip.py
    # Source: released SuDe code, scripts/evaluate_model.py:86-126 (resize 256 bicubic, centre crop 224)
    DINO: Kind("ViTModel", 224, 256, IMAGENET_COLORS, options=(("add_pooling_layer", False),)),
    # Source: the repository's preprocessor_config.json (shortest edge 256, crop 224, bicubic)
    DINOV2: Kind("Dinov2Model", 224, 256, IMAGENET_COLORS),
    # Source: salesforce/BLIP, models/blip_itm.py (384 x 384 squashed, 35 tokens, cosine of the two projections)
    BLIP: Kind("BlipForImageTextRetrieval", 384, None, CLIP_COLORS, tokens=35),
}


class MissingModel(ValueError):
    """A model's files are not on this machine."""


def no_report(done: int, total: int, line: str) -> None:
    """Says nothing of the progress."""


class Models:
    """The scoring models, loaded when first used and kept until `free`.

    Args:
        folders: where models lie, as `<organisation>/<name>/` or as the hub's cache lays them out
            (`models--<organisation>--<name>`). The hub's own cache on this machine is searched last.
        device: to compute on, in fp32.
        report: called with (done, total, line) before each load and batch; may raise to stop.
    """

    def __init__(
        self,
        folders: Iterable[str | Path] = (),
        device: str | torch.device = "cpu",
        report: Callable[[int, int, str], None] = no_report,
    ):
        self.folders = [Path(folder) for folder in folders]
        self.device, self.report = torch.device(device), report
        self._loaded: dict[str, tuple[nn.Module, object]] = {}

    def missing(self, metrics: Iterable[str]) -> list[str]:
        """Hub ids of the models that metrics use and whose weights are not here as safetensors."""
        return [name for name in dict.fromkeys(USED_BY[metric] for metric in metrics) if self._folder(name) is None]

    def check(self, metrics: Iterable[str]) -> None:
        """Raises MissingModel, which says for every model that is not here what to download and where to put it."""
        lacking = self.missing(metrics)
        if not lacking:
            return
        said = []
        for name in lacking:
            pickled = any(self._find(name, file) for file in PICKLES)
            reason = " (there is only a pickle of it, which could run any program and is not read)" if pickled else ""
            place = self.folders[0] / name if self.folders else "the hub's cache"
            said.append(f"{name}{reason} into {place}")
        raise MissingModel(
            f"models that score are not on this machine, and nothing is downloaded: get {'; '.join(said)}. Each needs "
            "its config.json, model.safetensors and tokenizer files from huggingface.co; the node's help page says how."
        )

    def free(self) -> None:
        """Let go of every model and of the device memory they took."""
        self._loaded.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def images(self, name: str, pictures: Sequence[Tensor] | Tensor, squash: int = 0) -> Tensor:
        """[N, D] unit embeddings of pictures on the CPU.

        Args:
            name: the model's hub id.
            pictures: N of [H, W, 3] in [0, 1].
            squash: px; resize to this square first, whatever the proportions. 0 leaves them.
        """
        model, _ = self._load(name)
        found = []
        for part in self._batches(name, pictures):
            pixels = torch.stack([prepare(picture, KINDS[name], squash) for picture in part])
            output = _image_output(model, pixels.to(self.device))
            found.append(F.normalize(output.float(), dim=-1).cpu())
        return torch.cat(found)

    def texts(self, name: str, texts: Sequence[str]) -> Tensor:
        """[N, D] unit embeddings of texts on the CPU; what is longer than the model reads is cut off."""
        model, tokenizer = self._load(name)
        found = []
        for part in self._batches(name, texts):
            tokens = tokenizer(
                list(part), padding=True, truncation=True, max_length=KINDS[name].tokens, return_tensors="pt"
            ).to(self.device)
            output = _text_output(model, tokens["input_ids"], tokens["attention_mask"])
            found.append(F.normalize(output.float(), dim=-1).cpu())
        return torch.cat(found)

    def _batches(self, name: str, items: Sequence) -> Iterator[Sequence]:
        for start in range(0, len(items), BATCH):
            self.report(start, len(items), name)
            yield items[start : start + BATCH]

    def _load(self, name: str) -> tuple[nn.Module, object]:
        """The model and its tokenizer (None without texts). Raises MissingModel, or ValueError for unfit files."""
        if name not in self._loaded:
            self.check([metric for metric, used in USED_BY.items() if used == name])
            self.report(0, 1, f"loading {name}")
            folder, kind = self._folder(name), KINDS[name]
            local = {"local_files_only": True, "trust_remote_code": False}
            try:
                model, found = getattr(transformers, kind.architecture).from_pretrained(
                    folder, use_safetensors=True, output_loading_info=True, **local, **dict(kind.options)
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local) if kind.tokens else None
            except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
                raise ValueError(f"{name} in {folder} cannot be loaded ({error}): download it again.") from error
            lacking = [key for key in found["missing_keys"] if not key.endswith("position_ids")]
            if lacking:  # transformers would go on with random numbers
                raise ValueError(
                    f"{folder} lacks {len(lacking)} weights of {name}, for example {sorted(lacking)[0]}: download it "
                    "again."
                )
            self._loaded[name] = model.float().eval().requires_grad_(False).to(self.device), tokenizer
        return self._loaded[name]

    def _folder(self, name: str) -> Path | None:
        """Where a model's configuration and safetensors weights lie."""
        for file in WEIGHTS:
            for weights in self._find(name, file):
                if (weights.parent / "config.json").is_file():
                    return weights.parent
        return None

    def _find(self, name: str, file: str) -> list[Path]:
        """A model's file in every place that has it."""
        found = [folder / name / file for folder in self.folders]
        for folder in [*self.folders, None]:  # None: the hub's own cache
            cached = cached_file(
                name,
                file,
                cache_dir=folder,
                local_files_only=True,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            found += [Path(cached)] if cached else []
        return [path for path in found if path.is_file()]


def prepare(picture: Tensor, kind: Kind, squash: int = 0) -> Tensor:
    """[3, side, side] a picture [H, W, 3] in [0, 1] as a model wants it: bicubic with antialiasing on 8-bit pixels."""
    image, side = to_pil(picture), kind.side
    if squash:
        image = image.resize((squash, squash), Image.Resampling.BICUBIC)
    if kind.shorter is None:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    else:
        least = min(image.size)
        width, height = (int(kind.shorter * length / least) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - side) / 2), round((height - side) / 2)
        image = image.crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in kind.colors)
    return (pixels - mean) / std


@torch.inference_mode()
def _image_output(model: nn.Module, pixels: Tensor) -> Tensor:
    """[B, D] before normalization: the projection of CLIP and BLIP, the last CLS token of the others."""
    if hasattr(model, "visual_projection"):
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    if hasattr(model, "vision_proj"):
        return model.vision_proj(model.vision_model(pixel_values=pixels).last_hidden_state[:, 0])
    return model(pixel_values=pixels).last_hidden_state[:, 0]


@torch.inference_mode()
def _text_output(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, D] before normalization."""
    if hasattr(model, "text_projection"):
        return model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output)
    return model.text_proj(model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])
