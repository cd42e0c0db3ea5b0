"""The diffusers example runs as its README says, on a tiny model written by the test."""

import contextlib
import functools
import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "diffusers_dreambooth_sude.py"
WORDS = ["photo", "of", "a", "sks", "dog"]


def write_tokenizer(folder: Path) -> int:
    """A CLIP tokenizer that knows the letters and a few words; returns the size of its vocabulary."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocab, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merge = (parts[0], parts[1])
            if merge not in merges:
                merges.append(merge)
                vocab.append("".join(merge))
            parts[:2] = ["".join(merge)]
    vocab = list(dict.fromkeys(vocab)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 16})
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert len(tokenizer("photo of a sks dog").input_ids) == 7, "start, five words, end"
    return len(vocab)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def model(request, tmp_path_factory) -> Path:
    """A diffusers model folder with random weights: a small UNet and VAE, two layers of CLIP."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    size = write_tokenizer(folder / "tokenizer")
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(folder / "unet")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
        )
    ).save_pretrained(folder / "text_encoder")
    AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder / "vae")
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=request.param
    ).save_pretrained(folder / "scheduler")
    return folder


def run(model: Path, folder: Path, *options: str, alone: bool = False) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Run the script, `alone` as a user does; its lines and the weights it saved."""
    from PIL import Image
    from safetensors.torch import load_file

    folder.mkdir(exist_ok=True)
    Image.effect_noise((40, 48), 80).convert("RGB").save(folder / "dog.png")
    arguments = [str(model), str(folder / "dog.png"), "dog", "--output", str(folder / "out"), "--device", "cpu"]
    arguments += ["--learning-rate", "1e-3", *options]
    if alone:
        environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(SCRIPT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
        assert done.returncode == 0, done.stderr
        output = done.stdout
    else:
        with contextlib.redirect_stdout(io.StringIO()) as stdout, torch.random.fork_rng():
            runpy.run_path(str(SCRIPT))["main"](arguments)
        output = stdout.getvalue()
    weights = {}
    for part in ("unet", "text_encoder"):
        (file,) = (folder / "out" / part).glob("*.safetensors")
        weights |= {f"{part}.{name}": tensor for name, tensor in load_file(file).items()}
    return output.splitlines(), weights


def check(model: Path, lines: list[str], weights: dict[str, torch.Tensor], steps: int) -> set[str]:
    """Every line tells finite losses and the gate, and everything was trained; the gate's values."""
    from safetensors.torch import load_file

    assert len(lines) == steps
    gates = set()
    for index, line in enumerate(lines, 1):
        numbers = re.fullmatch(rf"step {index}/{steps}  l_sub (\S+)  l_sude (\S+)  gate ([01])", line)
        assert numbers, line
        assert all(math.isfinite(float(number)) for number in numbers.groups())
        gates.add(numbers[3])
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        before = load_file(model / part / f"{name}.safetensors")
        changed = [key for key, tensor in before.items() if not torch.equal(tensor, weights[f"{part}.{key}"])]
        assert len(changed) > 0.9 * len(before)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    return gates


@pytest.mark.slow
@pytest.mark.parametrize("model", ["epsilon"], indirect=True)
def test_the_example_runs_as_its_first_lines_say_and_finds_the_method_without_comfyui(model, tmp_path):
    lines, weights = run(model, tmp_path, "--steps", "2", alone=True)
    check(model, lines, weights, 2)


@pytest.mark.slow
def test_the_example_trains_a_diffusers_model_and_sude_makes_a_difference(model, tmp_path, monkeypatch):
    from comfy_sude import sude

    lines, plain = run(model, tmp_path / "plain", "--steps", "6", "--w-s", "0")
    assert not any("gate" in line for line in lines)
    # random networks may have nothing to inherit: keep the gate open
    monkeypatch.setattr(sude, "loss", functools.partial(sude.loss, truncate=False))
    lines, weights = run(model, tmp_path / "sude", "--steps", "6", "--w-s", "2")
    assert check(model, lines, weights, 6) == {"1"}
    assert any(not torch.equal(weights[name], plain[name]) for name in weights)


def test_the_example_is_short():
    assert len(SCRIPT.read_text("utf-8").splitlines()) <= 130
