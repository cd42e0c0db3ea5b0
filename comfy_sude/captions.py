"""Captions of the subject, its category and prompts with attributes.

Source: released code, personalized.py:10-22 ("photo of a sks {class}", no leading article, no full stop); the attribute
stands before the identifier ("photo of a running sks dog", main.sh:11).
"""

import re

TEMPLATE = "photo of a {}"
EMPTY = ""  # the caption of the unconditional prediction u. Source: ddpm.py:1032 (never the negative prompt)


def normalize(text: str) -> str:
    """Single spaces, none at the ends."""
    return " ".join(text.split())


def subject_caption(category: str, identifier: str) -> str:
    """The caption of the example: "photo of a sks dog"."""
    return prompt(category, identifier)


def category_caption(category: str) -> str:
    """The subject's caption without its identifier: "photo of a dog"."""
    return prompt(category)


def prompt(category: str, identifier: str = "", attribute: str = "", context: str = "") -> str:
    """A caption in the training template: attribute before the identifier, context at the end.

    >>> prompt("dog", "sks", "running", "on the beach")
    'photo of a running sks dog on the beach'
    """
    return normalize(TEMPLATE.format(" ".join([attribute, identifier, category, context])))


def pattern(placeholder: str) -> re.Pattern:
    """Finds a placeholder in a text, in any case: "<new1>" anywhere, "sks" only where it is a word of its own.

    Never inside the name of an `embedding:` file.
    """
    start = r"(?<!\w)" if placeholder[:1].isalnum() else ""
    end = r"(?!\w)" if placeholder[-1:].isalnum() else ""
    return re.compile(rf"(?<!embedding:){start}{re.escape(placeholder)}{end}", re.IGNORECASE)


def holds(text: str, placeholder: str) -> bool:
    """Whether a placeholder occurs in a text."""
    return pattern(placeholder).search(text) is not None


def check_placeholder(placeholder: str, texts: list[str]) -> None:
    """Raises ValueError if a new word could be taken for something else in prompts, or occurs in one of the texts."""
    forbidden = sorted(set(placeholder) & set(" ()[]{}|\\:"))
    if forbidden:
        raise ValueError(
            f"identifier {placeholder!r} holds {''.join(forbidden)!r}, which prompts use for other things: take one "
            "word such as <new1>."
        )
    if not holds(placeholder, placeholder.lower()):
        raise ValueError(f"identifier {placeholder!r} is another word in lower case: take one such as <new1>.")
    for text in texts:
        if holds(text, placeholder):
            raise ValueError(
                f"identifier {placeholder!r} is a word of the training caption {text!r}: take one that no prompt "
                "has, such as <new1>."
            )


def check_text(name: str, text: str) -> None:
    """Raises ValueError if a text holds half a character (a lone surrogate), which no tokenizer, file or log takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} {text[:80]!r} holds half a character: type it again.")


def check(category: str, identifier: str) -> tuple[str, str]:
    """The category and identifier as they will be used.

    Raises:
        ValueError: one of them is empty, or the category holds the identifier (the caption without the identifier would
            then not be the category's).
    """
    category, identifier = normalize(category), normalize(identifier)
    check_text("category", category)
    check_text("identifier", identifier)
    if not category:
        raise ValueError("category is empty: type what the picture shows in one or two words, for example dog.")
    if not identifier:
        raise ValueError("identifier is empty: type a rare word that will mean your subject, for example sks.")
    if f" {identifier.lower()} " in f" {category.lower()} ":
        raise ValueError(
            f"category {category!r} holds the identifier {identifier!r}: give the plain kind of thing as category "
            f"(for example dog); the identifier is added by the node."
        )
    return category, identifier
