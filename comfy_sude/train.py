"""One training loop for all baselines: draw, predict a, c and u, add up the loss terms, one optimizer step.

Each step, at the same noisy latents x_t and timestep t of the example:
    a = prediction under the subject caption    (the only one with a gradient)
    c = prediction under the category caption
    u = prediction under the empty caption
Pure torch: the networks come in as callables (`Networks`), so the loop runs without ComfyUI.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from . import captions, sude
from .baselines.base import Baseline, Batch, Networks, Predict
from .data import Generators, Latents
from .diffusion import NoiseProcess
from .log import TERMS, Log
from .recipe import Options

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Report(Protocol):
    """Who follows a training; see `host.progress.Progress`. Any call may raise to stop it."""

    enough: bool
    """Whether the person wants to go on with what has been learned so far."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Begin a phase of so many steps, of which some may be done already."""

    def step(self, done: int, line: str) -> None:
        """So many of the phase's steps are done."""


@dataclass(frozen=True)
class Predictors:
    """The networks as the loop calls them.

    Attributes:
        process: the noise process of the model.
        predict: (x_t [B, C, h, w], t [B], context [B, tokens, width], taps=None) -> raw prediction [B, C, h, w].
        encode: captions -> [N, tokens, width], differentiable where the baseline trains the text encoder or a token.
        frozen: like `predict`, by a frozen copy of the pretrained UNet; needed for `reference` pretrained and prior
            distillation unless the baseline can switch itself off.
        device: where the networks are.
        recall: (caption, compute) -> [tokens, width] what the incoming text encoder makes of a caption, computed unless
            it is known.
    """

    process: NoiseProcess
    predict: Predict
    encode: Callable[[list[str]], Tensor]
    device: torch.device
    frozen: Predict | None = None
    recall: Callable[[str, Callable[[], Tensor]], Tensor] = lambda _caption, compute: compute()


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
        self.on, self.class_images = predictors, class_images
        self.generators = Generators(recipe.seed)
        baseline.example = example
        groups = baseline.prepare(self.generators.init)
        if AUTOCAST[recipe.options.precision] is not None:
            store_frozen(baseline.networks, AUTOCAST[recipe.options.precision])
        self.optimizer = make_optimizer(groups, recipe.baseline.learning_rate, recipe.options)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(predictors.device.type, enabled=recipe.options.precision == "fp16")
        self.terms = (*TERMS, *baseline.own_terms)
        self.log = Log({term: [] for term in self.terms}, labels=baseline.term_labels)
        self.whole = True  # False while an optimizer step is half done
        self._fixed: dict[str, Tensor] = {}
        self._pretrained: dict[str, Tensor] = {}
        if recipe.uses_pretrained:
            fixed = dict.fromkeys([*(category for _, category in baseline.all_captions(recipe)), captions.EMPTY])
            with torch.no_grad(), self._autocast(), self.baseline.pretrained():
                self._pretrained = {caption: self._incoming(caption).clone() for caption in fixed}

    def run(
        self, report: Report, steps: int | None = None, after_step: Callable[["Trainer"], None] | None = None
    ) -> Log:
        """Train until the recipe's steps (or `steps`) are done or the report says `enough`, reporting each step.

        Args:
            report: told of every step.
            steps: in all, those done before included.
            after_step: called with this trainer after each report.
        """
        total = self.recipe.baseline.steps if steps is None else steps
        report.phase("training", total, self.log.steps)
        began = time.monotonic() - self.log.seconds
        while self.log.steps < total and not (report.enough and self.log.steps):
            self.step()
            self.log.seconds = time.monotonic() - began
            report.step(self.log.steps, self._line())
            if after_step is not None:
                after_step(self)
        return self.log

    def step(self) -> None:
        """One optimizer step. If it fails before the weights change, the random streams are where they were.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        before = self.generators.state()
        try:
            values = self._backward()
        except BaseException:
            self.generators.restore(before)
            self.optimizer.zero_grad(set_to_none=True)
            raise
        self.whole = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for name, value in zip(self.terms, values, strict=True):
            self.log.values[name].append(value)
        self.whole = True

    def _backward(self) -> list[float]:
        """The loss of one batch with its gradients; the values of its terms."""
        terms = self.losses()
        loss = terms["l_sub"] + self.recipe.baseline.w_s * terms["l_sude"] + self.options.prior.w_r * terms["l_prior"]
        loss = loss + sum(weight * terms[name] for name, weight in self.baseline.own_terms.items())
        total, *values = torch.stack([loss.detach(), *(terms[name].detach() for name in self.terms)]).tolist()
        if not total - total == 0:
            raise FloatingPointError(
                f"the loss is not finite at step {self.log.steps + 1}: use a smaller learning rate or w_s, or "
                "precision fp32."
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.options.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        return values

    def losses(self) -> dict[str, Tensor]:
        """Draw one batch and compute every term (scalars, before their weights)."""
        on, process, options, baseline = self.on, self.on.process, self.options, self.baseline
        count, device = options.batch_size, on.device
        batch = baseline.draw(count, self.generators)
        z, noise, t = self._noised(batch.z)
        x_t = process.add_noise(z, noise, t)
        target = process.target(z, noise, t)

        prior = options.prior.kind if options.prior.active else "off"
        if prior == "class images":
            preserved = (baseline.category_caption,) * count
            z_p, noise_p, t_p = self._noised(self._class_images())
            x_p, target_p = process.add_noise(z_p, noise_p, t_p), process.target(z_p, noise_p, t_p)
        elif prior == "distillation":
            preserved = batch.categories
            x_p, t_p = x_t, t
            target_p = self._reference(batch.categories, x_t, t)
        else:
            preserved, x_p, t_p = (), x_t[:0], t[:0]

        encoded = self.encode((*batch.captions, *preserved))
        context = torch.stack([encoded[caption] for caption in (*batch.captions, *preserved)])
        with self._autocast():
            rows, times = torch.cat([x_t, x_p]), torch.cat([t, t_p]).to(device)
            predicted, own = baseline.predict(on.predict, rows, times, context, batch)
        a, p = predicted[:count], predicted[count:]
        zero = torch.zeros((), device=device)
        terms = dict.fromkeys(self.terms, zero) | own
        terms["l_sub"] = baseline.subject_loss(a.float(), target, batch.mask).mean()
        if preserved:
            terms["l_prior"] = baseline.prior_loss(p.float(), target_p).mean()
        if self.recipe.baseline.w_s > 0:
            known = None
            if prior == "distillation":  # the prior pass already holds c: the same latents and caption
                known = target_p if options.reference == "pretrained" else p.detach()
            c, u = self._category_and_empty(x_t, t, batch, encoded, known)
            inherit = self._inherit(a, c, u, t, baseline.support(batch))
            terms |= {"l_sude": inherit.loss.mean(), "gate": inherit.active.mean(), "gap": inherit.gap.mean()}
        return terms

    def predict_under(self, x_t: Tensor, t: Tensor, context: Tensor, caption: str) -> Tensor:
        """[B, C, h, w] fp32 predictions as in sampling: the first row under `caption`, a second under the empty one."""
        device = self.on.device
        with self._autocast():
            return self.baseline.predict_sample(
                self.on.predict, x_t.to(device), t.to(device), context.to(device), caption
            ).float()

    def _inherit(self, a: Tensor, c: Tensor, u: Tensor, t: Tensor, support: Tensor | None) -> sude.SuDeTerm:
        """The SuDe loss of raw predictions.

        It reads only differences of noises, so the share of x_t, the same in all three, is left out: near zero terminal
        SNR a v-model's differences would drown in it.
        """
        process = self.on.process
        weight = sude.weight(process.alphas_cumprod, t, self.options.t0).to(self.on.device)
        origin = torch.zeros_like(u, dtype=torch.float32)
        noises = (process.to_noise(prediction.float(), origin, t) for prediction in (a, c, u))
        return sude.loss(*noises, weight, self.options.truncation, support)

    def _class_images(self) -> Tensor:
        """[batch, C, h, w] latents of random class images."""
        options = self.options
        return self.class_images.draw(options.batch_size, options.flip, options.sample_latent, self.generators)

    def _noised(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and noise on the device and CPU timesteps, from this training's own generators."""
        g = self.generators
        noise = torch.randn(z.shape, generator=g.noise)
        t = torch.randint(self.on.process.num_timesteps, (len(z),), generator=g.timesteps)
        return z.to(self.on.device), noise.to(self.on.device), t

    def encode(self, wanted: tuple[str, ...]) -> dict[str, Tensor]:
        """[tokens, width] of each caption: with a gradient where training changes it, else computed once for all."""
        wanted = list(dict.fromkeys(wanted))
        changing = [caption for caption in wanted if self.baseline.changes(caption)]
        fresh = [caption for caption in wanted if caption not in self._fixed and caption not in changing]
        with self._autocast():
            with torch.no_grad():
                for caption in fresh:  # one by one: the same bits whichever captions a resumed training meets first
                    self._fixed[caption] = self._incoming(caption)
            encoded = dict(zip(changing, self.on.encode(changing), strict=True)) if changing else {}
        return {caption: encoded[caption] if caption in encoded else self._fixed[caption] for caption in wanted}

    def _incoming(self, caption: str) -> Tensor:
        """[tokens, width] of a caption by the text encoder as it came in."""
        return self.on.recall(caption, lambda: self.on.encode([caption])[0].float()).to(self.on.device)

    def _category_and_empty(
        self, x_t: Tensor, t: Tensor, batch: Batch, encoded: dict[str, Tensor], c: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """c (unless given) and u without gradient; whatever this step already computed is used again."""
        empty = (captions.EMPTY,) * len(x_t)
        wanted = empty if c is not None else (*batch.categories, *empty)
        if self.options.reference == "pretrained":
            predictions = self._reference(wanted, x_t, t)
        else:
            with torch.no_grad():
                encoded = encoded | self.encode(tuple(caption for caption in wanted if caption not in encoded))
                context = torch.stack([encoded[caption] for caption in wanted])
                with self._autocast():
                    predictions = self.baseline.predict_reference(
                        self.on.predict, *self._repeated(x_t, t, len(wanted)), context, batch
                    )
        return predictions.chunk(2) if c is None else (c, predictions)

    def _reference(self, wanted: tuple[str, ...], x_t: Tensor, t: Tensor) -> Tensor:
        """[len(wanted), C, h, w] predictions of the pretrained networks, one row for each caption."""
        context = torch.stack([self._pretrained[caption] for caption in wanted])
        with torch.no_grad(), self._autocast(), self.baseline.pretrained():
            predict = self.on.frozen or self.on.predict
            return predict(*self._repeated(x_t, t, len(wanted)), context).float()

    def _repeated(self, x_t: Tensor, t: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The noisy latents and timesteps, on the device, repeated until there are so many rows."""
        times = rows // len(x_t)
        return x_t.repeat(times, 1, 1, 1), t.repeat(times).to(self.on.device)

    def _autocast(self):
        dtype = AUTOCAST[self.options.precision]
        return torch.autocast(self.on.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def _line(self) -> str:
        log = self.log
        line = f"loss {log.recent('l_sub'):.4f}"
        for name in self.baseline.own_terms:
            line += f" · {name.removeprefix('l_')} {log.recent(name):.4f}"
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
