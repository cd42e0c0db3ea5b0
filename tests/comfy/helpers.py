"""What the in-process tests share: recipes of a few steps, a silent report, sampling with the stock nodes."""

import torch

from comfy_sude.baselines import REGISTRY
from comfy_sude.recipe import Options, Prior, Recipe


class Silent:
    """A report that remembers its phases and can act at a step."""

    def __init__(self, at_step=None):
        self.phases: list[str] = []
        self.steps: list[int] = []
        self.notices: list[str] = []
        self.at_step = at_step
        self.enough = False

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Remember the phase."""
        self.phases.append(name)

    def close(self, name: str) -> None:
        """Remember the last phase."""
        self.phases.append(name)

    def follow(self, watched) -> None:
        """Remember what is watched."""
        self.watched = watched

    def notice(self, text: str) -> None:
        """Remember the notice."""
        self.notices.append(text)

    def step(self, done: int, line: str) -> None:
        """Remember the step, then let the test act."""
        self.steps.append(done)
        if self.at_step and self.phases[-1] == "training":
            self.at_step(done)


def recipe(
    method: str = "DreamBooth", seed: int = 0, category: str = "dog", prior: Prior | None = None, **values
) -> Recipe:
    """A recipe of three steps on 64 px; `values` go to the baseline's settings or the options."""
    settings = {"steps": 3, "learning_rate": 1e-4}
    names = REGISTRY[method].settings.__dataclass_fields__
    if "views" in names:
        settings["views"] = 4
    drawn = Prior(number=2, steps=2, cfg=2.0) if REGISTRY[method].settings.TAKES_PRIOR else Prior(kind="off")
    options = {"resolution": 64, "gradient_checkpointing": False, "prior": prior or drawn}
    for name, value in values.items():
        (settings if name in names else options)[name] = value
    return Recipe(category, method, REGISTRY[method].settings(**settings), Options(**options), seed)


def train(models, picture, folder, recipe, report=None, class_images=None, retrain=True):
    """`fine_tune` as the node calls it, with the store in a folder.

    Trained anew unless told otherwise; then what is large is not stored, to spare the disk.
    """
    from comfy_sude.finetune import fine_tune
    from comfy_sude.store import Store

    return fine_tune(
        *models, picture, recipe, report or Silent(), Store(folder, 3e6 if retrain else 20e9), class_images, retrain
    )


def sample(model, clip, text: str = "photo of a sks dog", seed: int = 1, steps: int = 2) -> torch.Tensor:
    """Latents from the stock CLIP Text Encode and KSampler nodes."""
    import nodes

    positive, negative = (nodes.CLIPTextEncode().encode(clip, prompt)[0] for prompt in (text, ""))
    empty = nodes.EmptyLatentImage().generate(64, 64, 1)[0]
    return nodes.KSampler().sample(model, seed, steps, 5.0, "euler", "normal", positive, negative, empty)[0]["samples"]


def predictions(model, context, x, sigma):
    """What a MODEL predicts in the graph (x0), patches applied."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    return model.model.apply_model(x, sigma, c_crossattn=context)


def fingerprint(model, clip, vae) -> list:
    """Sums of the bits of all weights, and the patches on them: quicker than the pack's own hash."""
    found = []
    for patcher in (model, clip.patcher, vae.patcher):
        for name, weight in patcher.model.state_dict().items():
            weight = patcher.backup[name].weight if name in patcher.backup else weight
            bits = weight.contiguous().view(torch.uint8 if weight.element_size() % 4 else torch.int32)
            found.append((name, int(bits.sum(dtype=torch.int64))))
        found.append((sorted(patcher.patches), sorted(patcher.object_patches), str(sorted(patcher.model_options))))
    return found
