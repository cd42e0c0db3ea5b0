"""Custom Diffusion: what trains, which views and captions it sees, its loss, and SuDe on top of it."""

import dataclasses

import pytest
import torch

from comfy_sude.baselines.base import Networks
from comfy_sude.baselines.custom_diffusion import CustomDiffusion, CustomDiffusionSettings
from comfy_sude.data import Generators, Views
from comfy_sude.recipe import Options, Prior, Recipe
from comfy_sude.train import Predictors, Trainer

from .attention_toy import PROCESS, Calls, networks, posteriors

SUBJECT, CATEGORY = "photo of a <new1> dog", "photo of a dog"


pytestmark = pytest.mark.usefixtures("one_thread", "like_comfyuis_executor")


def recipe(prior="class images", w_s=0.0, seed=3, category="dog", **changes) -> Recipe:
    names = CustomDiffusionSettings.__dataclass_fields__
    settings = {k: v for k, v in changes.items() if k in names}
    options = {k: v for k, v in changes.items() if k not in names}
    settings = CustomDiffusionSettings(w_s=w_s, **{"steps": 4, "learning_rate": 1e-2, "views": 6, **settings})
    prior = Prior(kind=prior) if isinstance(prior, str) else prior
    return Recipe(category, "Custom Diffusion", settings, Options(prior=prior, **options), seed).checked()


def augmented(side=4) -> Views:
    """Three views: whole, small on the left, enlarged."""
    masks = torch.ones(3, side, side)
    masks[1, :, side // 2 :] = 0
    return Views(torch.zeros(0), ("", "very small", "zoomed in"), masks, torch.tensor([0.4, 0.3, 0.3]))


class Toy:
    """A training on toy networks that start the same every time."""

    def __init__(self, example=None, **changes):
        self.recipe = recipe(**changes)
        self.unet, self.text = networks()
        self.incoming = {n: p.clone() for net in (self.unet, self.text) for n, p in net.named_parameters()}
        self.predict, self.encode = Calls(self.unet), Calls(self.text)
        self.baseline = CustomDiffusion(self.recipe, Networks(self.unet, self.text, self.text))
        on = Predictors(PROCESS, self.predict, self.encode, torch.device("cpu"))
        example = example or posteriors(3, 1, views=augmented())
        classes = posteriors(6, 2) if self.recipe.options.prior.kind == "class images" else None
        self.trainer = Trainer(self.baseline, on, example, classes)

    def run(self, steps=4):
        for _ in range(steps):
            self.trainer.step()
        return self

    @property
    def weights(self):
        own = {n: p.detach() for net in (self.unet, self.text) for n, p in net.named_parameters()}
        return {**own, "token": self.baseline.vectors.detach()}


# --- What trains


def test_only_keys_values_and_the_word_change():
    toy = Toy(w_s=2.0).run()
    changed = {name for name, p in toy.weights.items() if name == "token" or not torch.equal(p, toy.incoming[name])}
    keys_and_values = {n for n in toy.incoming if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert changed == {*keys_and_values, "token"} and len(keys_and_values) == 6
    assert not torch.equal(toy.weights["token"], networks()[1].vectors("ktn"))
    results = {(network, name) for network, name, _ in toy.baseline.result()}
    assert results == {("model", n) for n in keys_and_values} | {("token", "<new1>")}


def test_the_word_starts_from_the_initializer_and_several_vectors_learn_apart():
    toy = Toy(vectors=2, initializer="rare word")
    start = networks()[1].vectors("rare word").mean(0)
    assert torch.equal(toy.baseline.vectors.detach(), torch.stack([start, start]))
    toy.run(2)
    assert not torch.equal(*toy.baseline.vectors.detach())


def test_keys_and_values_of_the_start_token_take_no_gradient():
    toy = Toy()
    layer = next(iter(toy.baseline.layers.values()))
    context = torch.randn(2, 5, 8, requires_grad=True)
    out = layer(context)
    assert torch.equal(out, torch.nn.functional.linear(context, layer.weight))
    out.sum().backward()
    expected = context.detach()[:, 1:].sum((0, 1)).expand(8, 8)
    assert torch.allclose(layer.weight.grad, expected, atol=1e-5)
    assert context.grad[:, 0].abs().max() == 0 < context.grad[:, 1:].abs().min()


@pytest.mark.parametrize(
    ("scale", "prior", "batch", "rate"),
    [(True, "class images", 0, 4e-5), (True, "off", 0, 2e-5), (True, "class images", 1, 2e-5), (False, "off", 3, 1e-5)],
)
def test_the_learning_rate_is_scaled_by_the_pictures_of_a_step(scale, prior, batch, rate):
    toy = Toy(prior=prior, batch_size=batch, learning_rate=1e-5, scale_learning_rate=scale)
    (group,) = toy.trainer.optimizer.param_groups
    assert group["lr"] == pytest.approx(rate) and group["weight_decay"] == 0.01


# --- The preset


def test_the_preset_is_the_published_one_for_one_gpu():
    settings = CustomDiffusionSettings()
    assert (settings.w_s, settings.steps, settings.learning_rate, settings.identifier) == (2.0, 500, 1e-5, "<new1>")
    assert (settings.initializer, settings.scale_learning_rate, settings.augmentation) == ("ktn", True, "Adobe")
    options = Recipe("dog", "Custom Diffusion", settings, Options()).checked().options
    prior = options.prior
    assert (options.batch_size, prior.kind, prior.w_r, prior.number) == (2, "class images", 1.0, 200)
    assert (prior.steps, prior.cfg, prior.sampler, prior.negative_prompt) == (50, 6.0, "euler_ancestral", "")
    own = Options(batch_size=1, prior=Prior(kind="off"))
    assert Recipe("dog", "Custom Diffusion", settings, own).checked().options == own


# --- Views


def make_views(side=512, count=300, images=None, **changes) -> Views:
    images = torch.rand(1, 600, 700, 3) if images is None else images
    return CustomDiffusion.views(recipe(views=count, **changes), images, side)


def test_views_are_small_plain_or_enlarged_as_often_as_published():
    views = make_views(count=400)
    plain = float(views.weights[0])
    assert plain == pytest.approx(0.40, abs=0.005), "spec: small 0.27, plain 0.40, zoom 0.33"
    assert float(views.weights.sum()) == pytest.approx(1.0)
    small = sum(prefix in ("a far away", "very small") for prefix in views.prefixes[1:]) / 400
    assert small == pytest.approx(0.27 / 0.60, abs=0.07)
    assert set(views.prefixes) == {"", "a far away", "very small", "zoomed in", "close up"}
    assert len(views.pixels) == 401 and views.masks.shape == (401, 64, 64)
    for pixels in (views.pixels[0], views.pixels[1], views.pixels[400]):
        assert pixels.shape == (512, 512, 3) and 0 <= pixels.min() and pixels.max() <= 1


def test_a_small_view_lies_on_grey_and_its_mask_on_the_cells_inside_of_it():
    views = make_views(count=40, images=torch.ones(1, 64, 64, 3))
    sizes = []
    for pixels, prefix, mask in zip(views.pixels, views.prefixes, views.masks, strict=True):
        shown = (pixels > 0.75).all(-1)
        rows, columns = shown.any(1).nonzero().flatten(), shown.any(0).nonzero().flatten()
        top, left, size = int(rows[0]), int(columns[0]), len(rows)
        if prefix not in ("a far away", "very small"):
            assert size == 512 and mask.all()
            continue
        sizes.append(size)
        assert len(columns) == size and shown[top : top + size, left : left + size].all()
        assert torch.equal(pixels[~shown].unique(), torch.tensor([0.5])), "the canvas is not grey"
        expected = torch.zeros(64, 64)
        expected[top // 8 + 1 : (top + size) // 8 - 1, left // 8 + 1 : (left + size) // 8 - 1] = 1
        assert torch.equal(mask, expected)
    assert sizes and all(170 <= size <= 308 and size % 2 == 0 for size in sizes)


@pytest.mark.parametrize("side", [64, 72, 128])
def test_no_mask_is_empty_however_small_the_pictures_are(side):
    views = make_views(side=side, count=200)
    assert views.masks.flatten(1).sum(1).min() > 0


def test_enlarged_views_are_crops_of_a_larger_picture():
    ramp = torch.linspace(0, 1, 512)[None, :, None, None].expand(1, 512, 512, 3)
    views = make_views(count=60, images=ramp)
    for pixels, prefix in zip(views.pixels, views.prefixes, strict=True):
        if prefix in ("zoomed in", "close up"):
            slope = float(pixels[-1, 256, 0] - pixels[0, 256, 0])
            assert 1 / 1.42 < slope < 1 / 1.19


def test_diffusers_shrinks_at_every_size_and_off_never():
    views = make_views(count=60, augmentation="diffusers", images=torch.ones(1, 64, 64, 3))
    assert float(views.weights[0]) == 0
    sizes = [float((pixels > 0.75).all(-1).float().mean()) ** 0.5 * 512 for pixels in list(views.pixels)[1:]]
    unsaid = [size for size, prefix in zip(sizes, views.prefixes[1:], strict=True) if not prefix]
    assert unsaid and min(unsaid) > 300 and max(unsaid) <= 512
    plain = make_views(count=5, augmentation="off")
    assert len(plain.pixels) == 1 and plain.masks is None and not plain.prefixes


def test_the_same_seed_makes_the_same_views():
    image = torch.rand(1, 80, 80, 3)
    first, again, other = (make_views(64, 10, image, seed=seed) for seed in (1, 1, 2))
    stacked = [torch.stack(list(views.pixels)) for views in (first, again, other)]
    assert torch.equal(stacked[0], stacked[1]) and first.prefixes == again.prefixes
    assert not torch.equal(stacked[0], stacked[2])


# --- Captions and masks of a batch


def test_each_sample_has_its_views_caption_its_category_and_its_mask():
    toy = Toy()
    batch = toy.baseline.draw(64, Generators(1))
    assert len(set(batch.captions)) == 3
    for caption, category, mask in zip(batch.captions, batch.categories, batch.mask, strict=True):
        assert caption.replace("<new1> ", "") == category
        assert caption.endswith(SUBJECT) and category.endswith(CATEGORY)
        left, right = mask[0, :, 0], mask[0, :, -1]
        assert left.all() != right.all() if caption.startswith("very small") else mask.all()
    small = [mask for caption, mask in zip(batch.captions, batch.mask, strict=True) if caption.startswith("very")]
    assert len({bool(mask[0, 0, 0]) for mask in small}) == 2, "a mirrored view needs a mirrored mask"


def test_c_is_predicted_under_the_samples_own_caption_without_the_word():
    toy = Toy(w_s=2.0, prior="off")
    for _ in range(6):
        before = len(toy.predict.calls)
        drawn = []
        draw = toy.baseline.draw
        toy.baseline.draw = lambda *args, draw=draw, drawn=drawn: drawn.append(draw(*args)) or drawn[-1]
        toy.trainer.step()
        toy.baseline.draw = draw
        (with_gradient, without) = toy.predict.calls[before:]
        batch = drawn[0]
        assert with_gradient[1] and not without[1]
        expected = toy.text([*batch.categories, "", ""])
        assert torch.equal(without[0][2], expected)
        assert torch.equal(without[0][0], with_gradient[0][0].repeat(2, 1, 1, 1))


def test_every_caption_a_step_can_use_is_known_before():
    toy = Toy()
    batch = toy.baseline.draw(64, Generators(1))
    pairs = CustomDiffusion.all_captions(toy.recipe)
    assert len(pairs) == 5
    assert set(zip(batch.captions, batch.categories, strict=True)) <= set(pairs)


# --- The loss


def test_the_loss_is_the_mean_where_the_mask_is():
    g = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 2, 4, 4, 4, generator=g)
    mask = augmented().masks[:2, None]
    toy = Toy()
    loss = toy.baseline.subject_loss(prediction, target, mask)
    assert float(loss[0]) == pytest.approx(float((prediction[0] - target[0]).pow(2).mean()))
    assert float(loss[1]) == pytest.approx(float((prediction[1] - target[1])[:, :, :2].pow(2).mean()))


@pytest.mark.parametrize(("norm", "subject", "prior"), [("mean", 1, 1), ("Adobe", 4, 4), ("diffusers", 4, 1)])
def test_the_published_normalisations_count_the_channels(norm, subject, prior):
    prediction, target = torch.randn(2, 1, 4, 4, 4)
    mean = float((prediction - target).pow(2).mean())
    baseline = Toy(loss_norm=norm).baseline
    assert float(baseline.subject_loss(prediction, target, None)) == pytest.approx(subject * mean)
    assert float(baseline.prior_loss(prediction, target)) == pytest.approx(prior * mean)


@pytest.mark.parametrize("sude_mask", [False, True])
def test_sude_looks_where_it_is_told_to(sude_mask):
    toy = Toy(w_s=2.0, truncation=False, sude_mask=sude_mask, prior="off")
    drawn = []
    draw = toy.baseline.draw
    toy.baseline.draw = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    toy.trainer._noised = lambda z, noised=toy.trainer._noised: drawn.append(noised(z)) or drawn[-1]
    terms = toy.trainer.losses()
    batch, (z, noise, t) = drawn
    x_t = PROCESS.add_noise(z, noise, t)
    a, c, u = (toy.unet(x_t, t, toy.text(list(wanted))) for wanted in (batch.captions, batch.categories, ("", "")))
    mask = batch.mask.expand_as(a) if sude_mask else torch.ones_like(a)
    previous = PROCESS.alphas_cumprod[t - 1]
    assert t.min() > 10, "the formula without its epsilon is only good from there on"
    weight = previous.sqrt() * (1 - PROCESS.alphas_cumprod[t]) / (2 * PROCESS.alphas_cumprod[t] * (1 - previous))
    difference = (((a - c).pow(2) - (a - u).pow(2)) * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)
    assert terms["l_sude"].item() == pytest.approx((weight * difference).mean().item(), rel=1e-3)


# --- w_s = 0 is the plain baseline


def plain_custom_diffusion(*, seed, steps, lr, prior, loss_scale=(1.0, 1.0)):
    """Custom Diffusion as anybody would write it, on the same random streams: (weights, losses)."""
    unet, text = networks()
    layers = [m for n, m in unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    for layer in layers:
        layer.weight.requires_grad_(True)
        layer.register_forward_hook(lambda _m, _i, out: torch.cat([out[:, :1].detach(), out[:, 1:]], 1))
    token = torch.nn.Parameter(text.vectors("ktn"))
    text.learn("<new1>", token)
    g = Generators(seed)
    weights = [*(layer.weight for layer in layers), token]
    rate = lr * (4 if prior else 2)
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01, fused=True)
    example, classes, views = posteriors(3, 1), posteriors(6, 2), augmented()
    category = text([CATEGORY]).detach()

    def noised(latents, pick):
        mirrored = torch.randint(2, (2,), generator=g.crops)
        mean, std = latents.mean[pick, mirrored], latents.std[pick, mirrored]
        z = mean + std * torch.randn(mean.shape, generator=g.posterior)
        noise = torch.randn(z.shape, generator=g.noise)
        t = torch.randint(1000, (2,), generator=g.timesteps)
        return PROCESS.add_noise(z, noise, t), noise, t, mirrored

    losses = []
    for _ in range(steps):
        pick = torch.multinomial(views.weights, 2, replacement=True, generator=g.crops)
        x_t, target, t, mirrored = noised(example, pick)
        captions = [f"{views.prefixes[i]} {SUBJECT}".strip() for i in pick]
        mask = torch.stack([m.flip(1) if f else m for m, f in zip(views.masks[pick], mirrored, strict=True)])[:, None]
        unique = list(dict.fromkeys(captions))
        encoded = dict(zip(unique, text(unique), strict=True))
        context = torch.stack([encoded[caption] for caption in captions])
        if prior:
            x_p, target_p, t_p, _ = noised(classes, torch.randint(6, (2,), generator=g.crops))
            context = torch.cat([context, category.expand(2, -1, -1)])
            out = unet(torch.cat([x_t, x_p]), torch.cat([t, t_p]), context)
        else:
            out = unet(x_t, t, context)
        error = (out[:2] - target).pow(2)
        loss = ((error * mask).flatten(1).sum(1) / mask.flatten(1).sum(1) / 4).mean()
        if prior:
            loss = loss + (out[2:] - target_p).pow(2).flatten(1).mean(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    own = {n: p.detach() for net in (unet, text) for n, p in net.named_parameters()}
    return {**own, "token": token.detach()}, losses


@pytest.mark.parametrize("prior", [True, False])
def test_w_s_zero_is_plain_custom_diffusion_bit_for_bit(prior):
    kind = Prior(kind="class images", w_r=1.0) if prior else Prior(kind="off")
    toy = Toy(prior=kind, seed=7).run(8)
    weights, losses = plain_custom_diffusion(seed=7, steps=8, lr=1e-2, prior=prior)
    assert weights.keys() == toy.weights.keys()
    assert all(torch.equal(weights[name], p) for name, p in toy.weights.items())
    log = toy.trainer.log.values
    assert [a + b for a, b in zip(log["l_sub"], log["l_prior"], strict=True)] == pytest.approx(losses, rel=1e-6)
    assert toy.predict.rows(with_gradient=False) == 0, "c and u were predicted for nothing"


def test_the_texts_that_cannot_change_are_encoded_once():
    toy = Toy(w_s=2.0).run(8)
    without = [args[0] for args, gradient in toy.encode.calls if not gradient]
    assert sorted(caption for captions in without for caption in captions) == sorted(
        {caption for captions in without for caption in captions}
    )
    with_gradient = {caption for args, gradient in toy.encode.calls if gradient for caption in args[0]}
    assert all("<new1>" in caption for caption in with_gradient)


# --- The pretrained model as reference


@pytest.mark.parametrize("prior", ["class images", "distillation"])
def test_the_pretrained_reference_is_the_incoming_model(prior):
    toy = Toy(w_s=2.0, prior=prior, reference="pretrained").run(3)
    incoming, text = networks()
    args, gradient = toy.predict.calls[-1] if prior == "class images" else toy.predict.calls[-3]
    assert not gradient
    before = {n: layer.weight.clone() for n, layer in toy.baseline.layers.items()}
    with toy.baseline.pretrained():
        assert torch.equal(toy.unet(*args), incoming(*args))
    assert not torch.equal(toy.unet(*args), incoming(*args))
    assert all(torch.equal(layer.weight, before[n]) for n, layer in toy.baseline.layers.items())


# --- Mistakes


def test_a_word_that_is_in_a_caption_is_refused():
    unet, _ = networks()
    for identifier in ("photo", "small", "close"):
        with pytest.raises(ValueError, match="is a word of the training caption"):
            CustomDiffusion.check(recipe(identifier=identifier), unet)
    CustomDiffusion.check(recipe(identifier="small", augmentation="off"), unet)
    with pytest.raises(ValueError, match="initializer is empty"):
        CustomDiffusion.check(recipe(initializer="  "), unet)
    with pytest.raises(ValueError, match="no cross-attention to text"):
        CustomDiffusion.check(recipe(), torch.nn.Linear(2, 2))


def test_recipe_values_are_held_against_their_bounds():
    for name, value in (("views", 0), ("vectors", 0), ("augmentation", "none"), ("loss_norm", "sum")):
        broken = dataclasses.replace(recipe(), baseline=CustomDiffusionSettings(**{name: value}))
        with pytest.raises(ValueError, match=f"^{name} is"):
            broken.checked()
