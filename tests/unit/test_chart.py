"""The chart of a training is an IMAGE whatever the training was like."""

import pytest
import torch

from comfy_sude import chart
from comfy_sude.train import TERMS, Log


def log(**values) -> Log:
    length = max(len(v) for v in values.values())
    return Log({term: values.get(term, [0.0] * length) for term in TERMS})


def drawn_in(image, color) -> torch.Tensor:
    """[H, W] where the picture has a panel's full colour."""
    return ((image[0] * 255).round().int() == torch.tensor(color)).all(-1)


@pytest.mark.parametrize(
    "values",
    [
        {"l_sub": [0.3]},
        {"l_sub": [0.5, 0.25]},
        {"l_sub": [0.1] * 3000, "l_sude": [-0.2, 0.0, 0.7] * 1000, "gate": [0.0, 1.0, 0.5] * 1000},
        {"l_sub": [1e-30, 1e30, 2.0]},
        {"l_sub": [-1.0, -2.0]},
    ],
    ids=["one step", "two steps", "long", "wild", "negative"],
)
def test_the_chart_is_an_image_for_any_log(values):
    image = chart.draw(log(**values), "sks dog")
    assert image.shape == (1, 590, 900, 3)
    assert image.dtype == torch.float32
    assert torch.isfinite(image).all()
    assert image.min() >= 0
    assert image.max() <= 1


def test_the_curve_of_each_term_is_drawn_in_its_panel():
    steps = 200
    image = chart.draw(log(l_sub=[1 - i / steps for i in range(steps)], l_sude=[0.3] * steps, gate=[1.0] * steps), "")
    third = chart.PANEL
    for index, (_term, _label, color) in enumerate(chart.PANELS):
        rows = drawn_in(image, color)[:, 80:].nonzero()[:, 0]
        assert len(rows) > 100
        assert rows.min() >= 60 - 25 + index * third
        assert rows.max() <= 60 + (index + 1) * third


def test_a_prior_and_a_baselines_own_term_have_panels_of_their_own():
    made = log(l_sub=[0.5] * 100, l_prior=[0.4] * 100)
    assert chart.draw(made, "").shape[1] == 590 + chart.PANEL
    made.values["l_attention"] = [0.3] * 100
    made.labels["l_attention"] = "L_att: attention"
    image = chart.draw(made, "")
    assert image.shape[1] == 590 + 2 * chart.PANEL
    for index, color in ((3, chart.PRIOR[2]), (4, chart.OWN)):
        rows = drawn_in(image, color)[:, 80:].nonzero()[:, 0]
        assert len(rows) > 100
        assert 30 + index * chart.PANEL <= rows.min() <= rows.max() <= 30 + (index + 1) * chart.PANEL


def test_a_falling_loss_is_a_falling_curve():
    steps = 200
    image = chart.draw(log(l_sub=[1 - i / steps for i in range(steps)]), "")
    here = drawn_in(image, chart.PANELS[0][2])[64:]  # below the label
    left, right = (here[:, x].nonzero().float().mean() for x in (120, 850))
    assert right > left + 50, "rows are counted downwards"


def test_the_running_mean_is_the_mean_of_the_last_values():
    assert chart.running_mean([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
    assert chart.running_mean([5.0], 10) == [5.0]
    assert chart.running_mean([], 3) == []


def test_one_outlier_does_not_flatten_the_curve():
    low, high = chart._range([0.1] * 99 + [1000.0])
    assert low == 0
    assert high < 1
