"""The whole state of a training on disk, so that an interrupted one goes on where it was, bit for bit.

A state holds the trained parameters, the optimizer's and the gradient scaler's state, every random generator and the
log. It is stored under the training's trajectory, everything that decides the training but how long it is, and the
number of steps it was on its way to: steps change nothing before they are reached, so a state also serves any training
of the same trajectory that is to go further.
"""

import dataclasses
import json
import logging
import time

import torch
from torch import Tensor

from .data import Generators
from .files import peek
from .store import Store
from .train import Trainer

KIND = "state"
METADATA = "sude.state"
FORMAT = 1
SHARE = 0.05  # of the time that saving may take: large states are saved less often than asked for


def state(trainer: Trainer) -> tuple[dict[str, Tensor], dict]:
    """Tensors and JSON values that `restore` needs to go on from here."""
    tensors, numbers = {}, {}
    for index, parameter in enumerate(trainer.parameters):
        tensors[f"parameter/{index}"] = parameter.detach()
        for name, value in trainer.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                numbers[f"{index}/{name}"] = value
    tensors |= {f"generator/{name}": position for name, position in trainer.generators.state().items()}
    for term, values in trainer.log.values.items():
        tensors[f"log/{term}"] = torch.tensor(values, dtype=torch.float64)
    log = trainer.log
    document = {"format": FORMAT, "steps": log.steps, "seconds": log.seconds, "optimizer": numbers}
    return tensors, {**document, "scaler": trainer.scaler.state_dict(), "validation": list(log.validation)}


def restore(trainer: Trainer, tensors: dict[str, Tensor], document: dict) -> None:
    """Put a fresh trainer of the same trajectory where `state` was taken.

    Raises:
        ValueError: the state is of another training or format; the trainer is as it was.
    """
    parameters = [tensors.get(f"parameter/{index}") for index in range(len(trainer.parameters))]
    fits = [a is not None and a.shape == b.shape for a, b in zip(parameters, trainer.parameters, strict=True)]
    names = {f"log/{term}" for term in trainer.log.values} | {f"generator/{name}" for name in Generators.NAMES}
    if document.get("format") != FORMAT or not all(fits) or not names <= tensors.keys():
        raise ValueError("the state is of another training.")
    optimizer: dict[int, dict] = {}
    found = {name.removeprefix("optimizer/"): value for name, value in tensors.items() if name.startswith("optimizer/")}
    for name, value in {**found, **document["optimizer"]}.items():
        index, _, part = name.partition("/")
        optimizer.setdefault(int(index), {})[part] = value
    with torch.no_grad():
        for parameter, value in zip(trainer.parameters, parameters, strict=True):
            parameter.copy_(value)
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
    trainer.scaler.load_state_dict(document["scaler"])
    trainer.generators.restore({name: tensors[f"generator/{name}"] for name in Generators.NAMES})
    values = {term: tensors[f"log/{term}"].tolist() for term in trainer.log.values}
    validation = [(step, value) for step, value in document.get("validation", ())]
    trainer.log = dataclasses.replace(trainer.log, values=values, seconds=document["seconds"], validation=validation)


class Keeper:
    """Saves a training's state now and then, and finds it again.

    Args:
        entries: the store.
        trajectory: key of everything that decides the training but its number of steps.
        steps: that number.
        interval: seconds of training between two saves.
        tell: called with a sentence for the person, when a state could not be saved.
    """

    def __init__(self, entries: Store, trajectory: str, steps: int, interval: float, tell=logging.warning):
        self.entries, self.trajectory, self.steps, self.interval = entries, trajectory, steps, interval
        self.tell = tell
        self.saved: int | None = None  # the last step whose state is on disk
        self._next = time.monotonic() + interval

    def resume(self, trainer: Trainer) -> int:
        """Restore the furthest stored state that is not beyond the training's end; the steps it had done, or 0."""
        prefix = f"{KIND}-{self.trajectory}-"
        found = []
        for entry in self.entries.entries(KIND):
            if entry.path.name.startswith(prefix):
                done = _document(peek(entry.path)).get("steps")
                if isinstance(done, int) and 0 < done <= self.steps:
                    found.append((done, entry.path.stem.removeprefix(f"{KIND}-")))
        for done, name in sorted(found, reverse=True):
            loaded = self.entries.get(KIND, name)
            if loaded is None:
                continue
            try:
                restore(trainer, loaded[0], _document(loaded[1]))
            except ValueError as error:
                logging.warning("SuDe: a stored state is not used: %s", error)
                continue
            except (RuntimeError, KeyError, TypeError) as error:  # half restored: this trainer is of no use any more
                raise RuntimeError(
                    f"the stored state of step {done} cannot be used with this version of torch ({error}): switch on "
                    "retrain to start over."
                ) from error
            self.saved = done
            return done
        return 0

    def after_step(self, trainer: Trainer) -> None:
        """Save if it is time."""
        if time.monotonic() >= self._next:
            self.save(trainer)

    def save(self, trainer: Trainer) -> bool:
        """Save now; whether the state of the last step is on disk.

        A state whose parameters are not all finite never replaces one that was good.
        """
        if self.saved == trainer.log.steps:
            return True
        if (
            trainer.optimizer is None
            or not trainer.whole
            or not all(bool(torch.isfinite(p).all()) for p in trainer.parameters)
        ):
            return False
        began = time.monotonic()
        tensors, document = state(trainer)
        stored = self.entries.put(KIND, self._name, tensors, {METADATA: json.dumps(document)})
        if stored:
            self.saved = trainer.log.steps
        elif self.entries.limit > 0:
            self.tell(f"the state of step {trainer.log.steps} could not be saved (disk full or over the store's limit)")
        took = time.monotonic() - began
        self._next = time.monotonic() + max(self.interval, took * (1 / SHARE - 1))
        return stored

    def forget(self) -> None:
        """Remove this training's own state."""
        self.entries.remove(KIND, self._name)
        self.saved = None

    @property
    def _name(self) -> str:
        return f"{self.trajectory}-{self.steps}"


def _document(metadata: dict[str, str]) -> dict:
    try:
        document = json.loads(metadata.get(METADATA, "{}"))
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
