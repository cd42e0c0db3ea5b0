"""DreamBooth + SuDe in a plain training script, on diffusers' own classes. No ComfyUI needed.

    python scripts/diffusers_dreambooth_sude.py MODEL_FOLDER dog.png dog --output sks-dog

MODEL_FOLDER is a Stable Diffusion 1.x or 2.x model in diffusers' format. The UNet and the whole text encoder train, as
in the paper's DreamBooth baseline, here without class images to keep it short. What SuDe adds is marked with `# SuDe`.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from transformers import CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comfy_sude import sude  # noqa: E402 after the repository is on the path
from comfy_sude.diffusion import NoiseProcess  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are the paper's for DreamBooth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a diffusers Stable Diffusion 1.x or 2.x model")
    parser.add_argument("image", type=Path, help="one picture of the subject")
    parser.add_argument("category", help="what the picture shows: dog, teapot, stuffed animal")
    parser.add_argument("--identifier", default="sks", help="rare word that will mean the subject (default: sks)")
    parser.add_argument("--output", type=Path, default=Path("sude-subject"), help="folder for the trained networks")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--w-s", type=float, default=0.4, help="weight of SuDe; 0 is plain DreamBooth")
    parser.add_argument("--resolution", type=int, help="side in pixels (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train and save."""
    args = parse(arguments)
    torch.manual_seed(args.seed)

    tokenizer = CLIPTokenizer.from_pretrained(args.model, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(args.model, subfolder="text_encoder").float().to(args.device).train()
    unet = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet").float().to(args.device).train()
    vae = AutoencoderKL.from_pretrained(args.model, subfolder="vae").float().to(args.device)
    scheduler = DDPMScheduler.from_pretrained(args.model, subfolder="scheduler")
    velocity = scheduler.config.prediction_type == "v_prediction"
    process = NoiseProcess(scheduler.alphas_cumprod.double(), "v" if velocity else "eps")

    side = args.resolution or unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    image = ImageOps.fit(ImageOps.exif_transpose(Image.open(args.image)).convert("RGB"), (side, side), Image.BICUBIC)
    with torch.no_grad():
        posterior = vae.encode(VaeImageProcessor().preprocess(image).to(args.device)).latent_dist
    captions = [f"photo of a {args.identifier} {args.category}", f"photo of a {args.category}", ""]
    window = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    tokens = tokenizer(captions, **window, return_tensors="pt").input_ids.to(args.device)
    optimizer = torch.optim.AdamW([*unet.parameters(), *text_encoder.parameters()], lr=args.learning_rate)

    for step in range(1, args.steps + 1):
        z = posterior.sample() * vae.config.scaling_factor
        noise = torch.randn_like(z)
        t = torch.randint(scheduler.config.num_train_timesteps, (1,), device=z.device)
        x_t = scheduler.add_noise(z, noise, t)
        target = scheduler.get_velocity(z, noise, t) if velocity else noise

        subject = text_encoder(tokens[:1])[0]
        prediction = unet(x_t, t, subject).sample
        l_sub = loss = F.mse_loss(prediction, target)

        if args.w_s:
            with torch.no_grad():  # SuDe: the same x_t and t under the category caption and the empty caption
                both = unet(x_t.repeat(2, 1, 1, 1), t.repeat(2), text_encoder(tokens[1:])[0]).sample
            a, c, u = (process.to_noise(p, x_t, t) for p in (prediction, *both.split(1)))  # eps models: unchanged
            lam = sude.weight(scheduler.alphas_cumprod, t)  # SuDe
            term = sude.loss(a, c, u, lam)  # SuDe
            loss = l_sub + args.w_s * term.loss.mean()  # SuDe

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        line = f"step {step}/{args.steps}  l_sub {l_sub.item():.4f}"
        if args.w_s:
            line += f"  l_sude {term.loss.mean().item():.4f}  gate {term.active.mean().item():.0f}"
        print(line, flush=True)

    unet.save_pretrained(args.output / "unet")
    text_encoder.save_pretrained(args.output / "text_encoder")


if __name__ == "__main__":
    main()
