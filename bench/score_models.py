"""Small random models in place of those that score pictures (comfy_sude/score_models.py), for tests and smoke runs.

    python -m bench.score_models FOLDER [--seed 0]

They see pictures of the real models' sizes and read texts with vocabularies of their own, so that everything runs as
with the real ones; what they say means nothing.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from comfy_sude.score_models import BLIP, CLIP, DINO, DINOV2

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"


def build(folder: str | Path, seed: int = 0) -> Path:
    """Writes all four models below a folder, as `<organisation>/<name>/` in safetensors; returns the folder.

    Args:
        folder: made if it is not there; what is there is replaced.
        seed: of the random weights.
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, make in ((CLIP, clip), (DINO, dino), (DINOV2, dinov2), (BLIP, blip)):
            path = folder / name
            path.mkdir(parents=True, exist_ok=True)
            spread(make(path)).save_pretrained(path, safe_serialization=True)
    return folder


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough for different pictures to look different, the same ones for a seed on every machine."""
    for name, parameter in sorted(model.named_parameters()):
        parameter.data.copy_(torch.randn(parameter.shape) * 0.3 + ("norm" in name and name.endswith("weight")))
    return model


def clip(folder: Path) -> CLIPModel:
    """CLIP with its tokenizer's files."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *CLIP_ENDS]
    first, last = (pieces.index(end) for end in CLIP_ENDS)
    write(folder / "vocab.json", {piece: index for index, piece in enumerate(pieces)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = transformers.CLIPTokenizerFast(
        str(folder / "vocab.json"), str(folder / "merges.txt"), bos_token=CLIP_ENDS[0], eos_token=CLIP_ENDS[1],
        unk_token=CLIP_ENDS[1], pad_token=CLIP_ENDS[1], model_max_length=77,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": first, "eos_token_id": last, "pad_token_id": last}
    text = {**SIZE, **ends, "vocab_size": len(pieces), "max_position_embeddings": 77}
    vision = {**SIZE, "image_size": 224, "patch_size": 32}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))


def dino(_folder: Path) -> ViTModel:
    """DINO's vision transformer."""
    return ViTModel(ViTConfig(**SIZE, image_size=224, patch_size=32), add_pooling_layer=False)


def dinov2(_folder: Path) -> Dinov2Model:
    """DINOv2's, which has position embeddings for larger pictures than it is shown."""
    return Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14)
    )


def blip(folder: Path) -> BlipForImageTextRetrieval:
    """BLIP's retrieval model with its tokenizer's files."""
    pieces = [*BERT_TOKENS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    transformers.BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True, model_max_length=512).save_pretrained(
        folder
    )
    text = {**SIZE, "vocab_size": len(pieces), "max_position_embeddings": 64, "encoder_hidden_size": 32}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    vision = {**SIZE, "image_size": 384, "patch_size": 64}
    return BlipForImageTextRetrieval(
        BlipConfig(text_config={**text, **ids}, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
    )


def write(path: Path, value: dict) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value), encoding="utf-8")


def main() -> int:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(build(options.folder, options.seed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
