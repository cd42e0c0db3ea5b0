"""What a training writes down of itself, step by step."""

from dataclasses import dataclass, field

TERMS = ("l_sub", "l_sude", "l_prior", "gate", "gap")


@dataclass
class Log:
    """One value per step and term: l_sub, l_sude (gated, weighted by lambda), l_prior, gate (share open) and gap.

    A baseline's own terms come after them; `labels` says what to call those. `validation` has pairs of a step and the
    denoising error at fixed timesteps after it.
    """

    values: dict[str, list[float]] = field(default_factory=lambda: {term: [] for term in TERMS})
    seconds: float = 0.0
    labels: dict[str, str] = field(default_factory=dict)
    validation: list[tuple[int, float]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.values["l_sub"])

    def recent(self, term: str, window: int = 50) -> float:
        """Mean of a term's last values."""
        tail = self.values[term][-window:]
        return sum(tail) / len(tail) if tail else float("nan")
