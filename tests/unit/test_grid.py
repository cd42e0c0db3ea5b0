"""The grid's pictures are where their labels are."""

import pytest
import torch

from comfy_sude import grid
from comfy_sude.grid import arrange, draw


def one(value: float, size=(8, 8)) -> torch.Tensor:
    """[1, h, w, 3] a picture of one grey."""
    return torch.full((1, *size, 3), value)


def greys(layout) -> list[list[list[float]]]:
    return [[[round(float(p.mean()), 2) for p in cell] for cell in row] for row in layout.cells]


def items(*values: float) -> list[torch.Tensor]:
    return [one(value) for value in values]


def test_pictures_with_a_label_of_each_kind_go_to_their_cells():
    rows, columns = ["b", "a", "b", "a"], ["x", "x", "y", "y"]
    layout = arrange(items(0.1, 0.2, 0.3, 0.4), rows, columns)
    assert (layout.rows, layout.columns) == (["b", "a"], ["x", "y"])
    assert greys(layout) == [[[0.1], [0.3]], [[0.2], [0.4]]]


def test_a_batch_of_a_labelled_item_stands_in_one_cell():
    batches = [torch.cat(items(0.1, 0.2)), torch.cat(items(0.3, 0.4))]
    layout = arrange(batches, ["a", "b"], ["x", "x"])
    assert greys(layout) == [[[0.1, 0.2]], [[0.3, 0.4]]] and layout.columns == ["x"]


def test_each_of_several_batches_is_a_row():
    batches = [torch.cat(items(0.1, 0.2, 0.3)), torch.cat(items(0.4, 0.5, 0.6))]
    layout = arrange(batches, ["before", "after"], [])
    assert greys(layout) == [[[0.1], [0.2], [0.3]], [[0.4], [0.5], [0.6]]] and layout.rows == ["before", "after"]


@pytest.mark.parametrize(
    "rows, columns, number, expected",
    [
        ([], ["x", "y", "z"], 0, 3),
        (["a", "b", "c"], [], 0, 2),
        ([], [], 4, 4),
        (["a"], ["x", "y", "z"], 2, 2),  # the number asked for decides
        ([], [], 0, 3),  # as nearly square as can be
    ],
)
def test_single_pictures_follow_one_another_in_as_many_columns_as_labels_say(rows, columns, number, expected):
    layout = arrange([torch.cat(items(0.1, 0.2, 0.3, 0.4, 0.5, 0.6))], rows, columns, number)
    assert max(map(len, layout.cells)) == expected
    assert [grey for row in greys(layout) for cell in row for grey in cell] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert layout.rows == rows[: len(layout.cells)] and layout.columns == columns[:expected]


def test_two_labels_of_each_kind_for_two_pictures_are_no_table():
    layout = arrange([torch.cat(items(0.1, 0.2)), torch.cat(items(0.3, 0.4))], ["a", "b"], ["x", "y"])
    assert greys(layout) == [[[0.1], [0.2]], [[0.3], [0.4]]], "rows and columns, not a diagonal"


def test_every_picture_is_drawn_whole_in_its_place_beside_labels_and_title():
    values = (0.2, 0.4, 0.6, 0.8)
    layout = arrange([torch.cat([one(v, (64, 64)) for v in values])], ["first", "second"], ["left", "right"])
    picture = draw(layout, "a title", 64)[0]
    plain = draw(arrange([torch.cat([one(v, (64, 64)) for v in values])], [], []), cell=64)[0]
    assert picture.shape[0] > plain.shape[0] and picture.shape[1] > plain.shape[1], "room for the labels"
    assert plain.shape == (2 * 64 + grid.GAP + 2 * grid.MARGIN, 2 * 64 + grid.GAP + 2 * grid.MARGIN, 3)
    corners = []
    for value in values:
        where = ((picture - value).abs() < 2 / 255).all(-1).nonzero()
        top, left = where.min(0).values.tolist()
        block = picture[top : top + 64, left : left + 64]
        assert ((block - value).abs() < 2 / 255).all(), value
        corners.append((top, left))
    assert corners[0][0] == corners[1][0] < corners[2][0] and corners[0][1] == corners[2][1] < corners[1][1]


def test_small_pictures_are_enlarged_and_large_ones_kept():
    assert draw(arrange(items(0.5), [], [])).shape[1:3] == (192 + 2 * grid.MARGIN, 192 + 2 * grid.MARGIN)
    assert draw(arrange([one(0.5, (300, 200))], [], [])).shape[1:3] == (300 + 2 * grid.MARGIN, 200 + 2 * grid.MARGIN)


def test_pictures_of_different_sizes_share_cells_without_being_cropped():
    layout = arrange([one(0.5, (100, 200)), one(0.9, (200, 100))], [], ["wide", "tall"])
    picture = draw(layout, cell=200)[0]
    for value in (0.5, 0.9):
        where = ((picture - value).abs() < 2 / 255).all(-1).nonzero()
        height, width = (where.max(0).values - where.min(0).values + 1).tolist()
        assert (height, width) == ((100, 200) if value == 0.5 else (200, 100))


def test_long_labels_are_wrapped_within_their_column():
    words = "photo of a very small sks dog running along the beach in the evening sun"
    single = draw(arrange(items(0.5, 0.5), [], ["a", "b"]))
    wrapped = draw(arrange(items(0.5, 0.5), [], [words, words]))
    assert wrapped.shape[2] == single.shape[2] and wrapped.shape[1] > single.shape[1]


def test_a_grid_too_large_for_a_picture_says_what_to_do():
    with pytest.raises(ValueError, match="at most 16384 are drawn: set cell"):
        draw(arrange([one(0.5).expand(400, -1, -1, -1)], [], [], 100), cell=4096)


def test_labels_in_other_scripts_take_a_font_that_has_them(monkeypatch):
    own = grid.font_for("photo of a running sks dog, w_s 0.4 (plain)", 20)
    assert own.getname() == grid.ImageFont.load_default(20).getname()
    tried, real = [], grid.ImageFont.truetype

    def find(name, *given, **more):
        if not isinstance(name, str):  # Pillow's own font comes from memory
            return real(name, *given, **more)
        tried.append(name)
        raise OSError("not on this machine")

    with monkeypatch.context() as patch:
        patch.setattr(grid.ImageFont, "truetype", find)
        assert grid.font_for("бег", 20).getname() == own.getname() and tried == list(grid.FONTS), (
            "none: boxes, no error"
        )
    found = grid.font_for("бег", 20)
    if found.getname() == own.getname():
        pytest.skip("no font with Cyrillic on this machine")
    assert grid._has_all(found, "бег") and not grid._has_all(own, "бег")
