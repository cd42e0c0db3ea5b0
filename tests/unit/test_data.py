"""Pictures in, latents out: what is refused, how a picture becomes square, and what each draw may return."""

import math

import pytest
import torch

from comfy_sude.data import Generators, Latents, check_images, to_square


def picture(height=64, width=64, channels=3, batch=1) -> torch.Tensor:
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (None, "NoneType"),
        (picture()[0], "IMAGE batch"),
        (picture(channels=2), "IMAGE batch"),
        (picture()[:0], "empty batch"),
        (picture(63, 200), "200 x 63 px"),
        (picture().index_fill(1, torch.tensor([5]), math.nan), "not finite"),
        (picture().index_fill(1, torch.tensor([5]), math.inf), "not finite"),
    ],
)
def test_a_picture_no_training_can_use_is_named_before_training(images, says):
    with pytest.raises(ValueError, match=says):
        check_images(images, "image")


def test_the_message_names_the_input_that_was_wrong():
    with pytest.raises(ValueError, match="^class_images"):
        check_images(picture()[:0], "class_images")


def test_a_transparent_background_becomes_white():
    rgba = torch.cat([torch.full((1, 64, 64, 3), 0.2), torch.zeros(1, 64, 64, 1)], -1)
    rgba[:, :32, :, 3] = 0.5
    rgb = check_images(rgba)
    assert rgb.shape == (1, 64, 64, 3)
    torch.testing.assert_close(rgb[:, :32], torch.full((1, 32, 64, 3), 0.6))
    torch.testing.assert_close(rgb[:, 32:], torch.ones(1, 32, 64, 3))


def test_a_grey_picture_becomes_rgb():
    grey = picture(channels=1)
    assert torch.equal(check_images(grey), grey.expand(-1, -1, -1, 3))


def test_values_outside_the_range_are_clamped_and_the_given_picture_is_not_changed():
    given = picture() * 3 - 1
    before = given.clone()
    checked = check_images(given)
    assert (checked.min(), checked.max()) == (0, 1)
    assert torch.equal(given, before)


def test_a_picture_made_in_inference_mode_can_be_trained_on():
    with torch.inference_mode():
        given = picture()
    assert not check_images(given).is_inference()


def test_a_wide_picture_is_cropped_at_its_centre():
    image = torch.zeros(1, 64, 128, 3)
    image[:, :, 32:96] = 1
    assert torch.equal(to_square(image, 64), torch.ones(1, 64, 64, 3))


def test_squashing_keeps_the_whole_picture():
    image = torch.zeros(1, 64, 128, 3)
    image[:, :, :64] = 1
    squashed = to_square(image, 64, "squash")
    assert squashed.shape == (1, 64, 64, 3)
    assert squashed[:, :, :30].min() > 0.99
    assert squashed[:, :, 34:].max() < 0.01


def test_a_square_picture_of_the_right_size_is_not_resampled():
    image = picture(batch=2)
    assert torch.equal(to_square(image, 64), image)


def test_resampling_does_not_leave_the_range():
    stripes = (torch.arange(100) % 2).float().view(1, 1, -1, 1).expand(1, 100, 100, 3)
    square = to_square(stripes, 136)
    assert square.shape == (1, 136, 136, 3)
    assert square.min() >= 0
    assert square.max() <= 1


# --- latents


def latents(count=3, std=0.5) -> Latents:
    """Picture i has the mean i + 1, its mirror image -(i + 1), everywhere."""
    mean = torch.arange(1.0, count + 1).view(-1, 1, 1, 1, 1) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1, 1)
    mean = mean.expand(count, 2, 4, 2, 2).contiguous()
    return Latents(mean, torch.full_like(mean, std) if std is not None else None)


def test_every_picture_and_its_mirror_image_are_drawn_equally_often():
    z = latents().draw(12_000, True, False, Generators(0))[:, 0, 0, 0]
    for value in (1, 2, 3, -1, -2, -3):
        assert (z == value).float().mean().item() == pytest.approx(1 / 6, abs=0.015)


def test_nothing_is_mirrored_when_flipping_is_off():
    assert (latents().draw(500, False, False, Generators(0)) > 0).all()


def test_the_posterior_is_sampled_with_its_own_spread():
    z = latents(1, 0.5).draw(4000, False, True, Generators(0))
    assert z.mean().item() == pytest.approx(1, abs=0.01)
    assert z.std().item() == pytest.approx(0.5, abs=0.01)
    assert len(z[:, 0, 0, 0].unique()) > 3900


@pytest.mark.parametrize(("std", "sample"), [(0.5, False), (None, True)])
def test_the_latent_is_the_mode_when_asked_or_when_there_is_no_posterior(std, sample):
    assert (latents(1, std).draw(100, False, sample, Generators(0)) == 1).all()


def test_the_same_seed_draws_the_same_and_another_seed_does_not():
    first, again, other = (latents().draw(16, True, True, Generators(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_switching_one_kind_of_randomness_off_does_not_shift_the_others():
    everything, less = Generators(3), Generators(3)
    latents().draw(4, True, True, everything)
    latents().draw(4, False, False, less)
    for name in ("init", "timesteps", "noise"):
        a, b = (torch.randn(8, generator=getattr(g, name)) for g in (everything, less))
        assert torch.equal(a, b)


def test_the_random_streams_differ_from_each_other_and_from_those_of_the_next_seed():
    drawn = [
        torch.randn(4, generator=getattr(Generators(seed), name))
        for seed in (0, 1, 2**64 - 1)
        for name in Generators.NAMES
    ]
    assert len({tuple(x.tolist()) for x in drawn}) == len(drawn)
