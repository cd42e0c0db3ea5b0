"""Train the UNet and the meaning of the world's words together.

The text encoder is too costly to run at every step, so it runs once a period: within one, samples read a table of
caption encodings and leave their gradient in it; at its end the sum goes once through the encoder to the token rows.
After the first third of the time the words are fixed, and so is the table.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from . import text
from .diffusion import STEPS, alphas_cumprod, loss_weights
from .run import Workers, amp, load_state, save_state
from .train_vae import HELD_OUT
from .unet import UNet
from .world import ATTRIBUTES, CATEGORIES, prompt

BATCH = 32  # the fewer pictures there is time for, the smaller; 64 where a GPU makes steps cheap
RATE, WARMUP, FLAT = 7e-4, 150, 0.35  # AdamW; constant until 35 % of the time, then a cosine to 2 %
EMA, EMA_EVERY = 0.999, 4  # decay a step; steps between updates
NO_CAPTION, NO_ATTRIBUTE, IDENTIFIER = 0.12, 0.5, 0.5  # shares of captions emptied, without attribute, with a filler
WORD_SHARE, WORD_PERIOD, WORD_RATE = 1 / 3, 40, 1.5e-2  # of the time words learn; steps a period; Adam's rate
PER_CATEGORY = 1 + len(ATTRIBUTES)
BLOCK = len(CATEGORIES) * PER_CATEGORY  # captions of one identifier
log = logging.getLogger(__name__)


class Words(nn.Module):
    """The trained token rows and the encodings of captions under them.

    Row 0 of `table` is the empty caption, then come BLOCK captions without identifier. While words are learned, the
    plain captions of one identifier a period follow, afterwards BLOCK captions for each identifier.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.encoder = text.Encoder(text.seeded_weights(), device)
        self.rows = nn.Parameter(self.encoder.initial_rows())
        self.optimizer = torch.optim.Adam([self.rows], lr=WORD_RATE, betas=(0.8, 0.98))
        self.device, self.fixed = device, False
        self.encoded = self.gathered = self.table = None

    def begin_period(self) -> None:
        """Encode the plain captions and those of one random identifier, ready to gather gradients."""
        names = tuple(text.IDENTIFIERS)
        name = names[int(torch.randint(len(names), ()))]
        captions = text.captions() + [prompt(category, None, name) for category in CATEGORIES]
        tokens = torch.tensor([text.tokenize(caption) for caption in captions], device=self.device)
        with amp(self.device):
            self.encoded = self.encoder(tokens, self.rows)
        self.table = self.encoded.detach().bfloat16().requires_grad_()
        self.gathered = torch.zeros_like(self.encoded)

    def end_period(self, rate: float) -> None:
        """Send the gathered gradient through the encoder, once."""
        self.optimizer.zero_grad(set_to_none=True)
        self.encoded.backward(self.gathered)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()

    @torch.no_grad()
    def fix(self) -> None:
        """Round the rows to what is stored (fp16) and encode every caption once."""
        self.rows.copy_(self.rows.half().float())
        self.rows.requires_grad_(False)
        tokens = torch.tensor([text.tokenize(c) for c in text.captions(("", *text.IDENTIFIERS))], device=self.device)
        self.encoded = self.gathered = None

        def encode(part: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), amp(self.device):
                return self.encoder(part, self.rows).bfloat16()

        with ThreadPoolExecutor(Workers(self.device).count) as pool:
            self.table = torch.cat(list(pool.map(encode, tokens.split(32))))
        self.fixed = True

    def draw(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels [B, 2] -> rows of `table` [B]: dropout of attribute and caption, one identifier a batch."""
        count = len(labels)
        attribute = labels[:, 1].masked_fill(torch.rand(count) < NO_ATTRIBUTE, 0)
        index = 1 + labels[:, 0] * PER_CATEGORY + attribute
        named = torch.rand(count) < 0.8 if torch.rand(()) < IDENTIFIER / 0.8 else torch.zeros(count, dtype=torch.bool)
        if self.fixed:
            identifier = 1 + int(torch.randint(len(text.IDENTIFIERS), ()))
            index = torch.where(named, index + identifier * BLOCK, index)
        else:
            index = torch.where(named & (attribute == 0), 1 + BLOCK + labels[:, 0], index)
        return index.masked_fill(torch.rand(count) < NO_CAPTION, 0)


def learning_rate(step: int, done: float, peak: float, flat: float) -> float:
    """Linear warm-up over steps, then constant, then a cosine over the time that is left."""
    decay = max(0.0, (done - flat) / (1 - flat))
    return peak * min(1.0, (step + 1) / WARMUP) * (0.49 * (1 + math.cos(math.pi * min(1.0, decay))) + 0.02)


def export(path: Path, ema: UNet, words: Words) -> None:
    """Write the averaged net and the rows in fp32."""
    tensors = {f"unet.{name}": weight.detach().cpu().contiguous() for name, weight in ema.state_dict().items()}
    tensors["rows"] = words.rows.detach().cpu().clone()
    part = path.with_suffix(".part")
    save_file(tensors, part)
    part.replace(path)


def train(
    latents: torch.Tensor,
    labels: torch.Tensor,
    seconds: float,
    state: Path,
    out: Path,
    device: torch.device,
    peak: float = RATE,
    flat: float = FLAT,
    export_every: float = 240,
    words_until: float | None = None,
) -> None:
    """Train for `seconds` of wall time in all, resuming from `state`; keep `out` (see `export`) up to date.

    latents: [N, 4, 8, 8] of unit variance; labels: [N, 2] category and attribute index (0: none).
    """
    net = UNet().to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).requires_grad_(False)
    words = Words(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    step, spent = load_state(state, net, optimizer, ema=ema, words=words)
    words_until = seconds * WORD_SHARE if words_until is None else words_until
    alphas, weights = alphas_cumprod().to(device), loss_weights().to(device)
    latents, labels = latents[:-HELD_OUT].float(), labels[:-HELD_OUT]
    half, workers = copy.deepcopy(net).bfloat16(), Workers(device)
    parameters, half_parameters, averages = (list(m.parameters()) for m in (net, half, ema))

    def loss(z: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        alpha = alphas[t][:, None, None, None]
        x = (alpha.sqrt() * z + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        used, index = index.unique(return_inverse=True)
        error = (half(x.bfloat16(), t, words.table[used], index).float() - noise).square().mean((1, 2, 3))
        return (error * weights[t]).mean(), error.mean()

    begin, total = time.monotonic() - spent, []
    saved = exported = marked = spent
    while (spent := time.monotonic() - begin) < seconds:
        done = spent / seconds
        if not words.fixed and spent >= words_until:
            words.fix()
            log.info("words fixed at step %d, %.0f s", step, spent)
        if not words.fixed and (words.table is None or step % WORD_PERIOD == 0):
            if words.table is not None:
                words.end_period(WORD_RATE * max(0.1, 1 - spent / words_until))
            words.begin_period()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, done, peak, flat)
        chosen = torch.randint(len(latents), (BATCH,))
        index, order = words.draw(labels[chosen]).sort()  # so that the shares have different captions to read
        index, z = index.to(device), latents[chosen[order]].to(device)
        t = torch.randint(STEPS, (BATCH,), device=device)
        with torch.no_grad():
            torch._foreach_copy_(half_parameters, parameters)
        inputs = half_parameters if words.fixed else [*half_parameters, words.table]
        gradients, (weighted, plain) = workers.gradients(loss, inputs, z, t, torch.randn_like(z), index)
        if not words.fixed:
            words.gathered += gradients.pop()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % EMA_EVERY == 0:
            keep = min(EMA, (1 + step) / (10 + step)) ** EMA_EVERY
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - keep)
        total.append((weighted.item(), plain.item()))
        if step % 100 == 0:
            means, speed = torch.tensor(total[-100:]).mean(0).tolist(), 100 * BATCH / (spent - marked)
            log.info("unet step %d, %.0f s, %.0f/s, loss %.4f, mse %.4f", step, spent, speed, *means)
            marked = spent
        if spent - saved > 180:
            save_state(state, net, optimizer, step, spent, ema=ema.state_dict(), words=words.state_dict())
            saved = spent
        if spent - exported > export_every:
            export(out, ema, words)
            exported = spent
    if not words.fixed:
        words.fix()
    save_state(state, net, optimizer, step, seconds, ema=ema.state_dict(), words=words.state_dict())
    export(out, ema, words)
    log.info("unet done: %d steps of %d samples", step, BATCH)
