"""The pack's own training loop, loss and baselines on the mini world's narrow net: the same method, many times quicker.

ComfyUI is not needed. Compared with SuDe Fine-Tune on the expanded checkpoint the networks are half as wide, run in
bfloat16 and have plain attention, and DreamBooth leaves the text encoder alone unless told otherwise; loss, gate,
references, prior, timesteps, optimizer and every random stream are the shipped code.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comfy_sude.baselines import REGISTRY
from comfy_sude.baselines.base import Baseline, Networks, train_all
from comfy_sude.baselines.dreambooth import DreamBooth
from comfy_sude.data import Latents
from comfy_sude.diffusion import NoiseProcess
from comfy_sude.image_attention import Attend, Record
from comfy_sude.recipe import Recipe
from comfy_sude.train import Predictors, Trainer

from . import text
from .diffusion import alphas_cumprod, ddim
from .expand import NARROW_FILE, read
from .unet import HEADS, UNet
from .vae import Codec
from .world import Subject, prompt, render

CLASS_IMAGES, CLASS_STEPS, CLASS_GUIDANCE = 32, 20, 4.0  # of the prior; steps and guidance as in measure.py


class FrozenTextDreamBooth(DreamBooth):
    """DreamBooth that trains the UNet alone."""

    def prepare(self, init: torch.Generator) -> list[dict]:
        """The UNet's parameters."""
        return [{"params": train_all(self.networks.unet)}]

    def changes(self, caption: str) -> bool:
        """No caption's encoding does."""
        return False


class BareDreamBooth(FrozenTextDreamBooth):
    """The same with captions that do not name the category, as ViCo's template: "photo of a sks"."""

    @classmethod
    def words(cls, recipe: Recipe) -> str:
        """The identifier alone."""
        return recipe.baseline.identifier


METHODS: dict[str, type[Baseline]] = {
    "DreamBooth": FrozenTextDreamBooth,
    "DreamBooth, bare": BareDreamBooth,
    "DreamBooth, text": DreamBooth,
    "Custom Diffusion": REGISTRY["Custom Diffusion"],
    "ViCo": REGISTRY["ViCo"],
}


@functools.cache
def _encoder() -> text.Encoder:
    return text.Encoder(text.seeded_weights())


class TextModel(nn.Module):
    """The live part of the text encoder as parameters; only the rows of known words are in its table."""

    def __init__(self, rows: Tensor):
        super().__init__()
        encoder = _encoder()
        self.special = encoder.table[[text.START, text.END]].clone()
        self.rows = nn.Parameter(rows.clone(), requires_grad=False)
        self.names = {name: name.replace(".", "_") for name in encoder.weights}
        for name, key in self.names.items():
            self.register_parameter(key, nn.Parameter(encoder.weights[name].clone(), requires_grad=False))

    def forward(self, embeddings: Tensor) -> Tensor:
        """[P, 77, 768] token embeddings -> encodings alike."""
        weights = {name: getattr(self, key) for name, key in self.names.items()}
        return _Live(weights).encode(embeddings)


class _Live(text.Encoder):
    """The encoder's computation on given weights."""

    def __init__(self, weights: dict[str, Tensor]):
        self.weights = weights


class Words:
    """Captions to encodings; also the `Vocabulary` of baselines that learn a word."""

    def __init__(self, model: TextModel):
        self.model, self.learned = model, {}
        self.place = {token: index for index, token in enumerate(text.TRAINED_IDS)}

    def tokens(self, caption: str) -> list:
        """77 entries: token ids, and (word, index) where a learned word stands."""
        found: list = [text.START]
        for word in caption.split():
            if word in self.learned:
                found += [(word, index) for index in range(len(self.learned[word]))]
            else:
                found += text.WORDS.get(word) or text.IDENTIFIERS[word]
        return found + [text.END] * (text.LENGTH - len(found))

    def embed(self, token) -> Tensor:
        """[768]"""
        if isinstance(token, tuple):
            word, index = token
            return self.learned[word][index]
        if token in self.place:
            return self.model.rows[self.place[token]]
        return self.model.special[0 if token == text.START else 1]

    def __call__(self, captions: list[str]) -> Tensor:
        """[N, 77, 768]"""
        return self.model(torch.stack([torch.stack([self.embed(t) for t in self.tokens(c)]) for c in captions]))

    def vectors(self, words: str) -> Tensor:
        """[tokens, 768]"""
        return torch.stack([self.embed(t) for t in self.tokens(words)[1 : self.end(words)]]).detach().clone()

    def learn(self, placeholder: str, vectors: nn.Parameter) -> None:
        """Let a word stand for vectors [n, 768]."""
        self.learned[placeholder] = vectors

    def positions(self, caption: str, word: str) -> tuple[int, ...]:
        """Where the tokens of the first `word` stand."""
        wanted, sequence = self.tokens(word)[1 : self.end(word)], self.tokens(caption)
        starts = (i for i in range(len(sequence)) if sequence[i : i + len(wanted)] == wanted)
        start = next(starts, None)
        return () if start is None else tuple(range(start, start + len(wanted)))

    def end(self, caption: str) -> int:
        """Where the first end token stands."""
        return self.tokens(caption).index(text.END)


class Net:
    """The narrow UNet as `Predict`, with taps at its transformers."""

    def __init__(self, unet: UNet):
        self.unet, self.taps = unet, None
        for name, module in unet.named_modules():
            if name.endswith("transformer_blocks.0"):
                place = name.removesuffix(".transformer_blocks.0")
                module.attn2.register_forward_hook(self._attention(place))
                module.register_forward_hook(self._tokens(place))

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, taps=None) -> Tensor:
        self.taps = taps
        try:
            return self.unet(x_t, t, context)
        finally:
            self.taps = None

    def _tokens(self, place: str):
        def hook(_module, _args, output):
            return self.taps.tokens(place, output) if self.taps and place in self.taps.places else None

        return hook

    def _attention(self, place: str):
        def hook(module, args, _output):
            if not self.taps or not self.taps.wants_attention or place not in self.taps.places:
                return
            x, context = args[:2]
            q, k = (
                layer(source).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for layer, source in ((module.to_q, x), (module.to_k, context))
            )
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            self.taps.attention(place, scores.float().softmax(-1).mean(1))

        return hook


@dataclass(frozen=True)
class World:
    """The shipped model, as what every training starts from."""

    unet: UNet
    codec: Codec
    rows: Tensor
    pretrained: Net
    """A copy of `unet` that predicts; a `Net` hooks into its network for good, so every world has one."""

    @classmethod
    def load(cls, path=NARROW_FILE) -> World:
        """From the narrow file."""
        narrow, _ = read(path)
        net, codec = UNet(), Codec()
        for module, kind in ((net, "unet."), (codec, "vae.")):
            module.load_state_dict({n.removeprefix(kind): w.float() for n, w in narrow.items() if n.startswith(kind)})
            module.eval().requires_grad_(False)
        return cls(net, codec, narrow["rows"].float(), Net(copy.deepcopy(net)))

    def encode(self, pictures: Tensor) -> Latents:
        """uint8 [N, 64, 64, 3] -> posteriors (this codec has none: latents), as they are and mirrored."""
        with torch.no_grad():
            x = pictures.permute(0, 3, 1, 2).float() / 255
            return Latents(torch.stack([self.codec.encoder(x), self.codec.encoder(x.flip(-1))], 1))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pictures [N, 64, 64, 3] in 0..1."""
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return self.codec.decoder(latents).float().permute(0, 2, 3, 1).clamp(0, 1)

    def class_images(self, category: str, seed: int = 7) -> Latents:
        """What the untouched model draws for the category's caption."""
        noise = torch.randn(CLASS_IMAGES, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            contexts = Words(TextModel(self.rows))(["", prompt(category)])
        index = torch.ones(CLASS_IMAGES, dtype=torch.long)
        drawn = self.decode(ddim(self.unet, contexts, index, noise, CLASS_STEPS, CLASS_GUIDANCE))
        return self.encode((drawn * 255).round().to(torch.uint8))


class Learner:
    """One training on the narrow net, and sampling from where it is."""

    def __init__(
        self,
        world: World,
        recipe: Recipe,
        subject: Subject,
        class_images: Latents | None = None,
        trainer: type[Trainer] = Trainer,
    ):
        method = METHODS[recipe.method]
        recipe = dataclasses.replace(recipe, options=dataclasses.replace(recipe.options, precision="bf16")).checked()
        self.world, self.recipe, self.subject = world, recipe, subject
        self.net, self.frozen = Net(copy.deepcopy(world.unet)), world.pretrained
        self.words = Words(TextModel(world.rows))
        self.baseline = method(recipe, Networks(self.net.unet, self.words.model, self.words))
        example = world.encode(torch.from_numpy(render(recipe.category, None, subject).copy())[None])
        self.on = Predictors(
            process=NoiseProcess(alphas_cumprod().double()),
            predict=self.net,
            encode=self.words,
            device=torch.device("cpu"),
            frozen=None if method.switches_off else self.frozen,
        )
        self.trainer = trainer(self.baseline, self.on, example, class_images if recipe.options.prior.active else None)

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.trainer.log.steps

    def train_to(self, steps: int) -> None:
        """Train until so many steps are done."""
        while self.steps < steps:
            self.trainer.step()

    @property
    def named(self) -> str:
        """The subject in the words this method's captions have for it."""
        return self.baseline.words(self.recipe)

    def sample(self, captions: list[str], count: int, seed: int, steps: int, guidance: float) -> Tensor:
        """Pictures [len(captions) * count, 64, 64, 3]: of every caption as many, all captions from the same noise."""
        noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).repeat(
            len(captions), 1, 1, 1
        )
        with torch.inference_mode():
            contexts = self.words(["", *captions])
        index = torch.arange(1, len(captions) + 1).repeat_interleave(count)
        if self.baseline.looks_at_reference:
            return self.world.decode(self._sample_looking(captions, contexts, index, noise, steps, guidance))
        return self.world.decode(ddim(self.net.unet, contexts, index, noise, steps, guidance))

    def _sample_looking(self, captions, contexts, index, noise, steps: int, guidance: float) -> Tensor:
        """DDIM in which both halves of the guidance attend to the reference picture (ViCo)."""
        latents = []
        count = int((index == 1).sum())
        for row, caption in enumerate(captions, 1):
            part = noise[(row - 1) * count : row * count]
            latents.append(
                ddim(
                    _Looking(self, caption),
                    contexts[[0, row]],
                    torch.ones(count, dtype=torch.long),
                    part,
                    steps,
                    guidance,
                )
            )
        return torch.cat(latents)


class _Looking:
    """A net for `ddim` whose predictions attend to the example, as `ViCo.predict_sample` does for one row."""

    def __init__(self, learner: Learner, caption: str):
        self.learner, self.caption = learner, caption

    def __call__(self, x: Tensor, t: Tensor, captions: Tensor, index: Tensor) -> Tensor:
        baseline, net = self.learner.baseline, self.learner.net
        record = Record(baseline.places)
        reference = baseline.example.mean[:1, 0].expand(2, -1, -1, -1)
        net(reference, t[:2], captions[[1, 0]], record)
        at = baseline.networks.vocabulary.positions(self.caption, self.learner.recipe.baseline.identifier)
        half = len(x) // 2

        def rows(kept: dict[str, Tensor]) -> dict[str, Tensor]:
            return {place: value.repeat_interleave(half, 0) for place, value in kept.items()}

        attend = Attend(baseline.blocks, rows(record.kept), rows(record.masks([at, at])))
        return net(x, t, captions[index], attend)
