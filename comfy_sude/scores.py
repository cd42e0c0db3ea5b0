"""Scores of pictures: is it the subject (CLIP-I, DINO-I, DINOv2-I), does it show what the prompt says (CLIP-T, BLIP-T).

Source: SuDe Sec. 5.1 for what is scored; the models and their preprocessing, which the paper does not state in full,
are those its code and its code's ancestors name (`score_models.py`). Values are percentages. Numbers of other papers
were often made with other models or other sets of real pictures: compare only what was scored alike.
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import captions
from .score_models import SQUASHED, USED_BY, MissingModel, Models

METRICS = tuple(USED_BY)  # CLIP-I, DINO-I, DINOv2-I, CLIP-T, BLIP-T
FIDELITY = METRICS[:3]  # pictures against references
ALIGNMENT = METRICS[3:]  # pictures against texts
PIXELS = "pixels"  # of `drift`

__all__ = [
    "ALIGNMENT", "FIDELITY", "METRICS", "PIXELS", "MissingModel", "Models", "best", "drift", "evaluate",
    "strip_identifier",
]  # fmt: skip


def evaluate(
    pictures: Sequence[Tensor] | Tensor,
    references: Sequence[Tensor] | Tensor,
    texts: Sequence[str],
    models: Models,
    metrics: Sequence[str] = METRICS,
) -> dict[str, list[float]]:
    """Each picture's scores in percent.

    CLIP-I, DINO-I, DINOv2-I: mean cosine to the references. The mean over all pictures is then the mean over all pairs,
    as in the released code (scripts/evaluate_model.py:86-126). For CLIP-I references are first squashed to 512 x 512,
    as the evaluator of textual inversion does (evaluation/clip_eval.py:7-59); pictures are not. That evaluator resizes
    tensors without antialiasing, here CLIP's own resizing is used throughout.
    CLIP-T, BLIP-T: cosine to the picture's text, without CLIP score's factor of 2.5.

    Args:
        pictures: N of [H, W, 3] in [0, 1]; sizes may differ.
        references: R of [H, W, 3] in [0, 1]: real pictures of the subject.
        texts: one a picture, without the identifier (`strip_identifier`); not needed for CLIP-I, DINO-I and DINOv2-I.
        models: what to score with.
        metrics: of METRICS.

    Returns:
        N values for each metric, in the order asked for.

    Raises:
        MissingModel: before anything is loaded.
        ValueError: unknown metrics, or counts that do not match.
    """
    _check_metrics(metrics, METRICS)
    if not len(pictures):
        raise ValueError("there are no pictures to score.")
    if not len(references) and set(metrics) & set(FIDELITY):
        raise ValueError("there is no reference picture of the subject to compare with.")
    if len(texts) != len(pictures) and set(metrics) & set(ALIGNMENT):
        raise ValueError(f"there are {len(pictures)} pictures and {len(texts)} texts: give one text for each picture.")
    models.check(metrics)
    seen: dict[str, Tensor] = {}  # a model looks at the pictures once

    def embedded(name: str) -> Tensor:
        if name not in seen:
            seen[name] = models.images(name, pictures)
        return seen[name]

    found = {}
    for metric in metrics:
        name = USED_BY[metric]
        if metric in FIDELITY:
            squash = SQUASHED if metric == "CLIP-I" else 0
            cosines = (embedded(name) @ models.images(name, references, squash).T).mean(1)
        else:
            cosines = (embedded(name) * models.texts(name, texts)).sum(1)
        found[metric] = (100 * cosines).tolist()
    return found


def drift(
    tuned: Sequence[Tensor] | Tensor,
    base: Sequence[Tensor] | Tensor,
    models: Models,
    metrics: Sequence[str] = FIDELITY,
) -> dict[str, float]:
    """How far a training moved the model on prompts that have nothing to do with its subject.

    Both models draw the same unrelated prompts from the same noise; picture i of one is compared with picture i of the
    other. peft's image benchmark calls (1 - cosine) / 2 of DINOv2 drift (method_comparison/image-gen/run.py:228-275).

    Args:
        tuned: N of [H, W, 3] in [0, 1] by the fine-tuned model.
        base: the same by the model it was made from; each of its partner's size.
        models: what to compare with.
        metrics: of FIDELITY; none compares pixels only.

    Returns:
        Percentages. For each metric the mean cosine of the pairs: 100 is no drift. "pixels": the mean absolute
        difference of the RGB values, as a share of their range: 0 is no drift.

    Raises:
        MissingModel: before anything is loaded.
        ValueError: unknown metrics, or pictures that are no pairs.
    """
    _check_metrics(metrics, FIDELITY)
    if not len(tuned) or [one.shape for one in tuned] != [one.shape for one in base]:
        raise ValueError(
            f"drift compares pairs, but there are {len(tuned)} pictures of the tuned model and {len(base)} of the base "
            "model, or they differ in size: draw the same prompts at the same size with both."
        )
    models.check(metrics)
    found = {}
    for metric in metrics:
        name = USED_BY[metric]
        cosines = (models.images(name, tuned) * models.images(name, base)).sum(1)
        found[metric] = float(100 * cosines.mean())
    differences = [(one.float() - other.float()).abs().mean() for one, other in zip(tuned, base, strict=True)]
    return {**found, PIXELS: float(100 * torch.stack(differences).mean())}


def strip_identifier(text: str, identifier: str, category: str = "") -> str:
    """A prompt as the scoring models, which do not know the identifier, should read it.

    Every identifier goes away. Where it alone stood for the subject, as ViCo's does, the category takes its place; that
    it did not is seen by the category coming next, or after one more word.

    >>> strip_identifier("photo of a running sks dog", "sks", "dog")
    'photo of a running dog'
    >>> strip_identifier("photo of a running *", "*", "dog")
    'photo of a running dog'

    Args:
        text: the prompt.
        identifier: of the subject, in any case; nothing goes away if it is empty.
        category: of the subject; empty never puts anything in the identifier's place.
    """
    text, identifier, category = (captions.normalize(part) for part in (text, identifier, category))
    if not identifier:
        return text
    found = captions.pattern(identifier)
    if category:
        named = re.compile(rf"\s*(?:[\w'-]+\s+)?{re.escape(category)}(?:e?s)?(?!\w)", re.IGNORECASE)
        text = found.sub(lambda match: "" if named.match(match.string, match.end()) else f" {category} ", text)
    else:
        text = found.sub(" ", text)
    return re.sub(r"\s+([,.;:!?])", r"\1", captions.normalize(text)).lstrip(",.;:!? ")


def best(
    candidates: Mapping[str, Mapping[str, float]],
    plain: str,
    within: float,
    attribute: str = "BLIP-T",
    fidelity: str = "DINO-I",
) -> str:
    """The name of the best of a sweep: the highest attribute alignment among those that are still the subject.

    Those are all whose fidelity is at most `within` points lower than the plain baseline's; the plain baseline is one
    itself, so that it is the best where no other qualifies. At equal alignment the higher fidelity wins, then the
    earlier candidate. A candidate with a value that is not finite never wins over one without.

    Args:
        candidates: name -> metric -> mean value in percent.
        plain: name of the baseline without SuDe.
        within: points of fidelity that may be lost.
        attribute: the metric of alignment, of ALIGNMENT.
        fidelity: the metric of fidelity, of FIDELITY.

    Raises:
        ValueError: the plain baseline or a metric is not among the candidates, or `within` is negative.
    """
    if plain not in candidates:
        raise ValueError(f"the plain baseline {plain!r} is not among: {', '.join(candidates)}.")
    for name, values in candidates.items():
        for metric in (attribute, fidelity):
            if metric not in values:
                raise ValueError(f"{name} has no {metric}: score it, or choose by another metric.")
    if not within >= 0:
        raise ValueError(f"within is {within}, but it must be 0 or more points.")
    least = candidates[plain][fidelity] - within
    chosen, top = plain, (-math.inf, -math.inf)
    for name, values in candidates.items():
        pair = values[attribute], values[fidelity]
        qualifies = name == plain or pair[1] >= least
        if qualifies and all(map(math.isfinite, pair)) and pair > top:
            chosen, top = name, pair
    return chosen


def _check_metrics(metrics: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError for a metric that is not known."""
    wrong = [metric for metric in metrics if metric not in known]
    if wrong:
        raise ValueError(f"{', '.join(map(repr, wrong))} is no metric here: choose of {', '.join(known)}.")
