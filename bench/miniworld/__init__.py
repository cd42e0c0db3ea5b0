"""A small text-to-image model in Stable Diffusion 1.5's format, with the drawn world it was trained on and its judge.

    from bench.miniworld import SUBJECTS, expand, load_judge, prompt, render

Nothing here needs ComfyUI, except `measure`, which samples with it.
"""

from .expand import expand
from .judge import LABELS, Judge, Verdict, load_judge
from .text import IDENTIFIERS
from .world import ATTRIBUTES, CATEGORIES, SUBJECTS, Subject, grid, prompt, random_subject, render

__all__ = [
    "ATTRIBUTES",
    "CATEGORIES",
    "IDENTIFIERS",
    "LABELS",
    "SUBJECTS",
    "Judge",
    "Subject",
    "Verdict",
    "expand",
    "grid",
    "load_judge",
    "prompt",
    "random_subject",
    "render",
]
