"""Captions as the released code writes them, and the words a user may type."""

import pytest

from comfy_sude import captions


def test_the_captions_are_the_released_codes():
    assert captions.subject_caption("dog", "sks") == "photo of a sks dog"
    assert captions.category_caption("dog") == "photo of a dog"
    assert captions.EMPTY == ""


def test_the_category_caption_is_the_subject_caption_without_its_identifier():
    for category in ("dog", "stuffed animal"):
        words = captions.subject_caption(category, "sks").split()
        words.remove("sks")
        assert " ".join(words) == captions.category_caption(category)


def test_an_attribute_stands_before_the_identifier_and_the_context_at_the_end():
    assert captions.prompt("dog", "sks", "running", "on the beach") == "photo of a running sks dog on the beach"
    assert captions.prompt("dog", "sks", context="in the snow") == "photo of a sks dog in the snow"


def test_empty_parts_leave_no_double_spaces():
    assert captions.prompt(" stuffed   animal ", " sks ", "  ", "\n") == "photo of a sks stuffed animal"


def test_braces_in_a_prompt_are_just_text():
    assert captions.prompt("dog", "sks", "{wild}", "{}") == "photo of a {wild} sks dog {}"


def test_words_are_tidied_before_they_are_used():
    assert captions.check("  stuffed \n animal ", "\tsks ") == ("stuffed animal", "sks")


@pytest.mark.parametrize("category", ["", "   ", "\n"])
def test_an_empty_category_is_refused(category):
    with pytest.raises(ValueError, match="category is empty"):
        captions.check(category, "sks")


def test_an_empty_identifier_is_refused():
    with pytest.raises(ValueError, match="identifier is empty"):
        captions.check("dog", " ")


@pytest.mark.parametrize(
    ("category", "identifier", "named"), [("\ud800", "sks", "category"), ("dog", "a\udfffb", "identifier")]
)
def test_half_a_character_is_refused_before_a_tokenizer_fails_on_it(category, identifier, named):
    with pytest.raises(ValueError, match=f"^{named} .* holds half a character: type it again"):
        captions.check(category, identifier)


def test_a_new_word_that_its_lower_case_does_not_find_is_refused():
    with pytest.raises(ValueError, match="is another word in lower case"):
        captions.check_placeholder("<İ>", ["dog"])


@pytest.mark.parametrize(
    ("category", "identifier"), [("sks dog", "sks"), ("dog SKS", "sks"), ("dog", "dog"), ("red new one dog", "new one")]
)
def test_a_category_that_holds_the_identifier_is_refused(category, identifier):
    with pytest.raises(ValueError, match="holds the identifier"):
        captions.check(category, identifier)


def test_an_identifier_inside_a_longer_word_is_no_identifier():
    assert captions.check("catfish", "cat") == ("catfish", "cat")
