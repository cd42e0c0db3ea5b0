"""The noise process: what is read from a ComfyUI model_sampling, and the algebra of noise, velocity and target."""

import pytest
import torch

from comfy_sude import sude
from comfy_sude.diffusion import NoiseProcess

AB = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2, 0)


# Stand-ins with the names of ComfyUI's classes: unit tests run without ComfyUI.
class EPS: ...


class V_PREDICTION(EPS): ...


class EDM(V_PREDICTION): ...


class X0(EPS): ...


class IMG_TO_IMG(X0): ...


class CONST: ...


class ModelSamplingDiscrete:
    def __init__(self, sigmas=None, num_timesteps=1000):
        self.num_timesteps = num_timesteps
        self.sigmas = ((1 - AB) / AB).sqrt().float() if sigmas is None else sigmas


class ModelSamplingDiscreteEDM(ModelSamplingDiscrete): ...


class ModelSamplingContinuousEDM:
    def __init__(self):
        self.sigmas = torch.linspace(0.002, 120, 1000)


class ModelSamplingDiscreteFlow(ModelSamplingContinuousEDM): ...


def sampling(*bases, **arguments):
    return type("ModelSampling", bases, {})(**arguments)


@pytest.mark.parametrize(("kind", "prediction"), [(EPS, "eps"), (V_PREDICTION, "v")])
def test_a_discrete_model_gives_its_schedule_and_what_it_predicts(kind, prediction):
    process = NoiseProcess.from_model_sampling(sampling(ModelSamplingDiscrete, kind))
    assert process.prediction == prediction
    assert process.num_timesteps == 1000
    assert process.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(process.alphas_cumprod, AB, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "bases",
    [
        (ModelSamplingContinuousEDM, EPS),
        (ModelSamplingContinuousEDM, EDM),
        (ModelSamplingDiscreteFlow, CONST),
        (ModelSamplingDiscreteEDM, EPS),
        (ModelSamplingDiscrete, EDM),
        (ModelSamplingDiscrete, X0),
        (ModelSamplingDiscrete, IMG_TO_IMG),
        (ModelSamplingDiscrete, CONST),
    ],
    ids=lambda bases: "+".join(base.__name__ for base in bases),
)
def test_a_model_that_is_neither_discrete_noise_nor_velocity_is_refused(bases):
    with pytest.raises(ValueError, match="supported|neither noise nor velocity"):
        NoiseProcess.from_model_sampling(sampling(*bases))


def test_a_schedule_with_another_number_of_sigmas_than_timesteps_is_refused():
    with pytest.raises(ValueError, match="supported"):
        NoiseProcess.from_model_sampling(sampling(ModelSamplingDiscrete, EPS, num_timesteps=50))


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="x0"):
        NoiseProcess(AB, "x0")


def _draw(seed=0):
    g = torch.Generator().manual_seed(seed)
    t = torch.tensor([0, 1, 499, 999])
    return (*(torch.randn(4, 4, 8, 8, generator=g) for _ in range(2)), t)


def test_noised_latents_have_the_signal_and_noise_of_their_own_timestep():
    z, noise, t = _draw()
    x_t = NoiseProcess(AB).add_noise(z, noise, t)
    assert x_t.dtype == torch.float32
    for i in range(4):
        expected = AB[t[i]].sqrt() * z[i].double() + (1 - AB[t[i]]).sqrt() * noise[i].double()
        torch.testing.assert_close(x_t[i].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_perfect_prediction_is_the_noise_that_was_added(prediction):
    z, noise, t = _draw()
    process = NoiseProcess(AB, prediction)
    x_t = process.add_noise(z, noise, t)
    torch.testing.assert_close(process.to_noise(process.target(z, noise, t), x_t, t), noise, rtol=1e-4, atol=1e-5)


def test_the_velocity_target_is_salimans_and_hos():
    z, noise, t = _draw()
    alpha, sigma = AB[t].sqrt().view(-1, 1, 1, 1), (1 - AB[t]).sqrt().view(-1, 1, 1, 1)
    expected = alpha * noise.double() - sigma * z.double()
    torch.testing.assert_close(NoiseProcess(AB, "v").target(z, noise, t).double(), expected, rtol=1e-5, atol=1e-6)


def test_noise_and_velocity_models_that_predict_the_same_get_the_same_sude_loss_and_gradient():
    z, noise, t = _draw()
    process = NoiseProcess(AB, "v")
    x_t, lam = process.add_noise(z, noise, t), sude.weight(AB, t)
    alpha, sigma = process.signal(t, z)
    eps_u, towards = _draw(1)[0], 0.3 * _draw(2)[0]
    share = torch.tensor([0.5, 1.5, 0.5, 1.5]).view(-1, 1, 1, 1)  # of the category's attributes that the subject has
    eps_c, eps_a = eps_u + towards, (eps_u + share * towards + 0.1 * _draw(3)[0]).requires_grad_()
    by_noise = sude.loss(eps_a, eps_c, eps_u, lam)
    (gradient,) = torch.autograd.grad(by_noise.loss.sum(), eps_a)

    v_a, v_c, v_u = ((eps.detach() - sigma * x_t) / alpha for eps in (eps_a, eps_c, eps_u))
    v_a.requires_grad_()
    by_velocity = sude.loss(*(process.to_noise(v, x_t, t) for v in (v_a, v_c, v_u)), lam)
    (gradient_v,) = torch.autograd.grad(by_velocity.loss.sum(), v_a)

    assert by_noise.active.tolist() == [1, 0, 1, 0]
    assert torch.equal(by_noise.active, by_velocity.active)
    torch.testing.assert_close(by_velocity.loss, by_noise.loss, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradient_v / alpha, gradient, rtol=1e-3, atol=1e-6)
