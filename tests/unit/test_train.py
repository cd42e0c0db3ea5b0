"""The loop on toy networks: what each step draws, computes, may change and must leave alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from comfy_sude import train
from comfy_sude.baselines import DreamBooth, DreamBoothLoRA
from comfy_sude.baselines.base import Networks
from comfy_sude.baselines.dreambooth import DreamBoothSettings
from comfy_sude.baselines.dreambooth_lora import DreamBoothLoRASettings
from comfy_sude.data import Generators, Latents
from comfy_sude.diffusion import NoiseProcess
from comfy_sude.recipe import Options, Prior, Recipe
from comfy_sude.train import Predictors, Trainer

from .attention_toy import Calls

AB = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2, 0)
SUBJECT, CATEGORY, EMPTY = "photo of a sks dog", "photo of a dog", ""
PRIORS = ("class images", "distillation", "off")


pytestmark = pytest.mark.usefixtures("one_thread", "like_comfyuis_executor")


class ToyUNet(nn.Module):
    """Noise from noisy latents, timestep and caption, in a few hundred weights."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.time = nn.Linear(2, 8)
        self.to_k = nn.Linear(6, 8)
        self.conv_out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x_t, t, context):
        time = torch.stack([t / 1000, (t / 100).sin()], 1).to(x_t.dtype)
        condition = self.time(time) + self.to_k(context).mean(1)
        return self.conv_out(F.silu(self.conv_in(x_t) + condition[:, :, None, None]))


class ToyText(nn.Module):
    """One row of weights per caption, so that it shows whose encoding a gradient reached."""

    CAPTIONS = (SUBJECT, CATEGORY, EMPTY)

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(len(self.CAPTIONS), 3, 6))
        self.q_proj = nn.Linear(6, 6)

    def forward(self, captions):
        rows = self.rows[[self.CAPTIONS.index(caption) for caption in captions]]
        return rows + self.q_proj(rows)


class Toy:
    """A training on toy networks that start the same every time."""

    def __init__(self, *, w_s=0.4, prior="class images", process=None, pictures=1, lora=False, unet=ToyUNet, **changes):
        torch.manual_seed(0)
        self.unet, self.text = unet(), ToyText()
        self.incoming = copy.deepcopy((self.unet, self.text))
        for module in (self.unet, self.text):
            module.requires_grad_(False)
        seed = changes.pop("seed", 5)
        w_r = changes.pop("w_r", 2.0)
        settings = {"w_s": w_s, "steps": changes.pop("steps", 4), "learning_rate": changes.pop("learning_rate", 1e-2)}
        baseline = (DreamBoothLoRASettings if lora else DreamBoothSettings)(**settings)
        options = Options(prior=Prior(kind=prior, w_r=w_r), **changes)
        self.recipe = Recipe("dog", "DreamBooth", baseline, options, seed).checked()
        self.process = process or NoiseProcess(AB)
        self.predict, self.encode = Calls(self.unet), Calls(self.text)
        self.frozen = None if lora else Calls(self.incoming[0])
        self.example, self.classes = posteriors(pictures, seed=1), posteriors(6, seed=2)
        self.baseline = (DreamBoothLoRA if lora else DreamBooth)(self.recipe, Networks(self.unet, self.text))
        on = Predictors(self.process, self.predict, self.encode, torch.device("cpu"), self.frozen)
        self.trainer = Trainer(self.baseline, on, self.example, self.classes if prior == "class images" else None)

    def run(self, steps=4):
        for _ in range(steps):
            self.trainer.step()
        return self

    @property
    def log(self):
        return self.trainer.log.values

    @property
    def weights(self):
        return {name: p.detach() for net in (self.unet, self.text) for name, p in net.named_parameters()}

    def equals(self, other) -> bool:
        return all(torch.equal(p, other.weights[name]) for name, p in self.weights.items())


def posteriors(count, seed, side=4) -> Latents:
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, 2, 4, side, side, generator=g)
    return Latents(mean, 0.1 + 0.1 * torch.rand(mean.shape, generator=g))


# --- w_s = 0 is the plain baseline


def plain_dreambooth(unet, text, example, classes, *, seed, steps, lr, w_r, process):
    """DreamBooth with prior preservation as anybody would write it, on the same random streams. Returns the losses."""
    unet.requires_grad_(True)
    text.requires_grad_(True)
    g = Generators(seed)
    optimizer = torch.optim.AdamW([*unet.parameters(), *text.parameters()], lr=lr, weight_decay=0.01, fused=True)

    def draw(pictures):
        pick = torch.randint(len(pictures), (1,), generator=g.crops)
        mirrored = torch.randint(2, (1,), generator=g.crops)
        mean, std = pictures.mean[pick, mirrored], pictures.std[pick, mirrored]
        z = mean + std * torch.randn(mean.shape, generator=g.posterior)
        noise = torch.randn(z.shape, generator=g.noise)
        t = torch.randint(1000, (1,), generator=g.timesteps)
        return process.add_noise(z, noise, t), process.target(z, noise, t), t

    losses = []
    for _ in range(steps):
        x_t, target, t = draw(example)
        if classes is None:
            loss = F.mse_loss(unet(x_t, t, text([SUBJECT])), target)
        else:
            x_p, target_p, t_p = draw(classes)
            both = unet(torch.cat([x_t, x_p]), torch.cat([t, t_p]), text([SUBJECT, CATEGORY]))
            loss = F.mse_loss(both[:1], target) + w_r * F.mse_loss(both[1:], target_p)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("prior", ["class images", "off"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_w_s_zero_is_plain_dreambooth_bit_for_bit(prior, prediction):
    process = NoiseProcess(AB, prediction)
    toy = Toy(w_s=0.0, prior=prior, process=process).run(8)
    plain = Toy(w_s=0.0, process=process)  # for its networks and pictures only
    classes = plain.classes if prior == "class images" else None
    losses = plain_dreambooth(
        plain.unet, plain.text, plain.example, classes, seed=5, steps=8, lr=1e-2, w_r=2.0, process=process
    )
    assert toy.equals(plain)
    assert not toy.equals(Toy(w_s=0.0, prior=prior, process=process)), "nothing was trained"
    total = [a + 2 * b for a, b in zip(toy.log["l_sub"], toy.log["l_prior"], strict=True)]
    assert total == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize(("prior", "rows"), [("class images", 2), ("distillation", 2), ("off", 1)])
def test_w_s_zero_does_not_compute_the_category_and_empty_predictions(prior, rows):
    toy = Toy(w_s=0.0, prior=prior)
    before = len(toy.encode.calls)
    toy.run(3)
    assert toy.predict.rows(with_gradient=True) == 3 * rows
    assert toy.predict.rows(with_gradient=False) == 0
    assert sum(len(args[0]) for args, _ in toy.encode.calls[before:]) == 3 * rows
    assert toy.log["l_sude"] == toy.log["gate"] == toy.log["gap"] == [0, 0, 0]


@pytest.mark.parametrize("prior", PRIORS)
def test_sude_does_not_change_what_the_baseline_draws(prior):
    drawn = []
    for w_s in (0.0, 0.4):
        toy = Toy(w_s=w_s, prior=prior).run(6)
        drawn.append([(args[0].clone(), args[1]) for args, gradient in toy.predict.calls if gradient])
    for (x, t), (x_sude, t_sude) in zip(*drawn, strict=True):
        assert torch.equal(x, x_sude)
        assert torch.equal(t, t_sude)


def test_sude_does_not_touch_pytorchs_own_random_state():
    toy = Toy()
    before = torch.get_rng_state()
    toy.run(2)
    assert torch.equal(before, torch.get_rng_state())


# --- a, c and u


def reference_terms(toy, unet, text, x_t, t, truncate=True):
    """l_sude, gate and gap of one drawn batch in posterior-mean space (float64); c and u by `unet` and `text`."""

    def noise(net, encoder, caption):
        with torch.no_grad():
            raw = net(x_t, t, encoder([caption]).expand(len(x_t), -1, -1)).double()
        if toy.process.prediction == "eps":
            return raw
        ab = AB[t].view(-1, 1, 1, 1)
        return ab.sqrt() * raw + (1 - ab).sqrt() * x_t.double()

    a = noise(toy.unet, toy.text, SUBJECT)
    c, u = noise(unet, text, CATEGORY), noise(unet, text, EMPTY)
    losses, gates, gaps = [], [], []
    for i, step in enumerate(t.clamp(min=1).tolist()):
        ab, ab_prev = AB[step], AB[step - 1]
        beta = 1 - ab / ab_prev
        variance, c1 = beta * (1 - ab_prev) / (1 - ab), beta * ab_prev.sqrt() / (1 - ab)
        mu_a, mu_c, mu_u = (-c1 * (1 / ab - 1).sqrt() * e[i] for e in (a, c, u))  # without the part they share
        raw = ((mu_a - mu_c).pow(2).mean() - (mu_a - mu_u).pow(2).mean()) / (2 * variance + 1e-6)
        tau = -(mu_c - mu_u).pow(2).mean() / (2 * variance + 1e-6)
        gates.append(float(raw > tau) if truncate else 1.0)
        losses.append((gates[-1] * raw / c1).item())
        gaps.append(((c[i] - a[i]) * (c[i] - u[i])).mean().item())
    return (sum(values) / len(values) for values in (losses, gates, gaps))


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("reference", ["current", "pretrained"])
def test_each_step_adds_the_papers_loss_on_the_batch_it_drew(prior, batch_size, reference):
    toy = Toy(prior=prior, batch_size=batch_size, reference=reference)
    gates = []
    for _ in range(6):
        terms = toy.trainer.losses()
        (x, t, _), _ = next(call for call in reversed(toy.predict.calls) if call[1])
        unet, text = (toy.unet, toy.text) if reference == "current" else toy.incoming
        loss, gate, gap = reference_terms(toy, unet, text, x[:batch_size], t[:batch_size])
        assert terms["l_sude"].item() == pytest.approx(loss, rel=2e-3, abs=1e-6)
        assert terms["gap"].item() == pytest.approx(gap, rel=2e-3, abs=1e-8)
        assert terms["gate"].item() == pytest.approx(gate)
        gates.append(gate)
        toy.run(2)
    assert max(gates) > 0, "the loss was never on"


def test_without_truncation_the_gate_stays_open_in_training():
    toy = Toy(truncation=False, prior="off").run(12)
    assert toy.log["gate"] == [1] * 12
    assert not toy.equals(Toy(prior="off").run(12)), "the gate never closed, so this test proves nothing"


def test_the_spike_at_timestep_zero_is_there_only_when_faithful():
    weights = {}
    for t0 in ("clamp", "faithful"):
        toy = Toy(t0=t0, prior="off", truncation=False)
        toy.trainer.generators.timesteps.manual_seed(seed_that_draws_zero())
        weights[t0] = toy.trainer.losses()["l_sude"].item()
        assert toy.predict.calls[0][0][1].item() == 0
    assert weights["faithful"] / weights["clamp"] == pytest.approx(850.7231 / 1.0024, rel=1e-3)


def seed_that_draws_zero() -> int:
    drawn = (torch.randint(1000, (1,), generator=torch.Generator().manual_seed(seed)).item() for seed in range(100_000))
    return next(seed for seed, t in enumerate(drawn) if t == 0)


def test_a_velocity_model_trains_as_the_noise_model_that_predicts_the_same():
    class AsVelocity(ToyUNet):
        """The same noise, told as a velocity: v = (eps - sqrt(1 - ab) x_t) / sqrt(ab)."""

        def forward(self, x_t, t, context):
            ab = AB[t].view(-1, 1, 1, 1)
            return (super().forward(x_t, t, context) - (1 - ab).sqrt().float() * x_t) / ab.sqrt().float()

    def gradients(toy):
        l_sude = toy.trainer.losses()["l_sude"]
        return l_sude, torch.autograd.grad(l_sude, list(toy.unet.parameters()))

    opened = 0
    for seed in range(12):
        by_noise = Toy(seed=seed, prior="off")
        by_velocity = Toy(seed=seed, prior="off", process=NoiseProcess(AB, "v"), unet=AsVelocity)
        (loss, expected), (loss_v, gradient) = gradients(by_noise), gradients(by_velocity)
        opened += bool(loss)
        torch.testing.assert_close(loss_v, loss, rtol=5e-3, atol=1e-6)
        for actual, theirs in zip(gradient, expected, strict=True):
            torch.testing.assert_close(actual, theirs, rtol=5e-3, atol=1e-4 * theirs.abs().max().item() + 1e-8)
    assert opened > 2


# --- where gradients go


def text_gradient(toy, terms, *names):
    """[3 captions] size of the gradient of each caption's row."""
    (gradient,) = torch.autograd.grad(sum(terms[name] for name in names), toy.text.rows, retain_graph=True)
    return gradient.abs().flatten(1).sum(1)


@pytest.mark.parametrize("prior", PRIORS)
def test_sude_teaches_the_subject_caption_only(prior):
    for seed in range(20):
        toy = Toy(prior=prior, truncation=False, seed=seed)
        subject, category, empty = text_gradient(toy, toy.trainer.losses(), "l_sude").tolist()
        assert subject > 0
        assert category == 0
        assert empty == 0


def test_the_category_caption_learns_from_class_images_as_if_there_were_no_sude():
    gradients = []
    for w_s in (0.0, 0.4):
        toy = Toy(w_s=w_s, truncation=False)
        terms = toy.trainer.losses()
        names = ["l_sub", "l_prior", *(["l_sude"] if w_s else [])]
        (gradient,) = torch.autograd.grad(sum(terms[name] for name in names), toy.text.rows)
        gradients.append(gradient)
    assert gradients[0][1].any()
    torch.testing.assert_close(gradients[0][1], gradients[1][1])
    assert not gradients[1][2].any()


@pytest.mark.parametrize("prior", PRIORS)
def test_sudes_gradient_reaches_the_unet_through_the_subjects_prediction_only(prior):
    """The same gradient as with c and u handed in as constants."""
    toy = Toy(prior=prior, truncation=False)
    terms = toy.trainer.losses()
    gradients = torch.autograd.grad(terms["l_sude"], list(toy.unet.parameters()))
    (x, t, context), _ = next(call for call in toy.predict.calls if call[1])
    a = toy.unet(x[:1], t[:1], context[:1].detach())
    with torch.no_grad():
        c, u = (toy.unet(x[:1], t[:1], toy.text([caption])) for caption in (CATEGORY, EMPTY))
    ab, ab_prev = AB[t[:1]], AB[t[:1] - 1]
    lam = ab_prev.sqrt() * (1 - ab) / (2 * ab * (1 - ab_prev))  # t is not small here
    assert t[0] > 20
    expected = torch.autograd.grad(
        (lam.float() * ((a - c).pow(2) - (a - u).pow(2)).mean()).sum(), list(toy.unet.parameters())
    )
    for gradient, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=5e-3, atol=1e-3 * theirs.abs().max().item())


# --- cost


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    ("prior", "reference", "with_gradient", "without", "frozen"),
    [
        ("class images", "current", 2, 2, 0),
        ("off", "current", 1, 2, 0),
        ("distillation", "current", 2, 1, 1),  # c is the prior pass's own prediction
        ("class images", "pretrained", 2, 0, 2),
    ],
)
def test_a_step_computes_no_prediction_it_does_not_need(prior, reference, with_gradient, without, frozen, batch_size):
    toy = Toy(prior=prior, reference=reference, batch_size=batch_size).run(1)
    assert toy.predict.rows(with_gradient=True) == with_gradient * batch_size
    assert toy.predict.rows(with_gradient=False) == without * batch_size
    assert toy.frozen.rows(with_gradient=False) == frozen * batch_size
    assert toy.frozen.rows(with_gradient=True) == 0
    assert len([1 for _, gradient in toy.predict.calls if gradient]) == 1, "subject and prior share one forward"


@pytest.mark.parametrize("prior", PRIORS)
def test_each_caption_is_encoded_once_a_step(prior):
    toy = Toy(prior=prior)
    before = len(toy.encode.calls)
    toy.run(1)
    encoded = [caption for args, _ in toy.encode.calls[before:] for caption in args[0]]
    assert sorted(encoded) == sorted([SUBJECT, CATEGORY, EMPTY])


def test_captions_are_encoded_once_in_all_when_the_text_encoder_does_not_train():
    toy = Toy(lora=True)
    object.__setattr__(toy.baseline.recipe.baseline, "train_text_encoder", False)
    toy.run(5)
    assert sorted(caption for args, _ in toy.encode.calls for caption in args[0]) == sorted([SUBJECT, CATEGORY, EMPTY])


# --- prior preservation


def test_distillation_holds_the_category_where_the_pretrained_model_has_it():
    toy = Toy(prior="distillation")
    toy.run(5)
    assert toy.log["l_prior"][0] == pytest.approx(0, abs=1e-12)
    terms = toy.trainer.losses()
    (x, t, _), _ = next(call for call in reversed(toy.predict.calls) if call[1])
    with torch.no_grad():
        now = toy.unet(x[1:], t[1:], toy.text([CATEGORY]))
        before = toy.incoming[0](x[:1], t[:1], toy.incoming[1]([CATEGORY]))
    assert torch.equal(x[0], x[1]), "Eq. 14 looks at the subject's own noisy latents"
    assert terms["l_prior"].item() == pytest.approx((now - before).pow(2).mean().item(), rel=1e-4)
    assert terms["l_prior"].item() > 1e-6


def test_class_images_are_learned_under_the_category_caption_with_their_own_noise():
    toy = Toy()
    terms = toy.trainer.losses()
    (x, t, context), _ = toy.predict.calls[0]
    torch.testing.assert_close(context[1], toy.text([CATEGORY])[0])
    assert t[0] != t[1]
    assert not torch.equal(x[0], x[1])
    z = (x[1] - (1 - AB[t[1]]).sqrt() * noise_drawn(toy, 1)) / AB[t[1]].sqrt()
    distance = ((z - toy.classes.mean) / toy.classes.std).pow(2).mean((2, 3, 4)).sqrt()
    assert distance.min() < 2, "the latent is none of the class images"
    assert terms["l_prior"] > 0


def noise_drawn(toy, index):
    g = Generators(toy.recipe.seed).noise
    return [torch.randn(1, 4, 4, 4, generator=g) for _ in range(index + 1)][index][0]


@pytest.mark.parametrize("prior", ["class images", "distillation"])
def test_weight_zero_switches_the_prior_off(prior):
    assert Toy(prior=prior, w_r=0.0).run(4).equals(Toy(prior="off").run(4))


def test_prior_off_learns_the_subject_alone():
    toy = Toy(prior="off").run(3)
    assert toy.log["l_prior"] == [0, 0, 0]
    assert text_gradient(toy, toy.trainer.losses(), "l_sub")[1:].tolist() == [0, 0]


# --- pictures


def test_every_picture_of_the_subject_and_its_mirror_image_is_used():
    for flip, expected in ((True, 6), (False, 3)):
        toy = Toy(pictures=3, flip=flip, sample_latent=False, prior="off", w_s=0.0)
        seen = set()
        draw = toy.example.draw

        def watched(*args, draw=draw, seen=seen):
            z = draw(*args)
            seen.add(tuple(z.flatten().tolist()))
            return z

        object.__setattr__(toy.example, "draw", watched)
        toy.run(60)
        assert len(seen) == expected


def test_all_samples_of_a_batch_have_their_own_timestep_and_noise():
    toy = Toy(batch_size=4, prior="off", sample_latent=False, flip=False)
    toy.trainer.losses()
    (x, t, _), _ = toy.predict.calls[0]
    assert len(t.unique()) == 4
    assert len({tuple(sample.flatten().tolist()) for sample in x}) == 4


# --- precision and optimizers


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("prior", PRIORS)
def test_half_precision_trains_float32_weights(precision, prior):
    class Watched(ToyUNet):
        def forward(self, *args):
            prediction = super().forward(*args)
            self.dtype = prediction.dtype
            return prediction

    toy = Toy(precision=precision, prior=prior, unet=Watched, learning_rate=1e-3).run(6)
    assert toy.unet.dtype == train.AUTOCAST[precision]
    assert all(p.dtype == torch.float32 for p in toy.weights.values())
    assert not toy.equals(Toy(precision=precision, prior=prior, unet=Watched, learning_rate=1e-3))
    full = Toy(prior=prior, unet=Watched, learning_rate=1e-3).run(6)
    assert toy.log["l_sub"] == pytest.approx(full.log["l_sub"], rel=0.05)


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor"])
def test_the_optimizer_lowers_the_loss(optimizer):
    toy = Toy(optimizer=optimizer, learning_rate=3e-2, prior="off", w_s=0.0).run(100)
    assert sum(toy.log["l_sub"][-30:]) < 0.85 * sum(toy.log["l_sub"][:30])


def test_the_learning_rate_and_weight_decay_are_the_recipes():
    toy = Toy(learning_rate=3e-4, weight_decay=0.25)
    (group,) = toy.trainer.optimizer.param_groups
    assert isinstance(toy.trainer.optimizer, torch.optim.AdamW)
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (3e-4, 0.25, (0.9, 0.999), 1e-8)
    assert len(group["params"]) == len(toy.weights), "the whole UNet and the whole text encoder train"


def test_the_gradient_is_clipped_when_asked(monkeypatch):
    seen = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: seen.append(args) or clip(*args))
    assert not Toy(max_grad_norm=1e-3).run(3).equals(Toy().run(3))
    assert [limit for _, limit in seen] == [1e-3] * 3


# --- reproducibility, failure, reporting


@pytest.mark.parametrize("prior", PRIORS)
def test_the_same_seed_gives_the_same_bits_twice_and_another_seed_does_not(prior):
    first, again, other = (Toy(prior=prior, seed=seed).run(5) for seed in (9, 9, 10))
    assert first.equals(again)
    assert first.log == again.log
    assert not first.equals(other)


def test_a_loss_that_is_not_finite_stops_with_advice_and_leaves_the_weights_finite():
    toy = Toy(learning_rate=1.0)
    with pytest.raises(FloatingPointError, match=r"step \d+: use a smaller learning rate or w_s, or precision fp32"):
        toy.trainer.optimizer.param_groups[0]["lr"] = 1e30
        toy.run(20)
    assert len(toy.log["l_sub"]) < 20


def test_a_picture_with_a_broken_latent_is_not_trained_on():
    toy = Toy(prior="off")
    toy.example.mean.fill_(float("nan"))
    before = copy.deepcopy(toy.weights)
    with pytest.raises(FloatingPointError, match="step 1"):
        toy.run(1)
    assert all(torch.equal(p, before[name]) for name, p in toy.weights.items())


class Report:
    def __init__(self, stop_at=None):
        self.phases, self.steps, self.stop_at, self.enough = [], [], stop_at, False

    def phase(self, name, total, done=0):
        self.phases.append((name, total))

    def step(self, done, line):
        self.steps.append((done, line))
        if done == self.stop_at:
            raise InterruptedError


def test_every_step_is_reported_with_loss_gate_and_speed():
    toy, report = Toy(steps=5), Report()
    log = toy.trainer.run(report)
    assert report.phases == [("training", 5)]
    assert [done for done, _ in report.steps] == [1, 2, 3, 4, 5]
    assert "loss 0." in report.steps[-1][1] or "loss 1." in report.steps[-1][1]
    assert "gate" in report.steps[-1][1]
    assert "steps/s" in report.steps[-1][1]
    assert log.steps == 5
    assert all(len(values) == 5 for values in log.values.values())
    assert log.seconds > 0


def test_an_interrupt_stops_within_the_step():
    toy = Toy(steps=50)
    with pytest.raises(InterruptedError):
        toy.trainer.run(Report(stop_at=3))
    assert toy.trainer.log.steps == 3


def test_a_plain_run_does_not_speak_of_a_gate():
    toy, report = Toy(w_s=0.0, steps=1), Report()
    toy.trainer.run(report)
    assert "gate" not in report.steps[-1][1]


# --- DreamBooth LoRA in the same loop


def test_lora_trains_its_adapters_and_nothing_else():
    toy = Toy(lora=True).run(4)
    before = Toy(lora=True)
    assert toy.equals(before), "the networks' own weights changed"
    results = {name: tensors for _, name, tensors in toy.baseline.result()}
    assert set(results) == {"to_k.weight", "q_proj.weight"}
    assert all(tensors["up"].any() for tensors in results.values())
    untrained = {name: tensors for _, name, tensors in before.baseline.result()}
    assert not any(tensors["up"].any() for tensors in untrained.values())


def test_lora_needs_no_frozen_copy_for_pretrained_predictions():
    toy = Toy(lora=True, reference="pretrained", prior="off")
    toy.run(4)
    terms = toy.trainer.losses()
    (x, t, _), _ = next(call for call in reversed(toy.predict.calls) if call[1])
    loss, gate, gap = reference_terms(toy, *toy.incoming, x, t)
    assert terms["gap"].item() == pytest.approx(gap, rel=2e-3, abs=1e-8)
    assert terms["l_sude"].item() == pytest.approx(loss, rel=2e-3, abs=1e-6)
    assert terms["gate"].item() == gate
    assert all(adapter.enabled for adapter in toy.baseline.adapters.values())


def test_lora_starts_from_the_seeds_own_adapters():
    first, again, other = (Toy(lora=True, seed=seed).baseline.result() for seed in (1, 1, 2))
    for (_, _, a), (_, _, b), (_, _, c) in zip(first, again, other, strict=True):
        assert torch.equal(a["down"], b["down"])
        assert not torch.equal(a["down"], c["down"])


def test_trained_weights_are_the_result_of_dreambooth():
    toy = Toy().run(2)
    result = {(network, name): tensors["weight"] for network, name, tensors in toy.baseline.result()}
    assert result.keys() == {("model", n) for n, _ in toy.unet.named_parameters()} | {
        ("clip", n) for n, _ in toy.text.named_parameters()
    }
    assert torch.equal(result["model", "to_k.weight"], toy.unet.to_k.weight)
