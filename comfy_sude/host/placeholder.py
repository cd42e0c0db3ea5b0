"""A new word in a CLIP's prompts: its vectors in place of its text, and where they stand in the sequence.

The tokenizer of a CLIP clone gets one private token for each vector. A prompt's placeholders are replaced by those
before ComfyUI parses it, so that weights, punctuation, `embedding:` files and repetition work as for any word, and the
tokens by the vectors afterwards, so that no id leaves the tokenizer which the text model's table does not have. Where
the vectors ended up goes along with the conditioning, for attention that needs to know.
"""

import copy
import re
from numbers import Integral

import torch
from torch import Tensor
from transformers import AddedToken

from ..captions import pattern

POSITIONS = (
    "sude_positions"  # key in a CONDITIONING's options: {"": position of the end token, placeholder: [positions]}
)
END = ""


def sub_tokenizer(clip) -> tuple[str, str, object]:
    """(attribute, key in the tokens, tokenizer) of the one text model of a CLIP.

    Raises:
        ValueError: a CLIP of several or unknown text models.
    """
    composite = clip.tokenizer
    found = [(name, sub) for name, sub in vars(composite).items() if hasattr(sub, "embedding_key")]
    if len(found) != 1:
        raise ValueError(
            "clip has no single CLIP tokenizer, which a new word needs: load an SD1.x or SD2.x checkpoint."
        )
    ((attribute, sub),) = found
    return attribute, composite.clip_name, sub


def with_placeholder(clip, placeholder: str, vectors: Tensor):
    """A clone of a CLIP that knows one more word; the CLIP given stays as it is.

    Args:
        clip: ComfyUI CLIP with one text model (SD1.x, SD2.x).
        placeholder: the word, found in prompts in any case; one that is already known gets the new vectors.
        vectors: [n, width] embeddings that stand for it, in this order.
    """
    attribute, tokens_key, sub = sub_tokenizer(clip)
    rows = tuple(vectors.detach().clone().unbind(0))
    known = {word: entry for word, entry in getattr(sub, "sude_words", {}).items() if word != placeholder.lower()}
    new = copy.copy(sub)
    new.tokenizer = copy.deepcopy(sub.tokenizer)
    first = len(new.tokenizer)
    names = [f"<|sude{first + index}|>" for index in range(len(rows))]
    new.tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    ids = new.tokenizer.convert_tokens_to_ids(names)
    new.sude_words = {**known, placeholder.lower(): tuple(zip(names, ids, rows, strict=True))}
    new.inv_vocab = {**sub.inv_vocab, **dict.fromkeys([*ids, *rows], placeholder)}
    new.tokenize_with_weights = _Tokenize(new)

    clone = clip.clone()
    clone.tokenizer = copy.copy(clip.tokenizer)
    setattr(clone.tokenizer, attribute, new)
    model = clone.cond_stage_model
    clone.patcher.add_object_patch("encode_token_weights", _EncodeWithPositions(model, tokens_key, new))
    return clone


def positions(windows: list[list[tuple]], sub) -> dict[str, list[int]]:
    """Where a tokenized prompt's first end token and the first occurrence of each placeholder stand.

    Args:
        windows: rows of (token, weight, ...) as the tokenizer `sub` gives them.
        sub: a tokenizer from `with_placeholder`, or a stock one.
    """
    owner = {
        id(row): (w, i) for w, entry in getattr(sub, "sude_words", {}).items() for i, (*_, row) in enumerate(entry)
    }
    tokens = [entry[0] for window in windows for entry in window]
    found: dict[str, dict[int, int]] = {}
    for place, token in enumerate(tokens):
        if id(token) in owner:
            word, index = owner[id(token)]
            found.setdefault(word, {}).setdefault(index, place)
    end = next((i for i, token in enumerate(tokens) if isinstance(token, Integral) and token == sub.end_token), -1)
    return {END: [end], **{word: list(places.values()) for word, places in found.items()}}


class _Tokenize:
    """A tokenizer's `tokenize_with_weights` with placeholders, as an attribute of that tokenizer."""

    def __init__(self, sub):
        self.sub = sub
        words = sorted(sub.sude_words, key=len, reverse=True)
        self.finder = re.compile("|".join(f"({pattern(word).pattern})" for word in words), re.IGNORECASE)
        self.texts = ["".join(name for name, _, _ in sub.sude_words[word]) for word in words]
        self.rows = {token: row for entry in sub.sude_words.values() for _, token, row in entry}

    def __call__(self, text: str, return_word_ids: bool = False, **options):
        text = self.finder.sub(lambda match: self.texts[match.lastindex - 1], text)
        windows = type(self.sub).tokenize_with_weights(self.sub, text, return_word_ids, **options)
        return [[(self._row(token), *rest) for token, *rest in window] for window in windows]

    def _row(self, token):
        return self.rows.get(int(token), token) if isinstance(token, Integral) else token


class _EncodeWithPositions:
    """A text model's `encode_token_weights` that adds `POSITIONS` to what goes into the CONDITIONING."""

    def __init__(self, model: torch.nn.Module, tokens_key: str, sub):
        self.model, self.tokens_key, self.sub = model, tokens_key, sub

    def __call__(self, tokens):
        encoded, pooled, *extra = type(self.model).encode_token_weights(self.model, tokens)
        where = positions(tokens[self.tokens_key], self.sub)
        return encoded, pooled, {**(extra[0] if extra else {}), POSITIONS: where}
