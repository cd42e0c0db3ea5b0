"""Where the pack keeps files, always inside ComfyUI's own folders."""

from pathlib import Path

import folder_paths

from .. import files
from ..store import GIGABYTE, Store

SCORES = "sude_scores"  # the kind of model files that extra_model_paths.yaml and the models folder know by this name
SUBJECTS = "sude"  # the folder of saved subjects: below output (where they are saved), models and input (uploads)


def register() -> None:
    """Let ComfyUI know the folder of the models that score."""
    folder_paths.add_model_folder_path(SCORES, str(Path(folder_paths.models_dir) / SCORES))


def score_folders() -> list[Path]:
    """Where models that score may lie: models/sude_scores and what extra_model_paths.yaml adds."""
    register()
    own = Path(folder_paths.models_dir) / SCORES
    return [own, *(Path(path) for path in folder_paths.get_folder_paths(SCORES) if Path(path) != own)]


def store(gigabytes: float) -> Store:
    """The store, in ComfyUI's user folder."""
    return Store(Path(folder_paths.get_user_directory()) / "sude", gigabytes * GIGABYTE)


def subjects_folder() -> Path:
    """Where SuDe Save Subject writes."""
    return Path(folder_paths.get_output_directory()) / SUBJECTS


def subject_files() -> dict[str, Path]:
    """Saved subjects by the name a person chooses them by, "spike_00001_.safetensors"; the newest first."""
    places = (
        ("", subjects_folder()),
        (" [models]", Path(folder_paths.models_dir) / SUBJECTS),
        (" [input]", Path(folder_paths.get_input_directory()) / SUBJECTS),
    )
    found = {
        f"{path.relative_to(folder).as_posix()}{label}": path
        for label, folder in places
        for path in files.within(folder)
    }

    def age(name: str) -> float:
        try:
            return -found[name].stat().st_mtime
        except OSError:  # removed meanwhile
            return 0.0

    return {name: found[name] for name in sorted(found, key=lambda name: (age(name), name))}
