"""The two set-ups that the presets were specified for, and which of the figures said of them agree with arithmetic.

Nothing here is a result: every verdict is computed from the presets, the device table and the closed forms of FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from train.config import PretrainConfig
from train.devices import DEVICES, Device
from train.multimodal.config import PerceiverPretrainConfig
from train.plan.arithmetic import mean_flops
from train.plan.batches import kinds
from train.plan.budget import stored_bytes
from train.presets import preset

WEEK = 7 * 86400.0
DAY = 86400.0
BELIEVED = 0.50  # MFU that trainers of such models have shown on A100s (training anchors: 39 to 62%)


@dataclass(frozen=True)
class Recipe:
    """What was said."""

    preset: str
    gpus: int
    device: str
    weeks: float
    samples: dict[str, float]
    parameters: float
    gpu_hours: float | None = None
    petaflops_days: float | None = None
    bytes: float | None = None


RECIPES = {
    recipe.preset: recipe
    for recipe in (
        Recipe(
            "aurora-xl", 64, "a100-80gb", 4, {"pair": 1.5e9, "uncaptioned": 0.5e9}, 3.7e9, gpu_hours=10_000
        ),
        Recipe(
            "perceiver-xl", 256, "a100-80gb", 9, {"image-text": 2.5e9, "video-text": 0.8e9, "audio-text": 0.3e9}, 18e9,
            petaflops_days=3.5, bytes=15e12,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One figure: what was said, what the sums give, and whether they agree."""

    figure: str
    stated: str
    sums: str
    agrees: bool
    factor: float  # sums over what was stated


def findings(recipe: Recipe, parameters: int) -> list[Finding]:
    """Every stated figure of a recipe. parameters: counted."""
    config, device = preset(recipe.preset), DEVICES[recipe.device]
    peak, samples = device.peak.bf16, sum(recipe.samples.values())
    seconds = recipe.weeks * WEEK
    hours = recipe.gpus * seconds / 3600
    machine = recipe.gpus * seconds * peak
    flops = _needed(config, recipe)
    found = [_parameters(recipe, parameters), _samples(config, recipe, samples)]
    found.append(
        _duration(
            f"{recipe.gpus} GPUs for {recipe.weeks:g} weeks",
            "the preset",
            flops,
            machine,
            samples,
            peak,
            recipe,
        )
    )
    if isinstance(config, PerceiverPretrainConfig):
        twice = replace(config, objectives=replace(config.objectives, masked_twice=True, masked_share=1.0))
        found.append(
            _duration(
                "the same", "each sample read as it is and with hidden parts (--objectives.masked-twice "
                "--objectives.masked-share 1)", _needed(twice, recipe), machine, samples, peak, recipe,
            )
        )  # fmt: skip
    if recipe.gpu_hours is not None:
        found.append(_hours(recipe, hours, flops, peak))
    if recipe.petaflops_days is not None:
        found.append(_work(recipe, flops, samples))
    if recipe.bytes is not None:
        found.append(_bytes(config, recipe, samples))
    return found


def _needed(config: PretrainConfig, recipe: Recipe) -> float:
    """Model FLOPs of one pass over the recipe's samples."""
    samples = sum(recipe.samples.values())
    return mean_flops(config, {kind: n / samples for kind, n in recipe.samples.items()}).total * samples


def _parameters(recipe: Recipe, parameters: int) -> Finding:
    factor = parameters / recipe.parameters
    return Finding(
        "parameters", f"{recipe.parameters / 1e9:g}B", f"counted on the meta device: {parameters:,}", abs(factor - 1) < 0.01,
        factor,
    )  # fmt: skip


def _samples(config: PretrainConfig, recipe: Recipe, samples: float) -> Finding:
    said = " + ".join(f"{n / 1e9:g}B {kind}" for kind, n in recipe.samples.items())
    run = config.steps * config.batch_size
    want = {kind: n / samples for kind, n in recipe.samples.items()}
    mixed = kinds(config)
    same = all(abs(mixed.get(kind, 0.0) - share) < 0.005 for kind, share in want.items())
    factor = run / samples
    return Finding(
        "samples", said, f"the preset's {config.steps:,} steps x {config.batch_size:,} = {run / 1e9:.3f}B, mixed "
        + " : ".join(f"{share:.3f}" for share in mixed.values()), same and abs(factor - 1) < 0.01, factor,
    )  # fmt: skip


def _duration(
    figure: str, what: str, flops: float, machine: float, samples: float, peak: float, recipe: Recipe
) -> Finding:
    mfu = flops / machine
    sums = (
        f"{what}: {samples / 1e9:g}B x {flops / samples / 1e12:.2f} TFLOP = {flops:.3g} FLOP over {recipe.gpus} x "
        f"{recipe.weeks:g} x 604,800 s x {peak / 1e12:.0f} TFLOP/s = {machine:.3g}: {100 * mfu:.0f}% of the peak, and "
        f"{100 * mfu * 4 / 3:.0f}% with activation checkpointing, which runs every forward pass twice"
    )
    return Finding(figure, "one pass over the samples", sums, mfu <= BELIEVED, mfu / BELIEVED)


def _hours(recipe: Recipe, hours: float, flops: float, peak: float) -> Finding:
    assert recipe.gpu_hours is not None
    at_once = flops / (recipe.gpu_hours * 3600 * peak)
    sums = (
        f"{recipe.gpus} x {recipe.weeks:g} x 168 h = {hours:,.0f}; {recipe.gpu_hours:,.0f} would take "
        f"{100 * at_once:.0f}% of the peak"
    )
    factor = hours / recipe.gpu_hours
    return Finding("GPU-hours", f"over {recipe.gpu_hours:,.0f}", sums, 0.9 <= factor <= 1.5, factor)


def _work(recipe: Recipe, flops: float, samples: float) -> Finding:
    assert recipe.petaflops_days is not None
    stated = recipe.petaflops_days * 1e15 * DAY
    factor = flops / stated
    sums = (
        f"{recipe.petaflops_days:g} x 1e15 x 86,400 s = {stated:.3g} FLOP, enough for "
        f"{samples / factor / 1e6:,.1f} million samples; {samples / 1e9:g}B need {flops:.3g} = "
        f"{flops / 1e15 / DAY:,.0f} PetaFLOP/s-days"
    )
    return Finding("compute", f"{recipe.petaflops_days:g} PetaFLOPs-days", sums, 0.5 <= factor <= 2, factor)


def _bytes(config: PretrainConfig, recipe: Recipe, samples: float) -> Finding:
    assert recipe.bytes is not None
    need = {kind: n * stored_bytes(config, kind) for kind, n in recipe.samples.items()}
    total = sum(need.values())
    parts = " + ".join(f"{n / 1e12:,.0f} TB {kind}" for kind, n in need.items())
    sums = (
        f"{recipe.bytes / 1e12:g} TB / {samples / 1e9:g}B = {recipe.bytes / samples / 1e3:.1f} kB per sample, "
        f"the size of a thumbnail; at usual compression {parts} = {total / 1e12:,.0f} TB"
    )
    factor = total / recipe.bytes
    return Finding("data", f"{recipe.bytes / 1e12:g} TB", sums, 0.5 <= factor <= 2, factor)


def lines(recipe: Recipe, found: list[Finding]) -> Iterator[str]:
    """For the table."""
    yield (
        f"stated      {recipe.preset}: {recipe.gpus} x {recipe.device} for {recipe.weeks:g} weeks; which figures agree with "
        "arithmetic"
    )
    for one in found:
        verdict = "agrees" if one.agrees else f"does not agree (x {one.factor:,.3g})"
        yield f"            {one.figure}, {one.stated}: {verdict}. {one.sums}"


def as_json(found: list[Finding]) -> list[dict[str, Any]]:
    """For machines."""
    return [asdict(one) for one in found]


def device_of(recipe: Recipe) -> Device:
    """What it is planned for."""
    return DEVICES[recipe.device]
