"""One trial: a setting, trained step by step, judged at several steps; every judgement one row of plain values."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from comfy_sude.baselines import REGISTRY
from comfy_sude.recipe import Options, Prior, Recipe
from comfy_sude.train import Trainer

from .identity import UNSEEN, IdentityJudge, load_identity
from .judge import Judge, load_judge
from .learner import Learner, World
from .world import ATTRIBUTES, PATTERNS, Subject, prompt, random_subject

PICTURES = 2  # of every caption
SAMPLING_STEPS, GUIDANCE, SEED = 10, 4.0, 4242
PROBES = 8  # noisy latents at which the drift of c and u is measured


@dataclass(frozen=True)
class Setting:
    """What is trained. The defaults of what is not here are the pack's own."""

    category: str
    individual: int
    """Seed of the individual (`individual`)."""
    method: str = "DreamBooth"
    w_s: float = 0.0
    learning_rate: float = 3e-5
    token_learning_rate: float = 2e-2
    seed: int = 0
    truncation: bool = True
    reference: str = "current"
    prior: float = 1.0
    """Weight w_r; 0 trains without class images."""
    batch: int = 1
    initializer: str = ""
    """Word the new word starts from; empty is "phol" (Custom Diffusion) or the category (ViCo)."""
    hold: float = 0.0
    """Weight of an empty-prompt term on class images; not part of the pack."""
    ask_category: bool = False
    """Prompts name the category after the new word, also where the method's own captions do not."""
    evaluate_at: tuple[int, ...] = (50, 100, 200)
    tag: str = ""

    def key(self) -> dict:
        """Plain values that name the setting."""
        return dataclasses.asdict(self) | {"evaluate_at": list(self.evaluate_at)}


def individual(seed: int) -> Subject:
    """The individual of a seed, plain in place and size so that nothing but its looks is private."""
    drawn = random_subject(np.random.default_rng(seed))
    return dataclasses.replace(drawn, dx=0.0, dy=0.0, scale=1.0)


def recipe(setting: Setting) -> Recipe:
    """The pack's Recipe for a setting."""
    name = setting.method.split(",")[0]
    settings = REGISTRY[name].settings
    values = {"w_s": setting.w_s, "steps": max(setting.evaluate_at), "learning_rate": setting.learning_rate}
    if name == "Custom Diffusion":
        # the world knows neither "ktn" nor the prefixes' words
        values |= {"initializer": setting.initializer or "phol", "augmentation": "off", "scale_learning_rate": False}
    if name == "ViCo":
        values |= {"templates": "plain", "token_learning_rate": setting.token_learning_rate}
        values |= {"initializer": setting.initializer}
    wanted = setting.prior > 0 and settings.TAKES_PRIOR
    prior = Prior(kind="class images" if wanted else "off", w_r=setting.prior)
    options = Options(
        batch_size=setting.batch, prior=prior, truncation=setting.truncation, reference=setting.reference,
        gradient_checkpointing=False, flip=False,
    )  # fmt: skip
    return Recipe(setting.category, setting.method, settings(**values), options, setting.seed)


class HoldingTrainer(Trainer):
    """A Trainer that also asks the empty caption to go on predicting the noise of class images."""

    hold = 0.0

    def losses(self) -> dict[str, Tensor]:
        """The terms, the empty caption's added to the prior's."""
        terms = super().losses()
        z, noise, t = self._noised(self._class_images())
        context = self.encode(("",))[""][None].expand(len(z), -1, -1)
        with self._autocast():
            predicted = self.on.predict(self.on.process.add_noise(z, noise, t), t, context)
        terms["l_prior"] = terms["l_prior"] + self.hold * (predicted.float() - noise).pow(2).mean()
        return terms


@dataclass
class Judges:
    """Who looks at the pictures."""

    shape: Judge = field(default_factory=load_judge)
    identity: IdentityJudge = field(default_factory=load_identity)


def judge(learner: Learner, judges: Judges, ask_category: bool = False, pictures: int = PICTURES) -> dict:
    """Sample every attribute's prompt and the plain one; shares right and identity, in 0..1.

    "attribute" is right or wrong whatever the category, "aligned" needs both; identity leaves out pictures of UNSEEN.
    """
    category, subject = learner.recipe.category, learner.subject
    named = f"{learner.recipe.baseline.identifier} {category}" if ask_category else learner.named
    captions = [prompt(named, attribute) for attribute in (None, *ATTRIBUTES)]
    drawn = learner.sample(captions, pictures, SEED, SAMPLING_STEPS, GUIDANCE)
    verdict, reading = judges.shape.classify(drawn), judges.identity.read(drawn)
    labels = torch.arange(len(captions)).repeat_interleave(pictures)
    right = (verdict.attribute.argmax(1) == labels).float()
    chance = verdict.attribute[torch.arange(len(drawn)), labels]
    of_category, score = verdict.is_category(category).float(), reading.score(subject)
    body, second = reading.distances(subject)
    plain, asked = labels == 0, labels > 0
    seen = asked & (labels != 1 + ATTRIBUTES.index(UNSEEN))
    by_attribute = [round(right[labels == i + 1].mean().item(), 3) for i in range(len(ATTRIBUTES))]
    found = {
        "attribute": right[asked].mean(),
        "attribute_probability": chance[asked].mean(),
        "aligned": (right * of_category)[asked].mean(),
        "category_right": of_category[asked].mean(),
        "category_right_plain": of_category[plain].mean(),
        "identity": score[seen].mean(),
        "identity_plain": score[plain].mean(),
        "body": body[seen].mean(),
        "second": second[seen].mean(),
        "pattern": reading.pattern[seen][:, PATTERNS.index(subject.pattern)].mean(),
    }
    return {name: round(value.item(), 4) for name, value in found.items()} | {"by_attribute": by_attribute}


class Drift:
    """How far the category's and the empty caption's predictions have moved, at fixed noisy latents of the example."""

    def __init__(self, learner: Learner):
        self.learner = learner
        process, generator = learner.on.process, torch.Generator().manual_seed(5)
        z = learner.baseline.example.mean[:1, 0].expand(PROBES, -1, -1, -1)
        self.t = torch.linspace(50, 950, PROBES).long()
        self.x = process.add_noise(z, torch.randn(z.shape, generator=generator), self.t)
        with torch.no_grad():
            self.fixed = learner.words(["", learner.baseline.category_caption]).detach()
        self.before = self._predict(learner.frozen)

    def _predict(self, net) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            u, c = (net(self.x, self.t, context.expand(PROBES, -1, -1)).float() for context in self.fixed)
        return u, c

    def measure(self) -> dict:
        """Mean squared distances: u and c to their beginning, a to c and to u, c to u now and at the beginning."""
        (u0, c0), (u, c) = self.before, self._predict(self.learner.net)
        found = {"u_moved": u - u0, "c_moved": c - c0, "c_u": c - u, "c_u_before": c0 - u0}
        if not self.learner.baseline.looks_at_reference:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                context = self.learner.words([self.learner.baseline.subject_caption]).expand(PROBES, -1, -1)
                a = self.learner.net(self.x, self.t, context).float()
            found |= {"a_c": a - c, "a_u": a - u, "a_c0": a - c0, "a_u0": a - u0}
        return {name: float(f"{value.pow(2).mean().item():.4g}") for name, value in found.items()}


def run(setting: Setting, world: World, judges: Judges, class_images: dict, pictures: int = PICTURES) -> list[dict]:
    """Train and judge; one row for each of `evaluate_at`."""
    wanted = recipe(setting)
    if setting.prior > 0 and wanted.options.prior.active and setting.category not in class_images:
        class_images[setting.category] = world.class_images(setting.category)
    trainer = type("Holding", (HoldingTrainer,), {"hold": setting.hold}) if setting.hold else Trainer
    subject = individual(setting.individual)
    learner = Learner(world, wanted, subject, class_images.get(setting.category), trainer)
    drift, rows, spent, before = Drift(learner), [], 0.0, 0
    for step in setting.evaluate_at:
        began = time.process_time()
        learner.train_to(step)
        spent += time.process_time() - began
        log = learner.trainer.log.values
        window = {name: float(np.mean(values[before:])) for name, values in log.items() if values}
        row = {
            "step": step,
            "train_cpu_seconds": round(spent, 2),
            **judge(learner, judges, setting.ask_category, pictures),
        }
        row |= {name: float(f"{value:.4g}") for name, value in window.items()}
        rows.append(row | {"drift": drift.measure()})
        before = step
    return rows
