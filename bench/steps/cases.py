"""What is measured, and in which order: the rows of `python -m bench.steps`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from train.config import PretrainConfig
from train.plan.batches import kinds, split
from train.presets import preset

STEP, FORWARD, LATENT = "step", "forward", "latent"


@dataclass(frozen=True)
class Case:
    """One row. samples: of a micro-batch; fewer are tried where they do not fit."""

    name: str
    kind: str  # STEP (a training step), FORWARD (losses without gradients), LATENT (the latent transformer alone)
    preset: str
    samples: int
    accumulation: int = 1
    ranks: int = 1  # more: the share of one rank of ZeRO-2 over so many
    checkpointing: bool = True
    seconds: float = 45.0  # that its process may take

    @property
    def config(self) -> PretrainConfig:
        """The preset with this row's batch."""
        return replace(
            preset(self.preset), activation_checkpointing=self.checkpointing, compile=False,
            batch_size=self.samples * self.accumulation, accumulation=self.accumulation,
        )  # fmt: skip

    @property
    def counts(self) -> dict[str, int]:
        """Samples of a micro-batch by kind."""
        return split(self.samples, kinds(preset(self.preset)))

    @property
    def title(self) -> str:
        """For tables; begins with the preset's name, by which a plan finds it."""
        batch = f"{self.samples} samples" + (
            f" x {self.accumulation} micro-steps" if self.accumulation > 1 else ""
        )
        if self.kind == LATENT:
            return f"latents of {self.preset}, {batch}, with checkpointing"
        if self.kind == FORWARD:
            return f"forward of {self.preset}, {batch}"
        share = f", one of {self.ranks} ZeRO-2 ranks" if self.ranks > 1 else ""
        return f"{self.preset}, {batch}{share}, {'with' if self.checkpointing else 'without'} checkpointing"


CASES = {
    case.name: case
    for case in (
        # As one of 8 GPUs: 1,024 samples in 4 micro-steps. Of 64: 2,048 in 8. Of 256: 2,048 in one.
        Case("aurora-large", STEP, "aurora-large", 32, 4),
        Case("aurora-xl", STEP, "aurora-xl", 4, 8, ranks=64, seconds=60),
        Case("perceiver-xl-forward", FORWARD, "perceiver-xl", 8),
        Case("perceiver-xl-latent", LATENT, "perceiver-xl", 8),
        Case("perceiver-xl", STEP, "perceiver-xl", 8, ranks=256, seconds=60),
        # What larger micro-batches, and none of the recomputing, would give.
        Case("aurora-xl-32", STEP, "aurora-xl", 32, ranks=64, seconds=50),
        Case("perceiver-xl-32", STEP, "perceiver-xl", 32, ranks=256, seconds=50),
        Case("aurora-large-whole", STEP, "aurora-large", 16, 2, checkpointing=False),
    )
}

SMALL = {"aurora-large": "aurora-tiny", "aurora-xl": "aurora-tiny", "perceiver-xl": "perceiver-tiny"}


def rehearsed(case: Case) -> Case:
    """The same with a preset that a CPU runs in seconds, of few samples; the name stays."""
    return replace(
        case, preset=SMALL[case.preset], samples=min(case.samples, 4), accumulation=min(case.accumulation, 2)
    )


def smaller(case: Case) -> Case | None:
    """With half as many samples at a time and, in a step, twice as many micro-steps; None below one."""
    if case.samples < 2:
        return None
    again = 2 * case.accumulation if case.kind == STEP and case.accumulation > 1 else case.accumulation
    return replace(case, samples=case.samples // 2, accumulation=again)
