"""One training loop for all baselines: draw, predict a, c and u, add up the loss terms, one optimizer step.

Each step, at the same noisy latents x_t and timestep t of the example:
    a = prediction under the subject caption    (the only one with a gradient)
    c = prediction under the category caption
    u = prediction under the empty caption
Pure torch: the networks come in as callables (`Networks`), so the loop runs without ComfyUI.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import captions, sude
from .baselines.base import Baseline, Networks
from .data import Generators, Latents
from .diffusion import NoiseProcess
from .recipe import Options

TERMS = ("l_sub", "l_sude", "l_prior", "gate", "gap")
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Predictors:
    """The networks as the loop calls them.

    Attributes:
        process: the noise process of the model.
        predict: (x_t [B, C, h, w], t [B], context [B, tokens, width]) -> raw prediction [B, C, h, w].
        encode: captions -> [N, tokens, width], differentiable where the baseline trains the text encoder.
        frozen: like `predict`, by a frozen copy of the pretrained UNet; needed for `reference` pretrained and prior
            distillation unless the baseline can switch itself off.
        device: where the networks are.
    """

    process: NoiseProcess
    predict: Callable[[Tensor, Tensor, Tensor], Tensor]
    encode: Callable[[list[str]], Tensor]
    device: torch.device
    frozen: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


@dataclass
class Log:
    """One value per step and term: l_sub, l_sude (gated, weighted by lambda), l_prior, gate (share open) and gap."""

    values: dict[str, list[float]] = field(default_factory=lambda: {term: [] for term in TERMS})
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.values["l_sub"])

    def recent(self, term: str, window: int = 50) -> float:
        """Mean of a term's last values."""
        tail = self.values[term][-window:]
        return sum(tail) / len(tail) if tail else float("nan")


class Trainer:
    """A training in progress: `run` does all steps, `step` one.

    Args:
        baseline: the method, on its trainable networks.
        predictors: the networks as callables.
        example: posteriors of the subject's pictures.
        class_images: posteriors of the class images, if the recipe's prior uses them.
    """

    def __init__(
        self, baseline: Baseline, predictors: Predictors, example: Latents, class_images: Latents | None = None
    ):
        recipe = baseline.recipe
        self.baseline, self.recipe, self.options = baseline, recipe, recipe.options
        self.on, self.example, self.class_images = predictors, example, class_images
        self.generators = Generators(recipe.seed)
        groups = baseline.prepare(self.generators.init)
        if AUTOCAST[recipe.options.precision] is not None:
            store_frozen(baseline.networks, AUTOCAST[recipe.options.precision])
        self.optimizer = make_optimizer(groups, recipe.baseline.learning_rate, recipe.options)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(predictors.device.type, enabled=recipe.options.precision == "fp16")
        self.log = Log()
        self._fixed: dict[str, Tensor] = {}
        if recipe.uses_pretrained:
            with torch.no_grad(), self._autocast(), self.baseline.pretrained():
                for caption in (baseline.category_caption, captions.EMPTY):
                    self._fixed["pretrained " + caption] = predictors.encode([caption])[0].float().clone()

    def run(self, report, steps: int | None = None) -> Log:
        """Do the recipe's steps (or `steps` of them), reporting each; see `host.progress.Progress` for `report`."""
        total = self.recipe.baseline.steps if steps is None else steps
        report.phase("training", total)
        began = time.monotonic()
        for index in range(total):
            self.step()
            self.log.seconds = time.monotonic() - began
            report.step(index + 1, self._line())
        return self.log

    def step(self) -> None:
        """One optimizer step.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        terms = self.losses()
        loss = terms["l_sub"] + self.recipe.baseline.w_s * terms["l_sude"] + self.options.prior.w_r * terms["l_prior"]
        values = torch.stack([loss.detach(), *(terms[name].detach() for name in TERMS)]).tolist()
        if not values[0] - values[0] == 0:
            raise FloatingPointError(
                f"the loss is not finite at step {self.log.steps + 1}: use a smaller learning rate or w_s, or "
                "precision fp32."
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.options.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for name, value in zip(TERMS, values[1:], strict=True):
            self.log.values[name].append(value)

    def losses(self) -> dict[str, Tensor]:
        """Draw one batch and compute every term (scalars, before their weights)."""
        on, process, options, baseline = self.on, self.on.process, self.options, self.baseline
        count, device = options.batch_size, on.device
        z, noise, t = self._noised(self.example)
        x_t = process.add_noise(z, noise, t)
        target = process.target(z, noise, t)

        prior = options.prior.kind if options.prior.w_r > 0 else "off"
        if prior == "class images":
            z_p, noise_p, t_p = self._noised(self.class_images)
            x_p, target_p = process.add_noise(z_p, noise_p, t_p), process.target(z_p, noise_p, t_p)
        elif prior == "distillation":
            x_p, t_p = x_t, t
            target_p = self._reference([baseline.category_caption], x_t, t)

        own, category = self._contexts(prior != "off")
        with self._autocast():
            if prior == "off":
                a = on.predict(x_t, t.to(device), own.expand(count, -1, -1))
            else:
                context = torch.cat([own.expand(count, -1, -1), category.expand(count, -1, -1)])
                a, p = on.predict(torch.cat([x_t, x_p]), torch.cat([t, t_p]).to(device), context).chunk(2)
        zero = torch.zeros((), device=device)
        terms = dict.fromkeys(TERMS, zero)
        terms["l_sub"] = baseline.subject_loss(a.float(), target).mean()
        if prior != "off":
            terms["l_prior"] = (p.float() - target_p).pow(2).mean()
        if self.recipe.baseline.w_s > 0:
            known = None
            if prior == "distillation":  # the prior pass already holds c: the same latents and caption
                known = target_p if options.reference == "pretrained" else p.detach()
            c, u = self._category_and_empty(x_t, t, category, known)
            inherit = self._inherit(a, c, u, t)
            terms |= {"l_sude": inherit.loss.mean(), "gate": inherit.active.mean(), "gap": inherit.gap.mean()}
        return terms

    def _inherit(self, a: Tensor, c: Tensor, u: Tensor, t: Tensor) -> sude.SuDeTerm:
        """The SuDe loss of raw predictions.

        It reads only differences of noises, so the share of x_t, the same in all three, is left out: near zero terminal
        SNR a v-model's differences would drown in it.
        """
        process = self.on.process
        weight = sude.weight(process.alphas_cumprod, t, self.options.t0).to(self.on.device)
        origin = torch.zeros_like(u, dtype=torch.float32)
        noises = (process.to_noise(prediction.float(), origin, t) for prediction in (a, c, u))
        return sude.loss(*noises, weight, self.options.truncation)

    def _noised(self, pictures: Latents) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and noise on the device and CPU timesteps, from this training's own generators."""
        g, options = self.generators, self.options
        z = pictures.draw(options.batch_size, options.flip, options.sample_latent, g)
        noise = torch.randn(z.shape, generator=g.noise)
        t = torch.randint(self.on.process.num_timesteps, (len(z),), generator=g.timesteps)
        return z.to(self.on.device), noise.to(self.on.device), t

    def _contexts(self, with_category: bool) -> tuple[Tensor, Tensor | None]:
        """Encodings [1, tokens, width] of the subject caption and, if asked, of the category caption."""
        wanted = [self.baseline.subject_caption, self.baseline.category_caption][: 1 + with_category]
        if not self.baseline.trains_text:
            return tuple(self._encode_once(caption) for caption in wanted) + (None,) * (2 - len(wanted))
        with self._autocast():
            encoded = self.on.encode(wanted)
        return encoded[:1], encoded[1:] if with_category else None

    def _category_and_empty(
        self, x_t: Tensor, t: Tensor, category: Tensor | None, c: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """c (unless given) and u without gradient; whatever this step already computed is used again."""
        category_caption = self.baseline.category_caption
        if self.options.reference == "pretrained":
            wanted = [captions.EMPTY] if c is not None else [category_caption, captions.EMPTY]
            predictions = self._reference(wanted, x_t, t).chunk(len(wanted))
            return predictions if c is None else (c, *predictions)
        with torch.no_grad(), self._autocast():
            if not self.baseline.trains_text:
                category, empty = self._encode_once(category_caption), self._encode_once(captions.EMPTY)
            elif category is not None:
                category, empty = category.detach(), self.on.encode([captions.EMPTY])
            else:
                category, empty = self.on.encode([category_caption, captions.EMPTY]).chunk(2)
            wanted = [empty] if c is not None else [category, empty]
            predictions = self._predict_each(self.on.predict, wanted, x_t, t).chunk(len(wanted))
        return predictions if c is None else (c, *predictions)

    def _reference(self, wanted: list[str], x_t: Tensor, t: Tensor) -> Tensor:
        """[len(wanted) * B, C, h, w] predictions of the pretrained networks."""
        contexts = [self._fixed["pretrained " + caption][None] for caption in wanted]
        with torch.no_grad(), self._autocast(), self.baseline.pretrained():
            return self._predict_each(self.on.frozen or self.on.predict, contexts, x_t, t).float()

    def _predict_each(self, predict, contexts: list[Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        n, count = len(contexts), len(x_t)
        context = torch.cat([one.expand(count, -1, -1) for one in contexts])
        return predict(x_t.repeat(n, 1, 1, 1), t.repeat(n).to(self.on.device), context)

    def _encode_once(self, caption: str) -> Tensor:
        if caption not in self._fixed:
            with torch.no_grad(), self._autocast():
                self._fixed[caption] = self.on.encode([caption]).float()
        return self._fixed[caption]

    def _autocast(self):
        dtype = AUTOCAST[self.options.precision]
        return torch.autocast(self.on.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def _line(self) -> str:
        log = self.log
        line = f"loss {log.recent('l_sub'):.4f}"
        if self.recipe.baseline.w_s > 0:
            line += f" · gate {log.recent('gate'):.0%} open"
        return f"{line} · {log.steps / max(log.seconds, 1e-9):.2f} steps/s"


def store_frozen(networks: Networks, dtype: torch.dtype) -> None:
    """Keep the matrices that do not train in the type autocast would cast them to at every use anyway."""
    for module in (*networks.unet.modules(), *networks.text_encoder.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(dtype)


def make_optimizer(groups: list[dict], learning_rate: float, options: Options) -> torch.optim.Optimizer:
    """The recipe's optimizer: PyTorch's AdamW (fused: one pass over the weights, no temporary copies) or Adafactor."""
    if options.optimizer == "Adafactor":
        return torch.optim.Adafactor(groups, lr=learning_rate, weight_decay=options.weight_decay)
    device = groups[0]["params"][0].device.type
    fused = device in ("cuda", "cpu", "mps")
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=options.weight_decay, fused=fused)
