"""Custom Diffusion against diffusers' own layers; trained sizes on SD1.5's real shape; a baseline of one's own."""

import pytest
import torch
from torch import nn

from comfy_sude import image_attention
from comfy_sude.baselines import REGISTRY, vico
from comfy_sude.baselines.base import Baseline, Networks
from comfy_sude.baselines.custom_diffusion import CustomDiffusion
from comfy_sude.data import Latents, Views
from comfy_sude.host import model as host_model
from comfy_sude.host import text
from comfy_sude.recipe import Prior, Settings, numeric, plain
from comfy_sude.train import Predictors, Trainer

from .helpers import Silent, recipe, train

pytestmark = pytest.mark.slow


# --- Custom Diffusion and diffusers


def diffusers_unet(base) -> nn.Module:
    """The same network by diffusers, with its Custom Diffusion processors on every cross-attention."""
    import comfy.utils
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(320, 320),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=8,
        cross_attention_dim=768,
    )
    ours = base.diffusion_model.state_dict()
    names = comfy.utils.unet_to_diffusers(base.model_config.unet_config)
    unet.load_state_dict({key: ours[name] for key, name in names.items() if name in ours})
    unet.requires_grad_(False)
    processors = {}
    for name, processor in unet.attn_processors.items():
        if not name.endswith("attn2.processor"):
            processors[name] = processor
            continue
        layer = unet.get_submodule(name.removesuffix(".processor"))
        custom = CustomDiffusionAttnProcessor(True, False, layer.to_k.out_features, layer.to_k.in_features)
        custom.to_k_custom_diffusion.weight.data.copy_(layer.to_k.weight)
        custom.to_v_custom_diffusion.weight.data.copy_(layer.to_v.weight)
        processors[name] = custom
    unet.set_attn_processor(processors)
    return unet


def test_output_and_first_gradients_are_those_of_diffusers_custom_diffusion_layers(models):
    pytest.importorskip("diffusers")
    import comfy.utils

    g = torch.Generator().manual_seed(0)
    masks = torch.ones(2, 8, 8)
    masks[1, :, 4:] = 0
    made = recipe("Custom Diffusion", w_s=0.0, prior=Prior(w_r=1.0)).checked()
    with torch.inference_mode(False), torch.enable_grad():
        base, text_encoder = host_model.build_unet(models[0]), text.build_text_encoder(models[1])
        encoder = text.Encoder(models[1], text_encoder, torch.device("cpu"))
        baseline = CustomDiffusion(made, Networks(base.diffusion_model, text_encoder, encoder))
        process = host_model.check_supported(models[0])
        calls = []

        def predict(x_t, t, context, taps=None):
            calls.append((x_t, t, context, host_model.predict(base, x_t, t, context, taps)))
            return calls[-1][-1]

        example = Latents(torch.randn(2, 2, 4, 8, 8, generator=g), None, Views(masks[:0], ("", "very small"), masks))
        classes = Latents(torch.randn(3, 2, 4, 8, 8, generator=g))
        trainer = Trainer(baseline, Predictors(process, predict, encoder, torch.device("cpu")), example, classes)
        targets = []
        trainer._noised = lambda z, noised=trainer._noised: targets.append(noised(z)) or targets[-1]
        drawn = []
        baseline.draw = lambda *args, draw=baseline.draw: drawn.append(draw(*args)) or drawn[-1]
        terms = trainer.losses()
        (terms["l_sub"] + terms["l_prior"]).backward()

        ((x_t, t, context, ours),) = calls
        theirs = diffusers_unet(base)
        token = baseline.vectors.detach().clone().requires_grad_(True)
        encoder.learn("<new1>", token)
        batch = drawn[0]
        context = encoder([*batch.captions, *("photo of a dog",) * 2])
        out = theirs(x_t, t, context).sample
        assert (out - ours).abs().max() < 1e-5 * ours.abs().max()
        noise = torch.cat([n for _, n, _ in targets])
        error = (out - noise).pow(2)
        instance = (error[:2] * batch.mask).sum((1, 2, 3)) / batch.mask.sum((1, 2, 3)) / 4
        (instance.mean() + error[2:].mean()).backward()

    names = comfy.utils.unet_to_diffusers(base.model_config.unet_config)
    back = {ours: theirs for theirs, ours in names.items()}
    assert len(baseline.layers) == 14
    for name, layer in baseline.layers.items():
        path = back[f"{name}.weight"].removesuffix(".weight")
        custom = theirs.get_submodule(path.rpartition(".")[0]).processor
        expected = getattr(custom, f"{path.rpartition('.')[2]}_custom_diffusion").weight.grad
        assert (layer.weight.grad - expected).norm() < 1e-4 * expected.norm(), name
    assert (baseline.vectors.grad - token.grad).norm() < 1e-4 * token.grad.norm() > 0
    assert not any(p.grad is not None for p in text_encoder.parameters())


# --- Sizes


@pytest.fixture(scope="module")
def sd15():
    """SD1.5's UNet in its real shape, without memory."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2, 2],
        channel_mult=[1, 2, 4, 4], num_heads=8, num_head_channels=-1, use_spatial_transformer=True,
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_middle=1,
        transformer_depth_output=[1] * 9 + [0] * 3, context_dim=768, legacy=False, dtype=torch.float32,
        device="meta", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip


class MetaWords:
    def vectors(self, text):
        return torch.zeros(1, 768)

    def learn(self, placeholder, vectors):
        pass


def trained_size(groups) -> int:
    return sum(p.numel() for group in groups for p in group["params"])


def test_custom_diffusion_trains_19_169_280_weights_of_sd15_and_the_word(sd15):
    assert sum(p.numel() for p in sd15.parameters()) == 859_520_964
    with torch.inference_mode(False):
        baseline = CustomDiffusion(recipe("Custom Diffusion").checked(), Networks(sd15, nn.Module(), MetaWords()))
        size = trained_size(baseline.prepare(torch.Generator()))
    assert size == 19_169_280 + 768 and baseline.trained == (19_169_280, 0)
    assert len(baseline.layers) == 32
    sd15.requires_grad_(False)


def test_vico_trains_51_248_960_weights_beside_sd15_and_the_word(sd15):
    with torch.inference_mode(False):
        baseline = vico.ViCo(recipe("ViCo").checked(), Networks(sd15, nn.Module(), MetaWords()))
        assert baseline.trained == (51_248_960, 51_248_960)
        expected = {4: 1280, 6: 640, 8: 640, 10: 320}
        assert image_attention.places(sd15) == {f"output_blocks.{n}.1": (width, 8) for n, width in expected.items()}
        parts = nn.ModuleDict()
        with torch.device("meta"):
            for place, (width, heads) in image_attention.places(sd15).items():
                parts[image_attention.key(place)] = image_attention.ImageBlock(width, heads)
    assert sum(p.numel() for p in parts.parameters()) == 51_248_960


# --- A baseline of one's own


def own_baseline():
    """BitFit: only the UNet's biases train. All that a new method needs; no other module is touched."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class BiasSettings(Settings):
        w_s: float = numeric(0.4, 0.0, 1000.0, 0.05, "Weight of the SuDe loss.")
        steps: int = numeric(300, 1, 1_000_000, 1, "Optimizer steps.")
        learning_rate: float = numeric(1e-3, 0.0, 1.0, 1e-6, "Constant.")
        identifier: str = plain("sks", "Rare word that will mean your subject.")

    class Biases(Baseline):
        settings = BiasSettings
        help = "Trains the UNet's biases."

        def prepare(self, init):
            named = self.networks.unet.named_parameters()
            self.biases = {name: p.requires_grad_(True) for name, p in named if name.endswith("bias")}
            return [{"params": list(self.biases.values())}]

        def changes(self, caption):
            return False

        def result(self):
            for name, bias in self.biases.items():
                yield "model", name, {"weight": bias.detach()}

    return Biases


def test_a_new_baseline_is_a_class_and_a_line(models, picture, tmp_path, monkeypatch):
    from comfy_sude.host.apply import apply_subject
    from comfy_sude.nodes.fine_tune import SuDeFineTune, read_recipe
    from comfy_sude.recipe import Options

    monkeypatch.setitem(REGISTRY, "Biases", own_baseline())
    (combo,) = (i for i in SuDeFineTune.define_schema().inputs if i.id == "baseline")
    assert "Biases" in [option.key for option in combo.options]
    made = read_recipe("dog", {"baseline": "Biases", "steps": 2}, 0, Options(resolution=64, prior=Prior(kind="off")))
    subject = train(models, picture, tmp_path, made, Silent())
    assert {network for network, _ in subject.tensors} == {"model"}
    assert all(name.endswith("bias") for _, name in subject.tensors)
    assert subject.prompt("running") == "photo of a running sks dog" and subject.log.values["gate"]
    apply_subject(*models[:2], subject)
