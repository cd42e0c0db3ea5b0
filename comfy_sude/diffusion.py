"""The noise process as the method needs it, read from any ComfyUI model_sampling: noising, target, noise equivalents.

Everything here is in the variance-preserving scale that the UNet sees: x_t = sqrt(ab_t) z + sqrt(1 - ab_t) noise, with
z the latent in model scale. (ComfyUI's own x is x_t * sqrt(sigma^2 + 1), sigma^2 = (1 - ab) / ab.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTIONS = ("eps", "v")


@dataclass(frozen=True)
class NoiseProcess:
    """A discrete diffusion process and what its model predicts.

    Attributes:
        alphas_cumprod: [T] float64 alpha-bar on the CPU.
        prediction: "eps" (noise) or "v" (velocity, Salimans & Ho 2022).
    """

    alphas_cumprod: Tensor
    prediction: str = "eps"

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {self.prediction!r}, but it must be one of {', '.join(PREDICTIONS)}.")

    @classmethod
    def from_model_sampling(cls, model_sampling) -> "NoiseProcess":
        """Read schedule and prediction type from a ComfyUI model_sampling object (with its ModelSampling* patches).

        Raises:
            ValueError: the model is neither a discrete eps- nor a discrete v-prediction model (flow, EDM, ...).
        """
        families = {base.__name__ for base in type(model_sampling).__mro__}
        timesteps = getattr(model_sampling, "num_timesteps", None)
        sigmas = getattr(model_sampling, "sigmas", None)
        discrete = "ModelSamplingDiscrete" in families and "ModelSamplingDiscreteEDM" not in families
        if not discrete or sigmas is None or len(sigmas) != timesteps or "EPS" not in families:
            raise ValueError(
                f"this model's noise process ({', '.join(sorted(families - {'object'}))}) is not supported."
            )
        if families & {"EDM", "X0", "IMG_TO_IMG"}:
            raise ValueError("this model predicts neither noise nor velocity, which SuDe Fine-Tune needs.")
        sigmas = sigmas.detach().to(device="cpu", dtype=torch.float64)
        return cls(1 / (sigmas**2 + 1), "v" if "V_PREDICTION" in families else "eps")

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def signal(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(ab_t) and sqrt(1 - ab_t), shaped [B, 1, 1, ...] to multiply `like`, in its dtype and on its device."""
        ab = self.alphas_cumprod[t.to("cpu")].view(-1, *[1] * (like.ndim - 1))
        return ab.sqrt().to(like), (1 - ab).sqrt().to(like)

    def add_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t: [B, C, h, w] noisy latents, from z: [B, C, h, w] latents (model scale), noise alike, t: [B] steps."""
        alpha, sigma = self.signal(t, z)
        return alpha * z + sigma * noise

    def target(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """[B, C, h, w] what the model should predict: the noise, or v = sqrt(ab) noise - sqrt(1 - ab) z."""
        if self.prediction == "eps":
            return noise
        alpha, sigma = self.signal(t, z)
        return alpha * noise - sigma * z

    def to_noise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """[B, C, h, w] the noise a model's prediction at (x_t, t) amounts to: eps = sqrt(ab) v + sqrt(1 - ab) x_t."""
        if self.prediction == "eps":
            return prediction
        alpha, sigma = self.signal(t, prediction)
        return alpha * prediction + sigma * x_t

    def ddim(self, x_t: Tensor, prediction: Tensor, t: Tensor, then: Tensor | None) -> Tensor:
        """[B, C, h, w] the DDIM step (Song et al. 2021, eta 0) from t [B] to `then` [B], or to the clean latent.

        The prediction is the model's own; all in model scale.
        """
        alpha, sigma = self.signal(t, x_t)
        noise = self.to_noise(prediction, x_t, t)
        z = alpha * x_t - sigma * prediction if self.prediction == "v" else (x_t - sigma * noise) / alpha
        return z if then is None else self.add_noise(z, noise, then)
