"""What one training step costs: DreamBooth plain, with SuDe, as SuDe's release computes it, and by diffusers; and what
SuDe adds to Custom Diffusion and ViCo.

    python dev.py bench step

All in one process on networks of one shape, one step of each in turn, round after round; every ratio is taken within a
round, so a machine that slows down slows both sides. Peak memory is measured in a fresh process. See bench/README.md.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bench.comfy_server import REPO, WORK, comfyui_folder

RESULTS = REPO / "bench" / "results" / "step.json"
MINI_WORLD = REPO / "bench" / "miniworld" / "miniworld.safetensors"
TARGETS = {
    "SuDe / plain, class images": 1.40,
    "SuDe / plain, no prior": 1.72,
    "SuDe / released way, class images": 0.90,
    "plain / diffusers, class images": 1.05,
    "plain / diffusers, no prior": 1.05,
    "SuDe / plain, Custom Diffusion, class images": 1.45,
    "SuDe / plain, ViCo": 1.60,
    "peak memory / accounted": 1.10,
}
LATENT = (4, 8, 8)
CATEGORY = "dog"


# --- The networks ----------------------------------------------------------------------------------------------------


def import_comfyui() -> None:
    """Put ComfyUI on the path, behind the repository, and import it for the device that is there."""
    import torch

    folder = comfyui_folder()
    if not (folder / "comfy").is_dir():
        raise SystemExit("ComfyUI is not set up: run `python dev.py bench step`, or set COMFYUI_PATH.")
    sys.path.append(str(folder))
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    arguments, sys.argv = sys.argv, [sys.argv[0], *([] if accelerated else ["--cpu"])]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.sd  # noqa: F401 parses the arguments
    finally:
        sys.argv = arguments


def checkpoint() -> Path:
    """The mini world where it is trained, else random weights in its shape."""
    if MINI_WORLD.is_file():
        from bench.miniworld.expand import expand

        return expand(WORK / "miniworld.safetensors")
    from tests.tiny import write_tiny_checkpoint

    path = WORK / "bench_step.safetensors"
    if not path.is_file():
        part = path.with_suffix(".part")
        write_tiny_checkpoint(part, "small", vae="none")
        part.replace(path)
    return path


class Ours:
    """This project's training on its own copies of MODEL and CLIP, wired as `comfy_sude.finetune` wires it."""

    def __init__(self):
        import comfy.sd

        self.model, self.clip = comfy.sd.load_checkpoint_guess_config(str(checkpoint()), output_vae=False)[:2]
        self.device = self.model.load_device

    def copy(self) -> None:
        """The fp32 copies that train."""
        from comfy_sude.baselines.base import Networks
        from comfy_sude.host import model as host_model
        from comfy_sude.host import text

        self.process = host_model.check_supported(self.model)
        self.base = host_model.build_unet(self.model).to(self.device)
        self.text_encoder = text.build_text_encoder(self.clip).to(self.device)
        self.encode = text.Encoder(self.clip, self.text_encoder, self.device)
        self.networks = Networks(self.base.diffusion_model, self.text_encoder, self.encode)
        self.optimizer = None

    def predict(self, x_t, t, context, taps=None):
        """The raw prediction of the training copy."""
        from comfy_sude.host import model as host_model

        return host_model.predict(self.base, x_t, t, context, taps)

    def trainer(self, w_s: float | None, prior: str, method: str = "DreamBooth"):
        """A training of this project; all of them share one optimizer, so that one set of Adam states is enough.

        A `w_s` of None is the method's preset.
        """
        from comfy_sude.baselines import REGISTRY
        from comfy_sude.recipe import Options, Prior, Recipe
        from comfy_sude.train import Predictors, Trainer

        settings = REGISTRY[method].settings()
        settings = settings if w_s is None else dataclasses.replace(settings, w_s=w_s)
        options = Options(prior=Prior(kind=prior), gradient_checkpointing=False)
        recipe = Recipe(CATEGORY, method, settings, options).checked()
        predictors = Predictors(self.process, self.predict, self.encode, self.device)
        latents = pictures(8) if prior != "off" and recipe.options.prior.kind == "class images" else None
        trainer = Trainer(REGISTRY[method](recipe, self.networks), predictors, pictures(1), latents)
        self.optimizer = trainer.optimizer = self.optimizer or trainer.optimizer
        return trainer

    def released_step(self, trainer) -> Callable[[], None]:
        """One step as the release computes it: a forward and a text encoding for each of subject, prior, c and u."""
        import torch

        from comfy_sude import sude

        def predict(caption, x_t, t):
            return self.predict(x_t, t.to(self.device), self.encode([caption]))

        def step():
            z, noise, t = trainer._noised(trainer.baseline.draw(1, trainer.generators).z)
            x_t = self.process.add_noise(z, noise, t)
            a = predict(trainer.baseline.subject_caption, x_t, t)
            with torch.no_grad():
                c, u = predict(trainer.baseline.category_caption, x_t, t), predict("", x_t, t)
            loss = (a - noise).pow(2).mean()
            weight = sude.weight(self.process.alphas_cumprod, t).to(self.device)
            loss = loss + trainer.recipe.baseline.w_s * sude.loss(a, c, u, weight).loss.mean()
            if trainer.class_images is not None:
                z, noise, t = trainer._noised(trainer._class_images())
                p = predict(trainer.baseline.category_caption, self.process.add_noise(z, noise, t), t)
                loss = loss + trainer.options.prior.w_r * (p - noise).pow(2).mean()
            loss.item()
            trainer.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)

        return step


class Diffusers:
    """The step of diffusers' train_dreambooth.py (text encoder trained) on its own classes, from cached latents.

    Its gradient clipping is left out, since ours does not clip: that would only make it slower.
    """

    def __init__(self, device, last_attention: bool):
        import torch
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        self.device = device
        self.unet = UNet2DConditionModel(
            sample_size=LATENT[1],
            block_out_channels=(320, 320),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            attention_head_dim=8,
            cross_attention_dim=768,
        ).to(device)
        if not last_attention:  # the mini world has none there, which diffusers' options cannot say
            self.unet.up_blocks[-1].attentions[-1] = pass_through()
        config = CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            bos_token_id=49406,
            eos_token_id=49407,
        )
        self.text_encoder = CLIPTextModel(config).to(device)
        self.unet.train()
        self.text_encoder.train()
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.optimizer = torch.optim.AdamW([*self.unet.parameters(), *self.text_encoder.parameters()], lr=1e-6)
        self.tokens = torch.full((2, 77), 49407, device=device)
        self.tokens[:, 0] = 49406
        self.tokens[:, 1:6] = torch.tensor([1125, 539, 320, 48136, 1929])  # photo of a sks dog

    def step(self, prior: bool, fused: bool) -> Callable[[], None]:
        """Instance and class pictures in one batch, one backward; AdamW as the example makes it, or fused as ours."""
        import torch
        import torch.nn.functional as F

        latents = {1: pictures(1), 8: pictures(8)}

        def step():
            picks = [latents[1].mean[0, 0], *([latents[8].mean[torch.randint(8, ()), 0]] if prior else [])]
            z = torch.stack(picks).to(self.device)
            noise = torch.randn_like(z)
            t = torch.randint(self.scheduler.config.num_train_timesteps, (len(z),), device=self.device)
            x_t = self.scheduler.add_noise(z, noise, t)
            context = self.text_encoder(self.tokens[: len(z)])[0]
            prediction = self.unet(x_t, t, context).sample
            loss = F.mse_loss(prediction[:1].float(), noise[:1].float())
            if prior:
                loss = loss + F.mse_loss(prediction[1:].float(), noise[1:].float())
            loss.item()
            loss.backward()
            for group in self.optimizer.param_groups:
                group["fused"] = fused
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return step


def pass_through():
    """A stand-in for an attention block that is not there."""
    import torch

    class PassThrough(torch.nn.Module):
        def forward(self, hidden_states, **_):
            return (hidden_states,)

    return PassThrough()


def pictures(count: int):
    """Posteriors of `count` random pictures."""
    import torch

    from comfy_sude.data import Latents

    mean = torch.randn(count, 2, *LATENT, generator=torch.Generator().manual_seed(count))
    return Latents(mean, torch.full_like(mean, 0.05))


# --- Time ------------------------------------------------------------------------------------------------------------


def measure_time(ours: Ours, rounds: int, warm_up: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every step, by contestant."""

    diffusers = Diffusers(ours.device, last_attention=len(ours.networks.unet.output_blocks[-1]) > 1)
    for mine, theirs in ((ours.networks.unet, diffusers.unet), (ours.text_encoder, diffusers.text_encoder)):
        sizes = [sum(p.numel() for p in net.parameters()) for net in (mine, theirs)]
        print(f"parameters: ours {sizes[0]:,}, diffusers {sizes[1]:,}")
        if abs(sizes[0] / sizes[1] - 1) > 0.01:
            raise SystemExit("The networks are not of one size: the comparison would mean nothing.")
    contestants = {}
    for prior, name in (("class images", "class images"), ("off", "no prior")):
        with_sude = ours.trainer(0.4, prior)
        contestants[f"plain, {name}"] = ours.trainer(0.0, prior).step
        contestants[f"SuDe, {name}"] = with_sude.step
        contestants[f"released way, {name}"] = ours.released_step(ours.trainer(0.4, prior))
        contestants[f"diffusers, {name}"] = diffusers.step(prior == "class images", fused=False)
        contestants[f"diffusers with fused AdamW, {name}"] = diffusers.step(prior == "class images", fused=True)
    return interleaved(contestants, rounds, warm_up, clock, ours.device)


def interleaved(contestants: dict[str, Callable], rounds: int, warm_up: int, clock, device) -> dict[str, list[float]]:
    """Seconds of every step by contestant, one step of each in turn."""
    import torch

    seconds = {name: [] for name in contestants}
    for index in range(-warm_up, rounds):
        for name, step in contestants.items():
            began = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index >= 0:
                seconds[name].append(clock() - began)
        print(f"round {index + 1} of {rounds}" if index >= 0 else "warming up", flush=True)
    return seconds


def measure_method(method: str, name: str, rounds: int, warm_up: int, clock) -> dict[str, list[float]]:
    """Seconds of every step of a baseline with its preset prior and batch, plain and with its preset w_s."""
    contestants = {}
    for label, w_s in (("plain", 0.0), ("SuDe", None)):
        ours = Ours()  # networks of its own, since these baselines mark them
        ours.copy()
        contestants[f"{label}, {name}"] = ours.trainer(w_s, "preset", method).step
    return interleaved(contestants, rounds, warm_up, clock, ours.device)


def ratios(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """The ratios of each round."""
    pairs = [
        ("SuDe", "plain"),
        ("SuDe", "released way"),
        ("plain", "diffusers"),
        ("plain", "diffusers with fused AdamW"),
    ]
    result = {}
    for name in dict.fromkeys(contestant.partition(", ")[2] for contestant in seconds):
        for above, below in pairs:
            if f"{above}, {name}" in seconds and f"{below}, {name}" in seconds:
                both = zip(seconds[f"{above}, {name}"], seconds[f"{below}, {name}"], strict=True)
                result[f"{above} / {below}, {name}"] = [a / b for a, b in both]
    return result


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values * 3)
    return {"median": round(statistics.median(values), 4), "q25": round(low, 4), "q75": round(high, 4)}


def parts(ours: Ours, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of the parts of our plain step with class images."""
    import torch

    trainer = ours.trainer(0.0, "class images")
    captions = [trainer.baseline.subject_caption, trainer.baseline.category_caption]
    x, t = torch.randn(2, *LATENT, device=ours.device), torch.tensor([300, 600], device=ours.device)
    seconds = {"text forward": [], "UNet forward": [], "backward": [], "optimizer": []}

    def timed(name, function):
        began = clock()
        result = function()
        if ours.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name].append(clock() - began)
        return result

    for _ in range(rounds):
        context = timed("text forward", lambda: ours.encode(captions))
        loss = timed("UNet forward", lambda context=context: ours.predict(x, t, context).pow(2).mean())
        timed("backward", loss.backward)
        timed("optimizer", trainer.optimizer.step)
        trainer.optimizer.zero_grad(set_to_none=True)
    return {name: round(statistics.median(values), 4) for name, values in seconds.items()}


# --- Memory ----------------------------------------------------------------------------------------------------------


class Peak:
    """The most anonymous (on a GPU: allocated) memory of this process inside the block, beyond its start's."""

    def __init__(self, device):
        self.device = device

    @staticmethod
    def now() -> int:
        """Bytes of anonymous memory; resident memory where the system does not tell them apart."""
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        import psutil  # a requirement of ComfyUI

        return psutil.Process().memory_info().rss

    def __enter__(self):
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        self.start = self.highest = self.now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while not self.stop.wait(0.002):
            self.highest = max(self.highest, self.now())

    def __exit__(self, *_):
        import torch

        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.start
            return
        self.stop.set()
        self.thread.join()
        self.bytes = max(self.highest, self.now()) - self.start


def activation_bytes(trainer) -> int:
    """Bytes that autograd keeps for the backward pass of one step, the weights left out."""
    import torch

    own = {p.untyped_storage().data_ptr() for p in trainer.parameters}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = trainer.losses()
    total = sum(kept.values())
    del terms
    return total


def measure_memory(steps: int) -> dict:
    """Peak of building the copies and training them, beside weights + gradients + Adam states + activations."""
    import gc

    import torch

    ours = Ours()
    if ours.device.type == "cpu":  # kernels and thread pools of the first pass are no part of the training's memory
        torch.nn.Conv2d(8, 8, 3)(torch.randn(1, 8, 8, 8)).sum().backward()
    for weights in (ours.model.model.state_dict(), ours.clip.patcher.model.state_dict()):
        for tensor in weights.values():
            tensor.float().sum()
    gc.collect()
    with torch.inference_mode(False), torch.enable_grad(), Peak(ours.device) as peak:
        ours.copy()
        trainer = ours.trainer(0.4, "class images")
        for _ in range(steps):
            trainer.step()
    weights = sum(p.numel() * p.element_size() for p in trainer.parameters)
    activations = activation_bytes(trainer)
    accounted = 4 * weights + activations
    return {
        "peak_bytes": peak.bytes,
        "weights_bytes": weights,
        "activations_bytes": activations,
        "accounted_bytes": accounted,
        "ratio": round(peak.bytes / accounted, 4),
    }


# --- The report ------------------------------------------------------------------------------------------------------


def device_name(device) -> str:
    """The device in words."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python dev.py bench step", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each contestant (default: 15)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of each before (default: 2)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count this process's own CPU time, not the wall clock: for a CPU that is busy with something else",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to write")
    parser.add_argument("--memory-only", action="store_true", help="measure memory in this process and print JSON")
    args = parser.parse_args()
    import_comfyui()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_only:
        print(json.dumps(measure_memory(4)))
        return

    checkpoint()
    command = [sys.executable, "-m", "bench.step", "--memory-only"]
    command += ["--threads", str(args.threads)] if args.threads else []
    done = subprocess.run(command, cwd=REPO, env=os.environ, stdout=subprocess.PIPE, text=True, check=True)
    memory = json.loads(done.stdout.splitlines()[-1])

    ours = Ours()
    ours.copy()
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds = measure_time(ours, args.rounds, args.warm_up, clock)
    seconds_of_parts = parts(ours, args.rounds, clock)
    del ours.networks, ours.base, ours.text_encoder, ours.encode, ours.optimizer
    for method, name in (("Custom Diffusion", "Custom Diffusion, class images"), ("ViCo", "ViCo")):
        seconds |= measure_method(method, name, args.rounds, args.warm_up, clock)
    measured = {name: spread(values) for name, values in ratios(seconds).items()}
    result = {
        "device": device_name(ours.device),
        "torch": torch.__version__,
        "weights": "mini world" if MINI_WORLD.is_file() else "random, the mini world's shape",
        "latent": list(LATENT),
        "batch": "1 subject + 1 class image, or 1 subject; Custom Diffusion 2 + 2; ViCo 1 + its reference",
        "rounds": args.rounds,
        "clock": "CPU time of the process" if args.cpu_time else "wall",
        "seconds_per_step": {name: spread(values) for name, values in seconds.items()},
        "ratios": measured,
        "targets": TARGETS,
        "memory": memory,
        "seconds_of_parts": seconds_of_parts,
    }
    for name, values in result["seconds_per_step"].items():
        print(f"{name:<45} {values['median']:8.3f} s  ({values['q25']:.3f} to {values['q75']:.3f})")
    for name, values in [*measured.items(), ("peak memory / accounted", {"median": memory["ratio"]})]:
        low_high = f"  ({values['q25']:.3f} to {values['q75']:.3f})" if "q25" in values else ""
        target = TARGETS.get(name)
        verdict = (
            "" if target is None else f"  target {target:.2f}: {'met' if values['median'] <= target else 'MISSED'}"
        )
        print(f"{name:<55} {values['median']:6.3f}{low_high}{verdict}")
    print("parts of the plain step:", ", ".join(f"{k} {v:.3f} s" for k, v in result["seconds_of_parts"].items()))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
