"""CLIP -> an own fp32 text encoder with a correct gradient, and captions -> encodings.

ComfyUI's CLIPLayer adds in place, which autograd refuses; checkpointing it instead would hide the check and return a
wrong gradient. The own copy's layers add out of place: same values, right gradient.
"""

import hashlib
import types
from numbers import Integral

import comfy.ops
import torch
from comfy.clip_model import CLIPLayer
from torch import Tensor, nn

from .. import store
from .model import current_weight
from .placeholder import END, positions, sub_tokenizer, with_placeholder


def check_captions(clip, model, captions: list[str], source: str, placeholder: tuple[str, int] | None = None) -> None:
    """Raises ValueError if the CLIP does not belong to the MODEL's family or a caption does not fit its 77 tokens.

    Args:
        clip: ComfyUI CLIP.
        model: ComfyUI MODEL.
        captions: what will be encoded.
        source: the inputs they are made of.
        placeholder: a new word in them and the number of vectors, and so tokens, it will have.
    """
    width = model.model.model_config.unet_config["context_dim"]
    parts = _parts(clip.cond_stage_model)
    widths = [
        part.transformer.get_input_embeddings().weight.shape[1] for _, part in parts if hasattr(part, "transformer")
    ]
    if widths != [width]:
        raise ValueError(
            f"clip is not this model's text encoder (width {widths or 'unknown'}, the model reads {width}): take MODEL "
            "and CLIP from the same checkpoint."
        )
    if placeholder is not None:
        word, count = placeholder
        clip = with_placeholder(clip, word, torch.zeros(count, width))
    for caption in captions:
        tokens = clip.tokenize(caption)
        if any(len(windows) != 1 for windows in tokens.values()):
            raise ValueError(f"caption {caption!r} is longer than the 75 tokens CLIP reads: shorten {source}.")


def tokens_hash(clip, captions: list[str]) -> str:
    """Hash of what a CLIP's tokenizer makes of captions, the vectors of `embedding:` files in them included."""
    digest = hashlib.sha256()
    for caption in captions:
        for name, windows in sorted(clip.tokenize(caption).items()):
            for token, weight, *_ in (entry for window in windows for entry in window):
                text = store.tensor_hash([("", token)]) if isinstance(token, Tensor) else str(token)
                digest.update(f"{name} {text} {weight}\n".encode())
    return digest.hexdigest()


@torch.inference_mode(False)
def build_text_encoder(clip, device="cpu") -> nn.Module:
    """A copy of a CLIP's text model: ordinary fp32 parameters, all frozen, upstream patches baked in, trainable layers.

    Parameter names are those of the CLIP's patcher (`clip_l.transformer.text_model...`).
    """
    source = clip.cond_stage_model
    options = {"custom_operations": comfy.ops.disable_weight_init}
    layers = {f"{name}_model_config": {"num_hidden_layers": part.num_layers} for name, part in _parts(source)}
    model = type(source)(device=device, dtype=torch.float32, model_options={**options, **layers})
    for name, parameter in model.named_parameters():
        parameter.data = current_weight(clip.patcher, name, device)
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, CLIPLayer):
            module.forward = types.MethodType(_forward_out_of_place, module)
    for _, part in _parts(model):
        _leave_out(part, "logit_scale")
        _leave_out(part.transformer.text_projection, "weight")
    return model


def _leave_out(module: nn.Module, name: str) -> None:
    """Make a parameter no encoding depends on a plain zero: SD1 checkpoints lack these, so the CLIP's hold anything."""
    parameter = module._parameters.pop(name)
    module.register_buffer(name, torch.zeros_like(parameter), persistent=False)


def _parts(source: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in source.named_children() if hasattr(part, "num_layers")]


def _forward_out_of_place(self: CLIPLayer, x: Tensor, mask=None, optimized_attention=None) -> Tensor:
    x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
    return x + self.mlp(self.layer_norm2(x))


class Encoder:
    """Captions to encodings through an own text model, with the CLIP's tokenizer and clip-skip setting.

    It is also the `Vocabulary` of baselines that learn a new word.
    """

    def __init__(self, clip, model: nn.Module, device: torch.device):
        self.clip = clip
        self.model = model
        self.device = device
        self._learned: dict[int, tuple[nn.Parameter, int]] = {}  # a placeholder token's id() -> its vector
        self._tokens: dict[str, list] = {}
        model.reset_clip_options()
        if clip.layer_idx is not None:
            model.set_clip_options({"layer": clip.layer_idx})

    def __call__(self, captions: list[str]) -> Tensor:
        """[N, 77, width] the encodings, differentiable with respect to the model's parameters and learned words."""
        ((_, part),) = _parts(self.model)
        ids = torch.tensor([self._ids(caption) for caption in captions], device=self.device)
        # one look-up for all captions: SDClipModel's own makes a gradient of the whole token table for each
        embeddings = part.transformer.get_input_embeddings()(ids, out_dtype=torch.float32)
        embeddings = self._with_learned(embeddings, captions)
        last, hidden, *_ = part.transformer(
            None,
            embeds=embeddings,
            num_tokens=[ids.shape[1]] * len(captions),  # for the pooled output, which nothing here reads
            intermediate_output=part.layer_idx,
            final_layer_norm_intermediate=part.layer_norm_hidden_state,
            dtype=torch.float32,
        )
        return (last if part.layer == "last" else hidden).float()

    def _with_learned(self, embeddings: Tensor, captions: list[str]) -> Tensor:
        """The token embeddings [N, 77, width] with learned vectors where placeholders stand."""
        places = [
            (row, column, self._learned[id(token)])
            for row, caption in enumerate(captions)
            for column, token in enumerate(self._sequence(caption))
            if id(token) in self._learned
        ]
        if not places:
            return embeddings
        rows, columns, learned = zip(*places, strict=True)
        vectors = torch.stack([parameter[index] for parameter, index in learned])
        at = (torch.tensor(rows, device=self.device), torch.tensor(columns, device=self.device))
        return embeddings.index_put(at, vectors.to(embeddings))

    def _ids(self, caption: str) -> list[int]:
        """The table's ids of a caption's 77 tokens, any where a placeholder stands."""
        return [token if isinstance(token, Integral) else 0 for token in self._sequence(caption)]

    def _sequence(self, caption: str) -> list:
        """A caption's 77 tokens: ids, and the vectors of placeholders."""
        if caption not in self._tokens:
            (window,) = next(iter(self.clip.tokenize(caption).values()))
            self._tokens[caption] = [token for token, _weight in window]
        return self._tokens[caption]

    def _words(self, text: str) -> list:
        """The tokens of a text between start and end."""
        sequence = self._sequence(text)
        return sequence[1 : self.end(text)]

    # --- As a Vocabulary

    def vectors(self, text: str) -> Tensor:
        """[tokens, width] the embeddings of a text's tokens in the model's table, without start and end."""
        ((_, part),) = _parts(self.model)
        ids = torch.tensor(self._words(text), device=self.device, dtype=torch.long)
        return part.transformer.get_input_embeddings()(ids, out_dtype=torch.float32).detach().clone()

    def learn(self, placeholder: str, vectors: nn.Parameter) -> None:
        """Let a word stand for trainable vectors [n, width] in every caption encoded from now on."""
        self.clip = with_placeholder(self.clip, placeholder, vectors)
        self._tokens.clear()
        _, _, sub = sub_tokenizer(self.clip)
        for index, (*_, token) in enumerate(sub.sude_words[placeholder.lower()]):
            self._learned[id(token)] = (vectors, index)

    def positions(self, caption: str, word: str) -> tuple[int, ...]:
        """Where the tokens of the first `word` stand in a caption; empty if it does not occur."""
        wanted, sequence = self._words(word), self._sequence(caption)
        for start in range(len(sequence) - len(wanted) + 1):
            if all(_same(a, b) for a, b in zip(wanted, sequence[start:], strict=False)):
                return tuple(range(start, start + len(wanted)))
        return ()

    def end(self, caption: str) -> int:
        """Where a caption's first end token stands."""
        _, _, sub = sub_tokenizer(self.clip)
        return positions([[(token,) for token in self._sequence(caption)]], sub)[END][0]


def _same(a, b) -> bool:
    return a is b or (isinstance(a, Integral) and isinstance(b, Integral) and a == b)
