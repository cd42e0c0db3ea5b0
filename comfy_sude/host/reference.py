"""Inside the UNet's transformers: taps of a prediction, and ViCo's attention to a reference picture when sampling.

Everything goes through ComfyUI's own patch points: an object patch stands for a transformer layer's `forward`, a
DIFFUSION_MODEL wrapper runs the reference's pass, an OUTER_SAMPLE wrapper holds what one sampling run knows. The
objects on the MODEL keep no state of a run, so clones can share them. (`forward_timestep_embed_patch`, which looks made
for this, is not asked about transformer layers in older versions of ComfyUI such as 0.16.3.)
"""

import logging

import comfy.model_patcher
import comfy.ops
import torch
from comfy.ldm.modules.attention import SpatialTransformer, optimized_attention
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..image_attention import Attend, ImageBlock, Record, key
from .placeholder import END, POSITIONS

WRAPPER = "sude_reference"
TAPS = "sude_taps"  # in the transformer options: the taps (baselines.base.Taps) of this prediction
HANDED_ON = ("optimized_attention_override", "prefetch_dynamic_vbars")  # options that the reference's pass needs too


# --- Taps ----------------------------------------------------------------------------------------------------------


def with_taps(options: dict, taps) -> dict:
    """A copy of transformer options in which a prediction of a UNet calls `taps`, where its layers are `tappable`."""
    return {**options, TAPS: [*options.get(TAPS, ()), taps]}


def tappable(unet: nn.Module) -> None:
    """Make every transformer layer of an own UNet call the taps in its options."""
    for place, layer in unet.named_modules():
        if isinstance(layer, SpatialTransformer):
            layer.forward = TappedForward(layer, place, layer.forward)


class TappedForward:
    """A transformer layer's `forward` that calls the taps in its options after the layer's last block.

    Args:
        layer: a SpatialTransformer.
        place: its name, "output_blocks.4.1".
        forward: its own `forward`, or what another patch put there; runs where no taps are.
    """

    def __init__(self, layer: nn.Module, place: str, forward):
        self.layer, self.place = layer, place
        self.forward = forward.forward if isinstance(forward, TappedForward) else forward

    def __call__(self, x: Tensor, context=None, transformer_options={}) -> Tensor:  # noqa: B006 the layer's own signature
        """The layer's output, as ComfyUI would have had it but for the taps."""
        taps = [one for one in transformer_options.get(TAPS, ()) if self.place in one.places]
        if not taps:
            return self.forward(x, context, transformer_options)
        return run_transformer(self.layer, x, context, transformer_options, self.place, taps)


def run_transformer(layer, x: Tensor, context: Tensor, options: dict, place: str, taps: list) -> Tensor:
    """[B, C, h, w] what a SpatialTransformer makes of x, with taps on the tokens between its blocks and its way out."""
    options["activations_shape"] = list(x.shape)
    tokens = layer.norm(x)
    tokens = tokens if layer.use_linear else layer.proj_in(tokens)
    tokens = tokens.flatten(2).transpose(1, 2).contiguous()
    tokens = layer.proj_in(tokens) if layer.use_linear else tokens
    last = len(layer.transformer_blocks) - 1
    watching = [one for one in taps if one.wants_attention]
    for index, block in enumerate(layer.transformer_blocks):
        options["block_index"] = index
        watched = _watch_attention(options, place, watching) if watching and index == last else options
        text = context[index] if isinstance(context, list) else context
        tokens = block(tokens, context=text, transformer_options=watched)
    for one in taps:
        tokens = one.tokens(place, tokens)
    tokens = layer.proj_out(tokens) if layer.use_linear else tokens
    out = tokens.transpose(1, 2).unflatten(2, x.shape[2:]).contiguous()
    return x + (out if layer.use_linear else layer.proj_out(out))


def _watch_attention(options: dict, place: str, taps: list) -> dict:
    """Options under which the block at hand shows its attention to the text to taps."""

    def attend(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        heads = extra["n_heads"]
        q_heads, k_heads = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
        scores = q_heads @ k_heads.transpose(-1, -2) * q_heads.shape[-1] ** -0.5
        for one in taps:
            one.attention(place, scores.softmax(-1).mean(1))
        return optimized_attention(q, k, v, heads, attn_precision=extra["attn_precision"], transformer_options=extra)

    replace = options.get("patches_replace", {})
    attn2 = {**replace.get("attn2", {}), (*options["block"], options["block_index"]): attend}
    return {**options, "patches_replace": {**replace, "attn2": attn2}}


# --- Sampling ------------------------------------------------------------------------------------------------------


class Run:
    """What one sampling run knows: where the placeholder stands in each prompt, and the last timestep's references."""

    def __init__(self, conds: dict[str, list[dict]], placeholder: str):
        prompts = [(cond.get("uuid"), cond.get(POSITIONS)) for entries in conds.values() for cond in entries or ()]
        known = [(name, where) for name, where in prompts if where is not None]
        with_word = [where[placeholder] for _, where in known if placeholder in where]
        # both halves read the prompt's positions; a prompt without the word reads its end token. ViCo, ddim.py:176-188
        self.default = (with_word or [where[END] for _, where in known] or [None])[0]
        self.positions = {name: where.get(placeholder, self.default) for name, where in known}
        self.negative = {cond.get("uuid") for cond in conds.get("negative") or ()}
        self.time: float | None = None
        self.references: list[tuple[Tensor, list[int], dict, dict]] = []


class ReferenceAttention:
    """ViCo's image attention on a MODEL: the blocks, the reference and what to do with them.

    Args:
        blocks: image blocks by place.
        places: the places, in the order of the blocks.
        latent: [1, C, H, W] clean latent of the reference picture, model scale.
        placeholder: the word whose attention masks the reference.
        strength: of the image attention.
        unconditional: whether the unconditional half of the guidance attends too.
    """

    def __init__(
        self,
        blocks: nn.ModuleDict,
        places: list[str],
        latent: Tensor,
        placeholder: str,
        strength: float,
        unconditional: bool,
    ):
        self.blocks, self.places, self.latent, self.placeholder = blocks, places, latent, placeholder.lower()
        self.strength, self.unconditional = strength, unconditional
        self.state = f"{WRAPPER}_{id(self)}"  # where this object's run is in the transformer options

    def attach(self, model) -> None:
        """Put it on a MODEL clone."""
        for place in self.places:
            name = f"diffusion_model.{place}"
            layer, forward = model.get_model_object(name), model.get_model_object(f"{name}.forward")
            model.add_object_patch(f"{name}.forward", TappedForward(layer, place, forward))
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER, self.outer_sample)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, WRAPPER, self.diffusion_model)
        patcher = comfy.model_patcher.CoreModelPatcher(self.blocks, model.load_device, model.offload_device)
        # one key an object, so that a second subject is loaded beside the first
        model.set_additional_models(self.state, [patcher])

    def outer_sample(self, executor, *args, **kwargs):
        """Around one sampling run: note what its prompts say."""
        guider = executor.class_obj
        run = Run(guider.conds, self.placeholder)
        if run.default is None:
            logging.warning(
                "SuDe: the prompts were not encoded with the CLIP that knows %r; the reference picture is not masked.",
                self.placeholder,
            )
        guider.model_options["transformer_options"][self.state] = run
        return executor(*args, **kwargs)

    def diffusion_model(
        self, executor, x, timesteps, context=None, y=None, control=None, transformer_options=None, **kwargs
    ):
        """Around one prediction: run the reference where it is needed, and let the noisy rows attend to it."""
        options = dict(transformer_options or {})
        run = options.get(self.state) or Run({}, self.placeholder)
        names = options.get("uuids") or [None]  # of the prompts, one for each chunk of rows
        per_chunk = len(x) // len(names)
        rows, wanted = [], []
        for index, name in enumerate(names):
            if self.unconditional or name not in run.negative:
                for row in range(index * per_chunk, (index + 1) * per_chunk):
                    rows.append(row)
                    wanted.append(run.positions.get(name, run.default))
        if rows:
            tokens, masks = self._references(executor.class_obj, run, x, timesteps, context, rows, wanted, options)
            some = None if len(rows) == len(x) else torch.tensor(rows, device=x.device)
            options = with_taps(options, Attend(self.blocks, tokens, masks, some, self.strength))
        return executor(x, timesteps, context, y, control, options, **kwargs)

    def _references(self, unet, run: Run, x, timesteps, context, rows, wanted, options) -> tuple[dict, dict]:
        """Reference tokens and masks by place, one row for each of `rows`; each (t, context, position) is run once."""
        time = float(timesteps[0])
        if run.time != time:
            run.time, run.references = time, []
        picked, missing = [], []
        for row, at in zip(rows, wanted, strict=True):
            text, prompts = context[row], [(t, p) for t, p, *_ in run.references + missing]
            same = [i for i, (t, p) in enumerate(prompts) if p == at and t.shape == text.shape and torch.equal(t, text)]
            if not same:
                missing.append((text, at))
            picked.append(same[0] if same else len(prompts))
        if missing:
            texts = torch.stack([text for text, _ in missing])
            record = Record(self.places)
            latent = self.latent.to(x).expand(len(missing), -1, -1, -1)
            t = timesteps[:1].expand(len(missing))
            handed_on = {name: options[name] for name in HANDED_ON if name in options}
            unet._forward(latent, t, texts, None, None, with_taps(handed_on, record))
            masks = record.masks([at for _, at in missing])
            for index, prompt in enumerate(missing):
                row = ({place: kept[index] for place, kept in part.items()} for part in (record.kept, masks))
                run.references.append((*prompt, *row))
        used = [run.references[index] for index in picked]
        return tuple(
            {place: torch.stack([one[part][place] for one in used]) for place in self.places} for part in (2, 3)
        )


def load_blocks(tensors: dict[str, dict[str, Tensor]], heads: dict[str, int]) -> nn.ModuleDict:
    """Image blocks for sampling from a subject's tensors, "output_blocks.4.1.attn1.to_q.weight" -> {"value"}.

    Args:
        tensors: of the blocks of all places.
        heads: of each place.
    """
    blocks = nn.ModuleDict()
    for place, count in heads.items():
        state = {k[len(place) + 1 :]: v["value"] for k, v in tensors.items() if k.startswith(place + ".")}
        width = len(state["norm1.weight"])
        block = ImageBlock(width, count, comfy.ops.manual_cast, device="meta", dtype=torch.float32)
        block.load_state_dict(state, assign=True)
        blocks[key(place)] = block.requires_grad_(False)
    return blocks
