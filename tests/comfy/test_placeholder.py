"""A new word in the CLIP's prompts: wherever a person may type it, and nowhere else."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from comfy_sude.captions import check_placeholder
from comfy_sude.host import text
from comfy_sude.host.placeholder import POSITIONS, with_placeholder

from .helpers import sample
from .test_host_text import transformers_copy

START, END = 49406, 49407


@pytest.fixture(scope="module")
def vectors():
    return torch.randn(2, 768, generator=torch.Generator().manual_seed(8)) * 0.5


def shown(clip, prompt: str) -> list:
    """(token or "v0", "v1", ..., weight) of a prompt without start, end and padding."""
    entries = getattr(clip.tokenizer.clip_l, "sude_words", {}).values()
    names = {id(row): f"v{index}" for index, row in enumerate(row for entry in entries for *_, row in entry)}
    (windows,) = clip.tokenize(prompt).values()
    named = [(names.get(id(token), token), weight) for window in windows for token, weight in window]
    return [(token, weight) for token, weight in named if token not in (START, END)]


def words(clip, prompt: str) -> list:
    return [token for token, _ in shown(clip, prompt)]


def encode(clip, prompt: str) -> torch.Tensor:
    import nodes

    return nodes.CLIPTextEncode().encode(clip, prompt)[0][0][0]


def by_hand(clip, ids: list, vectors: dict[int, torch.Tensor]) -> torch.Tensor:
    """The encoding of ids with some rows of the token table replaced, by transformers' CLIP."""
    model = transformers_copy(text.build_text_encoder(clip))
    ids = [START, *ids, *[END] * (76 - len(ids))]
    embeddings = model.get_input_embeddings()(torch.tensor([ids]))
    for place, vector in vectors.items():
        embeddings[0, place] = vector
    table = model.get_input_embeddings()
    hook = table.register_forward_hook(lambda *_: embeddings)
    try:
        return model(input_ids=torch.tensor([ids])).last_hidden_state
    finally:
        hook.remove()


DOG, A, PHOTO, OF, RED, COMMA = 1929, 320, 1125, 539, 736, 267


TYPED = {
    "a {} dog": [A, "v0", DOG],
    "a {}, dog": [A, "v0", COMMA, DOG],
    "{}": ["v0"],
    "a {} dog of a {} dog": [A, "v0", DOG, OF, A, "v0", DOG],
    "({} dog:1.3)": ["v0", DOG],
    "(a (({}))), dog": [A, "v0", COMMA, DOG],
    "[{}]dog": [314, "v0", 316, DOG],
}


@pytest.mark.parametrize("placeholder", ["<new1>", "*", "<sude>", "sks", "Spike"])
def test_the_placeholder_is_found_wherever_it_is_typed(models, vectors, placeholder):
    clip = with_placeholder(models[1], placeholder, vectors[:1])
    for prompt, expected in TYPED.items():
        for typed in (placeholder, placeholder.upper(), placeholder.lower()):
            assert words(clip, prompt.replace("{}", typed)) == expected, (prompt, typed)


def test_a_placeholder_of_letters_is_only_found_as_a_word(models, vectors):
    clip = with_placeholder(models[1], "spike", vectors[:1])
    for prompt in ("a spiked dog", "handspike", "spike2", "my_spike", "embedding:spike dog"):
        assert "v0" not in words(clip, prompt), prompt
    assert words(clip, "A<SPIKE>dog").count("v0") == 1


def test_a_placeholder_in_brackets_is_found_inside_of_words(models, vectors):
    clip = with_placeholder(models[1], "<new1>", vectors[:1])
    assert words(clip, "A<NEW1>dog") == [A, "v0", DOG]


def test_weights_go_with_the_placeholder(models, vectors):
    clip = with_placeholder(models[1], "<new1>", vectors[:1])
    assert shown(clip, "a (<new1> dog:1.3) red") == [(A, 1.0), ("v0", 1.3), (DOG, 1.3), (RED, 1.0)]


def test_several_vectors_take_as_many_places_in_their_order(models, vectors):
    clip = with_placeholder(models[1], "<new1>", vectors)
    assert words(clip, "a <new1>, <new1> dog") == [A, "v0", "v1", COMMA, "v0", "v1", DOG]


@pytest.mark.parametrize("prompt", ["a <new1> dog", "a (<new1>:1.0) dog", "A<NEW1>dog", "a   <new1>\ndog"])
def test_the_encoding_is_that_of_the_vector_in_its_place(models, vectors, prompt):
    clip = with_placeholder(models[1], "<new1>", vectors[:1])
    expected = by_hand(models[1], [A, A, DOG], {2: vectors[0]}).float()
    assert torch.allclose(encode(clip, prompt), expected, atol=1e-4)


def test_the_clip_that_came_in_does_not_know_the_word(models, vectors):
    plain, before = encode(models[1], "a photo of a dog"), shown(models[1], "<new1>")
    clip = with_placeholder(models[1], "<new1>", vectors)
    assert torch.equal(encode(clip, "a photo of a dog"), plain), "other prompts have changed"
    encode(clip, "a <new1> dog")
    assert shown(models[1], "<new1>") == before and len(before) > 1
    assert not hasattr(models[1].tokenizer.clip_l, "sude_words")
    assert POSITIONS not in models[1].encode_from_tokens(models[1].tokenize("a dog"), return_dict=True)


def test_it_survives_clip_skip_and_lora_loader_and_clones(models, vectors):
    import comfy.sd
    import nodes

    clip = with_placeholder(models[1], "<new1>", vectors[:1])
    lora = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(3072, 4),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(4, 768),
    }
    skipped = nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    behind_lora = comfy.sd.load_lora_for_models(None, clip, lora, 1, 1)[1]
    for other in (skipped, behind_lora, clip.clone()):
        assert words(other, "a <new1> dog") == [A, "v0", DOG]
        assert other.encode_from_tokens(other.tokenize("a <new1> dog"), return_dict=True)[POSITIONS]["<new1>"] == [2]
    assert not torch.equal(encode(skipped, "a <new1> dog"), encode(clip, "a <new1> dog"))
    assert not torch.equal(encode(behind_lora, "a <new1> dog"), encode(clip, "a <new1> dog"))


def test_embedding_files_work_beside_it(models, vectors, tmp_path):
    save_file({"emb_params": vectors[1:2].clone()}, tmp_path / "fluffy.safetensors")
    clip = models[1].clone()
    clip.tokenizer.clip_l.embedding_directory, before = [str(tmp_path)], clip.tokenizer.clip_l.embedding_directory
    try:
        learned = with_placeholder(clip, "<new1>", vectors[:1])
        expected = by_hand(models[1], [A, A, A, DOG], {2: vectors[0], 3: vectors[1]}).float()
        for prompt in ("a <new1> embedding:fluffy dog", "a <new1>   embedding:fluffy   dog"):
            assert torch.allclose(encode(learned, prompt), expected, atol=1e-4), prompt
        glued = by_hand(models[1], [A, A, A, DOG], {2: vectors[1], 3: vectors[0]}).float()
        assert torch.allclose(encode(learned, "a embedding:fluffy<new1> dog"), glued, atol=1e-4)
    finally:
        clip.tokenizer.clip_l.embedding_directory = before


def test_two_words_live_side_by_side_and_the_last_of_one_name_wins(models, vectors):
    both = with_placeholder(with_placeholder(models[1], "<new1>", vectors[:1]), "<new10>", vectors[1:])
    assert words(both, "a <new10> <new1> <NEW10>") == [A, "v1", "v0", "v1"]
    again = with_placeholder(both, "<NEW1>", vectors[1:])
    assert len(words(again, "<new1>")) == 1
    assert torch.equal(encode(again, "a <new1> dog"), encode(both, "a <new10> dog"))


def test_the_conditioning_says_where_the_word_and_the_end_stand(models, vectors):
    clip = with_placeholder(with_placeholder(models[1], "<new1>", vectors), "*", vectors[:1])

    def where(prompt):
        import nodes

        return nodes.CLIPTextEncode().encode(clip, prompt)[0][0][1][POSITIONS]

    assert where("a photo of a <new1> dog") == {"": [8], "<new1>": [5, 6]}
    assert where("a * and a <NEW1> and a *") == {"": [10], "*": [2], "<new1>": [5, 6]}
    assert where("a dog") == {"": [3]}
    assert where("dog " * 80 + "*")["*"] == [77 + 1 + 5], "the second window of 77 tokens"


def test_positions_in_training_captions(models, vectors):
    encoder = text.Encoder(models[1], text.build_text_encoder(models[1]), torch.device("cpu"))
    with torch.inference_mode(False):
        encoder.learn("<new1>", nn.Parameter(vectors.clone()))
    assert encoder.positions("a photo of a <new1> dog", "<new1>") == (5, 6)
    assert encoder.positions("a photo of a <new1> stuffed animal", "stuffed animal") == (7, 8)
    assert encoder.positions("a photo of a dog", "<new1>") == ()
    assert encoder.end("a photo of a <new1> dog") == 8


def test_the_word_trains_with_the_right_gradient_and_nothing_else_does(models, vectors):
    """Against transformers in fp64: the gradient of a random function of the encoding."""
    with torch.inference_mode(False), torch.enable_grad():
        model = text.build_text_encoder(models[1])
        encoder = text.Encoder(models[1], model, torch.device("cpu"))
        parameter = nn.Parameter(vectors.clone())
        encoder.learn("<new1>", parameter)
        target = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(1))
        encoded = encoder(["a photo of a <new1> dog", "<new1> <new1>"])
        (encoded * target).sum().backward()
        assert all(p.grad is None for p in model.parameters())

        reference = transformers_copy(model).double()
        free = vectors.double().clone().requires_grad_(True)
        table = reference.get_input_embeddings().weight.detach()
        total = 0.0
        for row, ids in enumerate(([A, PHOTO, OF, A, "v0", "v1", DOG], ["v0", "v1", "v0", "v1"])):
            ids = [START, *ids, *[END] * (76 - len(ids))]
            picked = torch.stack([free[int(i[1])] if isinstance(i, str) else table[i] for i in ids])[None]
            hook = reference.get_input_embeddings().register_forward_hook(lambda *_, picked=picked: picked)
            numbers = [0 if isinstance(i, str) else i for i in ids]
            hidden = reference(input_ids=torch.tensor([numbers])).last_hidden_state
            hook.remove()
            assert torch.allclose(hidden[0].float(), encoded[row], atol=1e-4)
            total = total + (hidden * target[row]).sum()
        total.backward()
        assert (parameter.grad - free.grad).norm() < 1e-4 * free.grad.norm()


def test_a_picture_is_sampled_with_the_word_by_stock_nodes(models, vectors):
    clip = with_placeholder(models[1], "<new1>", vectors)
    assert not torch.equal(sample(models[0], clip, "a <new1> dog"), sample(models[0], clip, "a dog"))


@pytest.mark.parametrize("placeholder", ["new 1", "(new)", "a:b", "{x}", "a|b", "a\\b", "[x]"])
def test_a_word_that_prompts_cannot_hold_is_refused(placeholder):
    with pytest.raises(ValueError, match="identifier .* holds .* take one word such as <new1>"):
        check_placeholder(placeholder, ["photo of a dog"])


@pytest.mark.parametrize("placeholder", ["photo", "OF", "dog"])
def test_a_word_of_the_caption_is_refused(placeholder):
    with pytest.raises(ValueError, match="is a word of the training caption 'photo of a dog'"):
        check_placeholder(placeholder, ["photo of a dog"])
