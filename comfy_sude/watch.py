"""Looking at a training while it runs: its curves, the denoising error at fixed timesteps, previews of prompts.

Nothing here changes what is learned: no random stream of the training is touched and no gradient is taken.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import captions
from .log import Log
from .recipe import Watching
from .train import Trainer

POINTS = 200  # most points of a curve
ROWS = 16  # most rows of previews that are kept
PROMPTS = 4  # most preview prompts
GUIDANCE = 7.5
VALIDATE_EVERY = 50  # steps
LEVELS = (0.1, 0.3, 0.5, 0.7)  # of all timesteps: where the validation value looks
SUBJECT = "[subject]"  # in a prompt, what names the subject


class Curves:
    """A log's curves in at most so many points, each the mean of as many steps; more steps make coarser points."""

    def __init__(self, points: int = POINTS):
        self.most, self.every, self.steps = points, 1, 0
        self._sums: list[list[float]] = []  # of each point and term
        self._terms: tuple[str, ...] = ()

    def feed(self, log: Log) -> None:
        """Take what the log has gained since the last time."""
        self._terms = tuple(log.values)
        for step in range(self.steps, log.steps):
            values = [log.values[term][step] for term in self._terms]
            if step % self.every == 0:
                self._sums.append(values)
            else:
                self._sums[-1] = [a + b for a, b in zip(self._sums[-1], values, strict=True)]
            self.steps = step + 1
            if len(self._sums) == self.most and self.steps % self.every == 0:
                pairs = zip(self._sums[::2], self._sums[1::2], strict=True)
                self._sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
                self.every *= 2

    def means(self) -> dict[str, list[float]]:
        """The mean of every term at each point."""
        sums = list(self._sums)  # another thread may ask
        counts = [self.every] * len(sums)
        if sums and self.steps % self.every:
            counts[-1] = self.steps % self.every
        return {
            term: [point[index] / count for point, count in zip(sums, counts, strict=True)]
            for index, term in enumerate(self._terms)
        }


@dataclass
class Row:
    """One row of previews: the step it was drawn at and its pictures, as whoever decoded them names them."""

    step: int
    pictures: list[dict]


@dataclass
class Previews:
    """What was drawn so far.

    Attributes:
        prompts: as they are drawn.
        rows: the oldest first; every second of the older ones goes when there are too many.
        seconds: spent on them.
        note: why there are none at the moment.
        stopped: whether there will be no more.
    """

    prompts: list[str]
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""
    stopped: bool = False

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(row)
        if len(self.rows) > ROWS:
            self.rows = [*self.rows[:-2:2], *self.rows[-2:]]


class Watched:
    """What a training's panel shows of it.

    Args:
        log: of the training.
        w_s: its weight of the SuDe loss.
        total: steps it is to take.
        watching: when and how previews are drawn.
        prompts: of the previews.
    """

    def __init__(self, log: Log, w_s: float, total: int, watching: Watching | None = None, prompts: list[str] = ()):
        self.log, self.w_s, self.total, self.watching = log, w_s, total, watching
        self.curves = Curves()
        self.curves.feed(log)
        self.previews = Previews(list(prompts)) if prompts and watching and watching.preview_every else None
        self._began, self._took = time.monotonic(), None

    @property
    def seconds(self) -> float:
        """Since the training began or went on, until its end."""
        return time.monotonic() - self._began if self._took is None else self._took

    @property
    def share(self) -> float:
        """Of that time, what previews took."""
        return self.previews.seconds / max(self.seconds, 1e-9) if self.previews else 0.0


class Watcher(Watched):
    """Follows a Trainer.

    Args:
        trainer: about to run.
        watching: when and how previews are drawn.
        decode: latents [N, C, h, w] of previews and the step -> their pictures. May raise OSError or
            torch.OutOfMemoryError, which end the previews and nothing else.
        tick: called between two sampling steps; may raise to stop the training.
    """

    def __init__(
        self,
        trainer: Trainer,
        watching: Watching,
        decode: Callable[[Tensor, int], list[dict]],
        tick: Callable[[], None],
    ):
        recipe = trainer.recipe
        prompts = wanted(watching, trainer.baseline.words(recipe))
        super().__init__(trainer.log, recipe.baseline.w_s, recipe.baseline.steps, watching, prompts)
        self.trainer, self.decode, self.tick = trainer, decode, tick
        self._steps = 0  # followed so far
        self._due = False  # whether a row waits to be drawn
        self._last = 0.0  # seconds of the last row

    def begin(self) -> None:
        """Before the first step."""
        self._began = time.monotonic()
        if self.log.steps == 0:
            self.validate()

    def end(self) -> None:
        """After the last."""
        self.validate()
        self.release()

    def release(self) -> None:
        """Let go of the trainer; what was seen stays."""
        if self._took is None:
            self._took = self.seconds
        if self.previews and not self.previews.stopped:
            self.previews.note = "" if self.previews.rows else "too short for previews within their limit of the time"
        self.trainer = self.decode = self.tick = None

    def after_step(self, trainer: Trainer) -> None:
        """Take up the step's values; look closer where it is time."""
        self.curves.feed(self.log)
        self._steps += 1
        step = self.log.steps
        if step % VALIDATE_EVERY == 0:
            self.validate()
        if self.previews is None or self.previews.stopped:
            return
        self._due |= step % self.watching.preview_every == 0
        if self._due and self._affordable():
            self._due = False
            self.preview()

    def validate(self) -> None:
        """Add the denoising error at the fixed timesteps, under the subject's caption and fixed noise, to the log."""
        if self.log.validation and self.log.validation[-1][0] == self.log.steps:
            return
        trainer, process = self.trainer, self.trainer.on.process
        caption = trainer.baseline.subject_caption
        z = trainer.baseline.example.mean[:1, 0]
        source = torch.Generator("cpu").manual_seed(0)
        errors = []
        with torch.no_grad():
            context = trainer.encode((caption,))[caption][None]
            for level in LEVELS:
                t = torch.tensor([int(level * process.num_timesteps)])
                noise = torch.randn(z.shape, generator=source)
                target = process.target(z, noise, t).to(trainer.on.device)
                predicted = trainer.predict_under(process.add_noise(z, noise, t), t, context, caption)
                errors.append((predicted - target).pow(2).mean())
        self.log.validation.append((self.log.steps, torch.stack(errors).mean().item()))

    def preview(self) -> None:
        """Draw a row."""
        began = time.monotonic()
        self.previews.note = "drawing previews"
        try:
            latents = torch.cat([self._sample(prompt) for prompt in self.previews.prompts])
            self.previews.add(Row(self.log.steps, self.decode(latents, self.log.steps)))
            self.previews.note = ""
        except (OSError, torch.OutOfMemoryError) as error:
            said = str(error).strip() or type(error).__name__
            self.previews.note = f"previews stopped: {said.splitlines()[0][:200]}"
            self.previews.stopped = True
        self._last = time.monotonic() - began
        self.previews.seconds += self._last

    def _affordable(self) -> bool:
        """Whether a row drawn now keeps the previews' share of the time within its limit."""
        limit = self.watching.preview_limit / 100
        cost = self._last or self._estimate()
        if self.previews.seconds + cost <= limit * (self.seconds + cost):
            return True
        self.previews.note = f"one row takes about {cost:.2g} s: it waits until that is within {limit:.0%} of the time"
        return False

    def _estimate(self) -> float:
        """Seconds that the first row will take: predictions it makes over those of a training step.

        A trained row counts for three predictions (backward is two), four with checkpointing.
        """
        options = self.trainer.options
        rows = options.batch_size * (2 if options.prior.active else 1)
        step = rows * (4 if options.gradient_checkpointing else 3) + (2 * options.batch_size if self.w_s else 0)
        drawn = 2 * len(self.previews.prompts) * self.watching.preview_steps
        return drawn / step * self.seconds / max(self._steps, 1)

    def _sample(self, prompt: str) -> Tensor:
        """[1, C, h, w] latent of a prompt: DDIM with classifier-free guidance, from the same noise each time."""
        trainer, process = self.trainer, self.trainer.on.process
        shape = trainer.baseline.example.mean[:1, 0].shape
        x = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(self.previews.prompts.index(prompt)))
        times = torch.linspace(process.num_timesteps - 1, 0, self.watching.preview_steps + 1).round().long()
        with torch.no_grad():
            encoded = trainer.encode((prompt, captions.EMPTY))
            context = torch.stack([encoded[prompt], encoded[captions.EMPTY]])
            x = x.to(trainer.on.device)
            for index, now in enumerate(times[:-1]):
                self.tick()
                t = now.expand(2)
                positive, negative = trainer.predict_under(x.repeat(2, 1, 1, 1), t, context, prompt).split(1)
                guided = negative + GUIDANCE * (positive - negative)
                then = times[index + 1 : index + 2]
                x = process.ddim(x, guided, now[None], then if index + 2 < len(times) else None)
        return x.float().cpu()


def wanted(watching: Watching, words: str) -> list[str]:
    """The prompts to preview, with the subject's words in their place.

    Raises:
        ValueError: more than four.
    """
    prompts = [captions.normalize(line.replace(SUBJECT, words)) for line in watching.prompts]
    prompts = list(dict.fromkeys(prompts))
    if len(prompts) > PROMPTS:
        raise ValueError(
            f"preview_prompts has {len(prompts)} prompts, but at most {PROMPTS} are drawn: remove "
            f"{len(prompts) - PROMPTS}."
        )
    return prompts
