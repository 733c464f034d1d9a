"""itc_negatives "global": accumulation with the gradients of one large batch, random numbers included."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from micro import MODEL, arguments, command, losses
from safetensors.torch import load_file
from test_train_engine import ALONE, CPU, STILL, batch, gradients, parts
from test_train_engines import numbers

from dataload.images import normalize
from models import Aurora, AuroraConfig
from models.aurora.model import alignment
from models.objectives import ObjectiveConfig
from train.config import PretrainConfig, problems
from train.contrast import contrast_all
from train.engine import TorchEngine
from train.greeting import _contrast, negatives
from train.machine import Precision
from train.pretrain import main

ITC = ObjectiveConfig(mim=0.0, caption=0.0, mlm=0.0)
NOISY = dataclasses.replace(MODEL, decoder_dropout=0.3, drop_path=0.4, unimodal_layers=2)


def engine(
    model: AuroraConfig, objectives: ObjectiveConfig, precision: str = "fp32", **values: object
) -> TorchEngine:
    torch.manual_seed(0)
    values = {"itc_negatives": "global", **values}
    config = dataclasses.replace(PretrainConfig(model=model, objectives=objectives), **values)
    return TorchEngine(Aurora(model), config, CPU, Precision(precision, ""), ALONE)


def distance(some: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference, over the largest gradient."""
    assert some.keys() == other.keys() and len(some) > 10
    largest = max(g.abs().max().item() for g in other.values())
    return max((some[name] - other[name]).abs().max().item() for name in some) / largest


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_four_micro_steps_are_one_large_batch(kind: str) -> None:
    objectives = ObjectiveConfig(itc_kind=kind)
    whole = batch(12, 4)
    large, loss = gradients(engine(STILL, objectives), [whole])
    small, sums = gradients(engine(STILL, objectives), parts(whole, 4))
    assert sums == pytest.approx(loss, rel=1e-5)
    assert distance(small, large) < 1e-5
    # The test can fail: without the first pass the negatives are too few.
    few, _ = gradients(engine(STILL, objectives, itc_negatives="microstep"), parts(whole, 4))
    assert distance(few, large) > 2e-4  # at first, sigmoids of few pairs and of many differ little


@pytest.mark.parametrize(
    ("changes", "precision"),
    [({}, "fp32"), ({}, "bf16"), ({"itc_word_dropout": 0.4, "itc_captions": 0.5, "itc_mix": 0.4}, "fp32")],
    ids=str,
)
def test_random_numbers_are_those_of_the_first_pass(changes: dict[str, float], precision: str) -> None:
    """Dropout, stochastic depth, word dropout and mixed pairs on: what one graph over all micro-batches gives."""
    objectives = dataclasses.replace(ITC, **changes)
    micro_batches = parts(batch(12, 3), 3)
    if objectives.itc_captions:  # two captions of each image
        micro_batches = [dataclasses.replace(b, pair_images=b.pair_images[:2]) for b in micro_batches]
    one = engine(NOISY, objectives, precision)
    torch.manual_seed(5)
    cached, sums = gradients(one, micro_batches)

    direct = engine(NOISY, objectives, precision)
    torch.manual_seed(5)
    found = []
    for micro in contrast_all(direct, micro_batches):  # for the seeds alone
        with micro.draws(CPU), direct.autocast():
            b = micro.batch
            pairs, hidden = normalize(b.pair_images), normalize(b.mim_images)
            found.append(direct.model.embed(pairs, b.tokens, hidden, b.mim_mask, objectives))
    with direct.autocast():
        loss = alignment(direct.model, *map(torch.cat, zip(*found, strict=True)), objectives)
    loss.backward()
    exact = {name: p.grad for name, p in direct.model.named_parameters() if p.grad is not None}
    assert sums["itc"] == pytest.approx(loss.item(), rel=1e-6)
    # bf16: one graph sums the gradients of a weight over micro-batches in bf16, before they become fp32.
    assert distance(cached, exact) < (1e-5 if precision == "fp32" else 1e-2)
    torch.manual_seed(6)
    assert distance(gradients(engine(NOISY, objectives), micro_batches)[0], exact) > 0.01  # other numbers


def test_with_the_other_objectives_and_activation_checkpointing() -> None:
    """All four together, dropout on: recomputation changes nothing, and each gives what it gives alone."""
    objectives = ObjectiveConfig(itc_word_dropout=0.2, parallel_caption=0.5)
    found = []
    for checkpointing in (False, True):
        one = engine(NOISY, objectives, activation_checkpointing=checkpointing)
        torch.manual_seed(3)
        found.append(gradients(one, parts(batch(12, 4), 4)))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6) and set(found[0][1]) == {
        "mim", "itc", "caption", "mlm",
    }  # fmt: skip
    assert distance(found[1][0], found[0][0]) < 1e-5


def test_running_statistics_count_each_batch_once() -> None:
    model = dataclasses.replace(STILL, stem="conv", image_pooling="mean", text_pooling="words")
    objectives = ObjectiveConfig(mim=0.0, caption=0.0, mlm=0.0, itc_word_dropout=0.3)
    states = {}
    for negatives_ in ("microstep", "global"):
        one = engine(model, objectives, itc_negatives=negatives_)
        gradients(one, parts(batch(12, 4), 4))
        states[negatives_] = dict(one.model.named_buffers())
    for name, buffer in states["global"].items():
        assert torch.equal(buffer, states["microstep"][name]), name
    assert states["global"]["image_pool.norm.num_batches_tracked"] == 4


def test_the_generators_go_on_behind_the_step() -> None:
    """The next step draws other numbers, and clipping and the update see the whole gradient."""
    one = engine(NOISY, ITC)
    torch.manual_seed(1)
    first, _ = gradients(one, parts(batch(12, 4), 2))
    one.discard()
    second, _ = gradients(one, parts(batch(12, 4), 2))
    assert distance(second, first) > 0.01
    norm = torch.cat([g.double().flatten() for g in second.values()]).norm().item()
    assert one.step(1e-3).grad_norm == pytest.approx(norm, rel=1e-4)


def test_two_processes_and_micro_steps_are_one_large_batch(tmp_path: Path) -> None:
    """2 ranks x 2 micro-steps, against one process with the whole batch: losses of every step, gradients of all."""
    exact = ("--steps", "4", "--save-every", "0", "--model.decoder-dropout", "0")
    exact += ("--objectives.itc-kind", "sigmoid")
    single, double = tmp_path / "single", tmp_path / "double"
    assert main(arguments(single, *exact)) == 0
    done = command(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train.pretrain"),
        *arguments(double, *exact, "--accumulation", "2", "--itc-negatives", "global"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 texts of other images, those of its whole step over all processes" in done.stdout
    for step, found in losses(single).items():
        assert losses(double)[step] == pytest.approx(found, rel=1e-5, abs=1e-6), step
    one, two = (numbers(out / "checkpoints/step-000004")["optimizer"] for out in (single, double))
    moments = [name for name in one if name.startswith("exp_avg.")]
    largest = max(one[name].abs().max().item() for name in moments)
    assert max((one[name] - two[name]).abs().max().item() for name in moments) < 1e-4 * largest
    assert one.keys() == two.keys() and len(moments) > 50


def test_resumes_exactly(tmp_path: Path) -> None:
    """Dropout on, stopped after step 3 of 6."""
    words = ("--steps", "6", "--accumulation", "2", "--itc-negatives", "global", "--log-every", "6")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main(arguments(whole, *words)) == 0
    assert main(arguments(halves, *words)) == 0
    checkpoints = halves / "checkpoints"
    for step in range(4, 7):
        for path in checkpoints.glob(f"step-{step:06d}/*"):
            path.unlink()
        if (checkpoints / f"step-{step:06d}").exists():
            (checkpoints / f"step-{step:06d}").rmdir()
    assert main(arguments(halves, *words, "--resume", str(checkpoints / "step-000003"))) == 0
    one, two = (load_file(out / "checkpoints/step-000006/model.safetensors") for out in (whole, halves))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_what_the_run_says() -> None:
    data = type("Data", (), {"pairs": 3})()
    config = PretrainConfig(batch_size=32, accumulation=4)
    both = dataclasses.replace(config, itc_negatives="global")
    assert negatives(config, 3, 2) == 5 and negatives(both, 3, 2) == 23
    (few,), (many,) = _contrast(config, data, 2), _contrast(both, data, 2)
    assert "5 texts of other images, those of its micro-step over all processes" in few and "adds none" in few
    assert "23 texts of other images, those of its whole step over all processes, all 4 micro-steps" in many
    assert "of its batch" in _contrast(PretrainConfig(), data, 1)[0]
    assert any(
        "itc_negatives is global and compile" in p for p in problems(dataclasses.replace(both, compile=True))
    )
    assert not problems(both)
