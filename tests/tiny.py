"""Small checkpoints with random weights, in the formats ComfyUI's checkpoint loader recognises, made in seconds.

ComfyUI must be importable and its arguments parsed, see tests/comfy/conftest.py.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    # the smallest SD1.5 there is: one level, one text cross-attention
    "abs": {"context_dim": 768, "channel_mult": [1], "num_res_blocks": [1], "transformer_depth": [1],
            "transformer_depth_output": [0, 0], "transformer_depth_middle": -2},
    # two levels, cross-attention in the input, middle and output blocks
    "small": {"context_dim": 768, "channel_mult": [1, 1], "num_res_blocks": [1, 1], "transformer_depth": [1, 1],
              "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1},
    # SD1.5's own twelve input, one middle and twelve output blocks, a quarter as wide in the deep ones
    "blocks": {"context_dim": 768, "channel_mult": [1, 1, 1, 1], "num_res_blocks": [2, 2, 2, 2],
               "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3,
               "transformer_depth_middle": 1},
    # SD2.1-v is told from SD2 by the 12th output block's norm
    "sd21v": {"context_dim": 1024, "channel_mult": [1, 1, 1, 1], "num_res_blocks": [2, 2, 2, 2],
              "transformer_depth": [1] + [0] * 7, "transformer_depth_output": [1] + [0] * 11,
              "transformer_depth_middle": -2, "use_linear_in_transformer": True,
              "num_heads": -1, "num_head_channels": 64},
    # the SDXL family (KOALA)
    "sdxl": {"context_dim": 2048, "channel_mult": [1, 1, 1], "num_res_blocks": [1, 1, 1],
             "transformer_depth": [0, 2, 5], "transformer_depth_output": [0] * 6, "transformer_depth_middle": -2,
             "use_linear_in_transformer": True,
             "num_heads": -1, "num_head_channels": 64, "adm_in_channels": 2816, "num_classes": "sequential"},
}  # fmt: skip


def write_tiny_checkpoint(
    path: Path, variant: str = "abs", *, clip_layers: int = 12, clip: bool = True, vae: str = "taesd", seed: int = 0
) -> Path:
    """Write a checkpoint and return its path.

    Args:
        path: file to write (.safetensors).
        variant: a key of SHAPES, or "inpaint" (abs with nine input channels) or "noclip" (abs without a text encoder).
        clip_layers: layers of the CLIP-L written; fewer than 12 load only with the matching te_model_options.
        clip: whether to write a text encoder (only the 768-wide variants have one here).
        vae: "taesd", "kl" (a small AutoencoderKL with a posterior) or "none".
        seed: of the weights.
    """
    import comfy.ops
    import comfy.sd1_clip
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.taesd.taesd import TAESD

    shape = dict(SHAPES["abs" if variant in ("inpaint", "noclip") else variant])
    generator = torch.Generator().manual_seed(seed)
    heads = {"num_heads": 8, "num_head_channels": -1}
    unet = UNetModel(
        image_size=32, in_channels=9 if variant == "inpaint" else 4, out_channels=4, model_channels=320,
        use_spatial_transformer=True, legacy=False, dtype=torch.float32, device="cpu",
        operations=comfy.ops.disable_weight_init, **{**heads, "use_linear_in_transformer": False, **shape},
    )  # fmt: skip
    tensors = {f"model.diffusion_model.{k}": v for k, v in _random(unet, generator).items()}
    if variant == "sd21v":
        key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
        tensors[key] = torch.randn(tensors[key].shape, generator=generator) * 0.2
    if vae == "taesd":
        tensors |= {f"first_stage_model.{k}": v for k, v in _random(TAESD(latent_channels=4), generator).items()}
    elif vae == "kl":
        tensors |= {f"first_stage_model.{k}": v for k, v in _random(_small_kl(), generator).items()}
    if clip and variant in ("abs", "small", "blocks", "inpaint"):
        options = {"clip_l_model_config": {"num_hidden_layers": clip_layers}, "model_name": "clip_l"}
        text = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float32, model_options=options)
        for key, value in _random(text, generator).items():
            if "text_projection" not in key and "logit_scale" not in key:
                std = {"token_embedding": 0.5, "position_embedding": 0.1}.get(key.split(".")[-2])
                tensors[f"cond_stage_model.{key}"] = value if std is None else value / value.std() * std
    save_file({k: v.detach().half().contiguous() for k, v in tensors.items()}, path)
    return Path(path)


def _random(module: torch.nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A state dict of scaled normal matrices, unit gains and small biases, so that signals keep their size."""
    state = {}
    for name, parameter in module.state_dict().items():
        if parameter.ndim >= 2:
            std = 0.7 / parameter[0].numel() ** 0.5
            state[name] = torch.randn(parameter.shape, generator=generator) * std
        elif name.endswith("weight"):
            state[name] = 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
        elif parameter.is_floating_point():
            state[name] = 0.02 * torch.randn(parameter.shape, generator=generator)
    return state


def _small_kl() -> torch.nn.Module:
    """An AutoencoderKL with one residual block a level and 32 channels, eight times smaller latents."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    levels = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
              "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
    return AutoencoderKL(ddconfig=levels, embed_dim=4)


if __name__ == "__main__":
    destination, kind = Path(sys.argv[1]), sys.argv[2]
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    write_tiny_checkpoint(destination, kind)
