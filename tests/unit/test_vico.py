"""ViCo against a restatement in plain fp64: block, mask, regularisation, gradients; and SuDe on top of it."""

import math

import pytest
import torch
from torch import nn

from comfy_sude import image_attention
from comfy_sude.baselines import vico
from comfy_sude.baselines.base import Networks
from comfy_sude.baselines.vico import ViCo, ViCoSettings
from comfy_sude.data import Generators
from comfy_sude.image_attention import ImageBlock
from comfy_sude.recipe import Options, Prior, Recipe
from comfy_sude.train import Predictors, Trainer

from .attention_toy import HEADS, PROCESS, WIDTH, Calls, networks, posteriors

PLACES = ("output_blocks.1.1",)  # every second of three


pytestmark = pytest.mark.usefixtures("one_thread", "like_comfyuis_executor")


# --- The restatement: fp64, one head and one token at a time where that is clearer


def layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def attention(x, context, p, name, heads, seen=None):
    width = x.shape[-1]
    size = width // heads
    out = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        q = x @ p[f"{name}.to_q.weight"][part].T
        k = context @ p[f"{name}.to_k.weight"][part].T
        v = context @ p[f"{name}.to_v.weight"][part].T
        logits = q @ k.transpose(-1, -2) / math.sqrt(size)
        if seen is not None:
            logits = logits.masked_fill(~seen[:, None, :], -torch.finfo(logits.dtype).max)
        out.append(torch.softmax(logits, -1) @ v)
    return torch.cat(out, -1) @ p[f"{name}.to_out.0.weight"].T + p[f"{name}.to_out.0.bias"]


def image_block(x, reference, seen, p, heads):
    n = layer_norm(x, p["norm1.weight"], p["norm1.bias"])
    x = x + attention(n, n, p, "attn1", heads)
    n = layer_norm(x, p["norm2.weight"], p["norm2.bias"])
    x = x + attention(n, reference, p, "attn2", heads, seen)
    n = layer_norm(x, p["norm3.weight"], p["norm3.bias"])
    value, gate = (n @ p["ff.proj.weight"].T + p["ff.proj.bias"]).split(4 * x.shape[-1], dim=-1)
    gelu = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    return x + (value * gelu) @ p["ff.out.weight"].T + p["ff.out.bias"]


def otsu(p):
    """The mask of one map, number by number."""
    low, high = min(p), max(p)
    if high == low:
        return [True] * len(p)
    p = [(value - low) / (high - low) for value in p]
    best, threshold = None, None
    for step in range(10):
        below = [value for value in p if value < step / 10]
        above = [value for value in p if value >= step / 10]
        if not below or not above:
            continue
        gap = sum(below) / len(below) - sum(above) / len(above)
        score = len(below) / len(p) * len(above) / len(p) * gap**2
        if best is None or score > best:
            best, threshold = score, step / 10
    return [value >= threshold for value in p]


# --- Block, mask, regularisation


def block_and_input(width=16, heads=4, n=7, m=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    block = ImageBlock(width, heads)
    block.initialize(g)
    for norm in (block.norm1, block.norm2, block.norm3):
        norm.weight.data += 0.3 * torch.randn(width, generator=g)
        norm.bias.data += 0.3 * torch.randn(width, generator=g)
    x, reference = torch.randn(3, n, width, generator=g), 4 * torch.randn(3, m, width, generator=g)
    seen = torch.tensor([[True] * m, [False, True, False, True, True], [True] + [False] * (m - 1)])
    return block, x, reference, seen


def test_the_block_is_the_restatements_in_value_and_gradient():
    block, x, reference, seen = block_and_input()
    x.requires_grad_(True)
    reference.requires_grad_(True)
    out = block(x, reference, seen)
    target = torch.randn_like(out)
    (out * target).sum().backward()

    p = {name: parameter.detach().double().requires_grad_(True) for name, parameter in block.named_parameters()}
    x64, r64 = (t.detach().double().requires_grad_(True) for t in (x, reference))
    expected = image_block(x64, r64, seen, p, heads=4)
    (expected * target.double()).sum().backward()
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5)
    pairs = [(x.grad, x64.grad), (reference.grad, r64.grad)]
    pairs += [(parameter.grad, p[name].grad) for name, parameter in block.named_parameters()]
    for got, wanted in pairs:
        assert (got.double() - wanted).norm() < 1e-5 * wanted.norm()
    assert reference.grad[1, 0].abs().max() == 0, "a masked token of the reference was seen"


def test_a_block_has_the_published_parameters_and_pytorchs_random_start():
    width = 32
    block = ImageBlock(width, 8)
    assert sum(p.numel() for p in block.parameters()) == 20 * width**2 + 17 * width
    assert len(list(block.parameters())) == 20
    assert block.attn1.to_q.bias is None and block.attn2.to_out[0].bias is not None
    block.initialize(torch.Generator().manual_seed(1))
    again = ImageBlock(width, 8)
    again.initialize(torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), again.parameters(), strict=True))
    weight, bound = block.ff.out.weight.detach(), (4 * width) ** -0.5
    assert 0.95 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert block.ff.out.bias.detach().abs().max() > 0, "neither zero nor the identity"


@pytest.mark.parametrize("kind", ["uniform", "spiky", "two hills", "few values"])
def test_the_mask_is_otsus_threshold_of_ten(kind):
    g = torch.Generator().manual_seed(4)
    for _ in range(50):
        p = torch.rand(2, 37, generator=g)
        if kind == "spiky":
            p = p**8
        if kind == "two hills":
            p = p * 0.1 + (torch.rand(2, 37, generator=g) > 0.7).float()
        if kind == "few values":
            p = (p * 3).round() / 3
        assert image_attention.object_mask(p).tolist() == [otsu(row.tolist()) for row in p]


def test_a_map_that_is_the_same_everywhere_masks_nothing_and_no_gradient_goes_through_a_mask():
    p = torch.full((2, 9), 0.25)
    assert image_attention.object_mask(p).all()
    assert not image_attention.object_mask(torch.rand(1, 9, requires_grad=True)).requires_grad


def test_the_regularisation_compares_maps_scaled_to_their_maximum():
    p = torch.rand(2, 11, requires_grad=True)
    q = torch.rand(2, 11, requires_grad=True)
    loss = image_attention.attention_loss(p, q)
    loss.sum().backward()
    p64 = p.detach().double().requires_grad_(True)
    expected = 0.0
    for a, b in zip(p64, q.detach().double(), strict=True):
        expected = expected + sum((x / max(a) - y / max(b)) ** 2 for x, y in zip(a, b, strict=True)) / 11
    expected.backward()
    assert loss.sum().item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(p.grad.double(), p64.grad, rtol=1e-5, atol=1e-8)
    assert q.grad is None, "the end token's map is only looked at"


# --- Places


def unet_like(transformers_of_blocks):
    blocks = nn.ModuleList()
    for has in transformers_of_blocks:
        transformer = nn.Module()
        block = nn.Module()
        block.attn2, block.norm3 = nn.Module(), nn.LayerNorm(16)
        block.attn2.heads = 8
        transformer.transformer_blocks = nn.ModuleList([block])
        blocks.append(nn.ModuleList([nn.Identity(), transformer] if has else [nn.Identity()]))
    unet = nn.Module()
    unet.output_blocks = blocks
    return unet


@pytest.mark.parametrize(
    ("transformers", "expected"),
    [
        ([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [4, 6, 8, 10]),  # SD1.x
        ([1, 1, 1, 1], [1, 3]),
        ([1, 1, 0, 1], [1]),
        ([0, 0, 1], [2]),
        ([0, 0], []),
    ],
)
def test_places_are_every_second_decoder_transformer_from_the_deepest(transformers, expected):
    found = image_attention.places(unet_like(transformers))
    assert list(found) == [f"output_blocks.{number}.1" for number in expected]
    assert all(place == (16, 8) for place in found.values())


def test_a_unet_without_a_place_is_refused():
    with pytest.raises(ValueError, match="no cross-attention in its decoder.*use another baseline"):
        ViCo.check(recipe(), unet_like([0, 0]))


# --- The training


def recipe(w_s=0.0, seed=3, category="dog", prior=None, **changes) -> Recipe:
    names = ViCoSettings.__dataclass_fields__
    settings = {k: v for k, v in changes.items() if k in names}
    options = {k: v for k, v in changes.items() if k not in names}
    settings = ViCoSettings(w_s=w_s, **{"steps": 4, "learning_rate": 1e-3, "identifier": "*", **settings})
    return Recipe(category, "ViCo", settings, Options(prior=prior or Prior(kind="preset"), **options), seed).checked()


class Toy:
    """A training on toy networks that start the same every time."""

    def __init__(self, pictures=1, **changes):
        self.recipe = recipe(**changes)
        self.unet, self.text = networks()
        self.incoming = {n: p.clone() for net in (self.unet, self.text) for n, p in net.named_parameters()}
        self.predict, self.encode = Calls(self.unet), Calls(self.text)
        self.baseline = ViCo(self.recipe, Networks(self.unet, self.text, self.text))
        on = Predictors(PROCESS, self.predict, self.encode, torch.device("cpu"))
        self.trainer = Trainer(self.baseline, on, posteriors(pictures, 1))

    def run(self, steps=4):
        for _ in range(steps):
            self.trainer.step()
        return self

    @property
    def trained(self):
        return {**dict(self.baseline.blocks.named_parameters()), "token": self.baseline.vectors}

    def drawn(self):
        """(batch, z, noise, t) of the losses computed next, and those losses."""
        kept = []
        draw, noised = self.baseline.draw, self.trainer._noised
        self.baseline.draw = lambda *args: kept.append(draw(*args)) or kept[-1]
        self.trainer._noised = lambda z: kept.append(noised(z)) or kept[-1]
        terms = self.trainer.losses()
        return (kept[0], *kept[1]), terms


def test_the_preset_is_the_published_one():
    settings = ViCoSettings()
    assert (settings.w_s, settings.steps, settings.learning_rate, settings.identifier) == (1.5, 400, 1e-5, "*")
    assert (settings.token_learning_rate, settings.attention_weight) == (5e-3, 5e-4)
    assert (settings.sude_blocks, settings.unconditional_image) == (False, True)
    options = Recipe("dog", "ViCo", settings, Options()).checked().options
    assert (options.batch_size, options.prior.active) == (1, False)
    blocks, token = Toy(learning_rate=1e-5, batch_size=2).trainer.optimizer.param_groups
    assert (blocks["lr"], token["lr"], blocks["weight_decay"]) == (1e-5, pytest.approx(1e-2), 0.01)


def test_only_the_blocks_and_the_word_change():
    toy = Toy(w_s=1.5)
    before = {name: p.detach().clone() for name, p in toy.trained.items()}
    toy.run()
    for network in (toy.unet, toy.text):
        assert all(torch.equal(p, toy.incoming[name]) and p.grad is None for name, p in network.named_parameters())
    assert not any(torch.equal(p, before[name]) for name, p in toy.trained.items())
    results = {name for _, name, _ in toy.baseline.result()}
    assert results == {f"{PLACES[0]}.{n}" for n, _ in ImageBlock(WIDTH, HEADS).named_parameters()} | {"latent", "*"}
    (latent,) = (tensors["value"] for _, name, tensors in toy.baseline.result() if name == "latent")
    assert torch.equal(latent, posteriors(1, 1).mean[:1, 0])


@pytest.mark.parametrize("vectors", [1, 2])
def test_the_first_step_is_the_restatements(vectors):
    """Loss, regularisation and every gradient of the whole step in fp64, the mask and the block as restated above."""
    toy = Toy(batch_size=2, pictures=2, vectors=vectors)
    (batch, z, noise, t), terms = toy.drawn()
    loss = terms["l_sub"] + 5e-4 * terms["l_attention"]
    loss.backward()

    unet, text = (network.double() for network in networks())
    token = toy.baseline.vectors.detach().double().requires_grad_(True)
    text.learn("*", token)
    block = toy.baseline.blocks[image_attention.key(PLACES[0])]
    p = {name: parameter.detach().double().requires_grad_(True) for name, parameter in block.named_parameters()}
    x_t = PROCESS.add_noise(z.double(), noise.double(), t)
    regulariser, squared = 0.0, 0.0
    for row, caption in enumerate(batch.captions):
        context = text([caption])
        words = text.sequence(caption)
        at = [i for i, word in enumerate(words) if isinstance(word, tuple)]
        assert len(at) == vectors
        kept = {}

        class Watch:
            places, wants_attention = PLACES, True

            def tokens(self, place, tokens, kept=kept):
                kept["R"] = tokens
                return tokens

            def attention(self, place, probabilities, kept=kept):
                kept["A"] = probabilities

        unet(batch.reference[row : row + 1].double(), t[row : row + 1], context, Watch())
        column = kept["A"][0][:, at].mean(1)
        end = kept["A"][0][:, words.index("<end>")].detach()
        regulariser = regulariser + ((column / column.max() - end / end.max()) ** 2).mean() / 2
        seen = torch.tensor([otsu(column.tolist())])

        class Use:
            places, wants_attention = PLACES, False

            def tokens(self, place, tokens, kept=kept, seen=seen):
                return image_block(tokens, kept["R"], seen, p, HEADS)

        a = unet(x_t[row : row + 1], t[row : row + 1], context, Use())
        squared = squared + ((a - noise[row : row + 1].double()) ** 2).mean() / 2
    (squared + 5e-4 * regulariser).backward()
    assert terms["l_sub"].item() == pytest.approx(squared.item(), rel=1e-5)
    assert terms["l_attention"].item() == pytest.approx(regulariser.item(), rel=1e-5)
    pairs = [(toy.baseline.vectors.grad, token.grad)]
    pairs += [(parameter.grad, p[name].grad) for name, parameter in block.named_parameters()]
    for got, wanted in pairs:
        assert (got.double() - wanted).norm() < 1e-5 * wanted.norm()
    assert token.grad.norm() > 0


def test_the_regularisation_moves_the_word_only():
    toy = Toy()
    _, terms = toy.drawn()
    terms["l_attention"].backward()
    assert toy.baseline.vectors.grad.norm() > 0
    assert all(p.grad is None or p.grad.norm() == 0 for p in toy.baseline.blocks.parameters())


def test_the_reference_is_clean_another_picture_and_never_mirrored():
    toy = Toy(pictures=3, sample_latent=False, batch_size=64)
    batch = toy.baseline.draw(64, Generators(1))
    upright = posteriors(3, 1).mean[:, 0]
    picked = [[torch.equal(z, one) for one in upright].index(True) for z in batch.z]
    others = [[torch.equal(z, one) for one in upright].index(True) for z in batch.reference]
    assert set(picked) == set(others) == {0, 1, 2}
    assert all(a != b for a, b in zip(picked, others, strict=True))
    one = Toy(sample_latent=False).baseline.draw(4, Generators(1))
    assert torch.equal(one.z, one.reference), "with one picture the reference is the picture itself"


def test_the_reference_runs_at_the_same_time_and_under_the_same_caption_but_without_noise():
    toy = Toy(sample_latent=False).run(1)
    (reference, _), (noisy, _) = toy.predict.calls
    assert torch.equal(reference[0], posteriors(1, 1).mean[:1, 0])
    assert torch.equal(reference[1], noisy[1]) and torch.equal(reference[2], noisy[2])
    assert not torch.equal(reference[0], noisy[0])


def test_captions_vary_and_the_category_stands_where_the_word_was():
    toy = Toy(batch_size=200)
    batch = toy.baseline.draw(200, Generators(1))
    assert len(set(batch.captions)) > 25 and len(ViCo.all_captions(toy.recipe)) == len(vico.TEMPLATES) == 36
    for caption, category in zip(batch.captions, batch.categories, strict=True):
        assert caption.count("*") == 1 and caption.replace("*", "dog") == category
    plain = Toy(templates="plain").baseline.draw(2, Generators(1))
    assert (plain.captions[0], plain.categories[0]) == ("photo of a *", "photo of a dog")


def test_the_word_starts_from_the_categorys_last_word_or_the_one_named():
    text = networks()[1]
    assert torch.equal(Toy(category="stuffed animal").baseline.vectors.detach(), text.vectors("animal"))
    assert torch.equal(Toy(initializer="bear").baseline.vectors.detach(), text.vectors("bear"))


# --- SuDe


def test_c_and_u_are_the_pretrained_models():
    toy = Toy(w_s=1.5).run(3)
    unet, text = networks()
    *_, (args, gradient) = toy.predict.calls
    assert not gradient and len(args) == 3, "no taps: the blocks are bypassed"
    assert torch.equal(toy.unet(*args), unet(*args))
    toy2 = Toy(w_s=1.5)
    (batch, *_), _ = toy2.drawn()
    *_, (args, _) = toy2.predict.calls
    assert torch.equal(args[2], text([batch.categories[0], ""]))


def test_with_the_blocks_c_and_u_see_the_reference_masked_at_the_category():
    toy = Toy(w_s=1.5, sude_blocks=True, category="big dog")
    (batch, z, noise, t), terms = toy.drawn()
    reference, noisy = toy.predict.calls[-2:]
    assert not reference[1] and not noisy[1]
    assert torch.equal(reference[0][0], batch.reference.repeat(2, 1, 1, 1))
    context = toy.text([batch.categories[0], ""])
    record = image_attention.Record(PLACES)
    toy.unet(batch.reference.repeat(2, 1, 1, 1), t.repeat(2), context, record)
    at = toy.text.sequence(batch.categories[0]).index("dog")
    masks = torch.tensor([otsu(row[:, at].tolist()) for row in record.maps[PLACES[0]]])
    assert torch.equal(noisy[0][3].masks[PLACES[0]], masks)
    plain = Toy(w_s=1.5, category="big dog").drawn()[1]
    assert terms["l_sub"] == plain["l_sub"] and terms["l_sude"] != plain["l_sude"]


def test_the_pretrained_option_bypasses_the_blocks_too():
    toy, other = Toy(w_s=1.5, sude_blocks=True, reference="pretrained"), Toy(w_s=1.5)
    assert toy.run(3).trainer.log.values == other.run(3).trainer.log.values


def test_sudes_gradient_reaches_blocks_and_word():
    toy = Toy(w_s=1.5, truncation=False)
    _, terms = toy.drawn()
    terms["l_sude"].backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in toy.trained.values())


def plain_vico(*, seed, steps, lr, token_lr=5e-3):
    """ViCo as anybody would write it, on the same random streams: (weights, losses)."""
    unet, text = networks()
    g = Generators(seed)
    block = ImageBlock(WIDTH, HEADS)
    block.initialize(g.init)
    token = nn.Parameter(text.vectors("dog"))
    text.learn("*", token)
    groups = [{"params": list(block.parameters())}, {"params": [token], "lr": token_lr}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.01, fused=True)
    example = posteriors(1, 1)
    losses = []
    for _ in range(steps):
        torch.randint(1, (1,), generator=g.crops)
        caption = vico.TEMPLATES[int(torch.randint(36, (1,), generator=g.crops))].format("*")
        mean, std = example.mean[:, 0], example.std[:, 0]
        z, z_r = (mean + std * torch.randn(mean.shape, generator=g.posterior) for _ in range(2))
        noise = torch.randn(z.shape, generator=g.noise)
        t = torch.randint(1000, (1,), generator=g.timesteps)
        context = text([caption])
        record = image_attention.Record(PLACES)
        unet(z_r, t, context, record)
        maps, words = record.maps[PLACES[0]], text.sequence(caption)
        column, end = maps[..., words.index(("*", 0))], maps[..., words.index("<end>")]
        taps = image_attention.Attend(
            {image_attention.key(PLACES[0]): block}, record.kept, {PLACES[0]: image_attention.object_mask(column)}
        )
        a = unet(PROCESS.add_noise(z, noise, t), t, context, taps)
        loss = (a - noise).pow(2).mean() + 5e-4 * image_attention.attention_loss(column, end).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {**{f"{image_attention.key(PLACES[0])}.{n}": p for n, p in block.named_parameters()}, "token": token}, losses


def test_w_s_zero_is_plain_vico_bit_for_bit():
    toy = Toy(seed=11).run(8)
    weights, losses = plain_vico(seed=11, steps=8, lr=1e-3)
    assert weights.keys() == toy.trained.keys()
    assert all(torch.equal(weights[name], p) for name, p in toy.trained.items())
    log = toy.trainer.log.values
    total = [a + 5e-4 * b for a, b in zip(log["l_sub"], log["l_attention"], strict=True)]
    assert total == pytest.approx(losses, rel=1e-6)
    assert toy.predict.rows(with_gradient=False) == 0, "c and u were predicted for nothing"


def test_a_prior_is_refused_since_there_is_nothing_to_preserve():
    with pytest.raises(ValueError, match="prior is 'class images', but ViCo leaves the model as it is"):
        recipe(prior=Prior(kind="class images"))
    assert not recipe(prior=Prior(kind="class images", w_r=0.0)).options.prior.active
