"""Engines on several ranks against one process: losses, gradient norms, averages, skipped steps, and checkpoints that any of
them reads."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import MODEL, corpus
from ranks import Launch
from test_models_perceiver import batch as six_samples
from test_train_engine import batch, parts

from models import PERCEIVER_SIZES, Aurora, PerceiverIO
from models.objectives import ObjectiveConfig
from train import checkpoint
from train.config import OptimConfig, PretrainConfig
from train.engine import Ranks, TorchEngine, join, leave
from train.engines.choice import build_engine
from train.machine import Precision
from train.multimodal.config import PerceiverPretrainConfig
from train.optim import lr_at
from train.saving import Saver

STILL = dataclasses.replace(MODEL, decoder_dropout=0.0)
BASE = PretrainConfig(
    model=STILL,
    batch_size=16,
    accumulation=2,
    steps=100,
    ema_decay=0.9,
    # Every gradient is longer than 1. With AdamW's usual eps of 1e-8 a weight without influence moves by whole steps in the
    # direction of a rounding error; with this one an error d of a gradient moves a weight by lr * d / eps at most, so that
    # weights and their averages can be compared.
    optim=OptimConfig(lr=1e-3, warmup=4, clip=1.0, eps=1e-3),
    objectives=ObjectiveConfig(itc_kind="softmax"),
)
STEPS = 3  # then one with a NaN, one without masked pictures, and one more
END = STEPS + 3
Case = tuple[str, int, str]  # engine, zero_stage, precision

SEVERAL: list[Case] = [
    ("ddp", 2, "fp32"), ("fsdp2", 2, "fp32"), ("deepspeed", 1, "fp32"), ("deepspeed", 2, "fp32"), ("deepspeed", 3, "fp32"),
    ("fsdp2", 2, "bf16"), ("deepspeed", 1, "bf16"), ("deepspeed", 2, "bf16"),
]  # fmt: skip
FOUR: list[Case] = [("ddp", 2, "fp32"), ("fsdp2", 2, "fp32"), ("deepspeed", 2, "fp32")]


def built(case: Case, ranks: Ranks, seed: int = 0, frozen: str = "", **values: Any) -> TorchEngine:
    """frozen: parameters whose names begin so do not learn."""
    engine, stage, precision = case
    config = dataclasses.replace(BASE, engine=engine, zero_stage=stage, **values)
    torch.manual_seed(seed)
    model = Aurora(STILL)
    for name, p in model.named_parameters():
        p.requires_grad_(not (frozen and name.startswith(frozen)))
    return build_engine(model, config, torch.device("cpu"), Precision(precision, ""), ranks)


def steps(
    one: TorchEngine, first: int, last: int, bad: int | None = None, without: int | None = None
) -> list[tuple[dict[str, float], float]]:
    """Losses and norms of steps first to last - 1, of batches that depend on the step alone; in step `bad`, the last rank's
    first micro-batch has a loss that is not a number, and step `without` trains no masked pictures."""
    found = []
    for step in range(first, last):
        on = dataclasses.replace(one.config.objectives, **({"mim": 0.0} if step == without else {}))
        micros = parts(batch(16, 8, seed=step), one.config.accumulation)
        mine = [parts(micro, one.ranks.size)[one.ranks.rank] for micro in micros]
        normalizers, _ = one.agree(mine, False)
        for i, micro in enumerate(one.micro_batches(mine)):
            with one.micro_step(last=i == len(mine) - 1):
                losses = one.losses(micro, on, normalizers)
                if step == bad and i == 0 and one.ranks.rank == one.ranks.size - 1:
                    losses["mim"] = losses["mim"] * math.nan
                one.backward(losses)
        result = one.step(lr_at(step, one.config.steps, one.config.optim))
        assert result.skipped == (step == bad)
        found.append((result.losses, result.grad_norm))
    return found


def saver(directory: Path, one: TorchEngine) -> Saver:
    return Saver(directory, one.config, corpus().tokenizer, one.ranks, one.device, print)


def snapshot(one: TorchEngine, step: int) -> checkpoint.Snapshot:
    return checkpoint.Snapshot(step, one.state(), {}, {}, one.precision.name, one.ranks.size, 0.0, 0)


def run_cases(cases: list[Case], out: Path) -> list[Any]:
    """In each rank: every case's losses and norms, with a checkpoint after them; then a step with a NaN, one without
    masked pictures, one more, and another checkpoint."""
    ranks = Ranks.from_environment()
    join(ranks, "cpu", alone=True)
    found = []
    for case in cases:
        one = built(case, ranks)
        result = steps(one, 0, STEPS)
        keeper = saver(out / "-".join(map(str, case)), one)
        keeper.begin(lambda one=one: snapshot(one, STEPS), wait=False)  # type: ignore[misc]
        steps(one, STEPS, STEPS + 1, bad=STEPS)  # while it is being written
        keeper.poll()
        keeper.finish()
        later = steps(one, STEPS + 1, END, without=STEPS + 1)
        keeper.begin(lambda one=one: snapshot(one, END), wait=True)  # type: ignore[misc]
        with one.scored_weights() as model:
            scored = model is None or is_the_average(model, out / "-".join(map(str, case)))
        found.append((result, later, scored))
    leave(ranks)
    return found


def is_the_average(model: torch.nn.Module, directory: Path) -> bool:
    """Whether a model to score has the averages of the newest checkpoint, and all of them, bit for bit."""
    ema = numbers(checkpoint.step_directories(directory)[0])["ema"]
    own = dict(model.named_parameters())
    return own.keys() == set(ema) and all(torch.equal(p, ema[name]) for name, p in own.items())


def reference(precision: str, out: Path) -> tuple[Any, Any]:
    """The same in this process, by the engine that tests/test_train_engine.py tests."""
    one = built(("single", 2, precision), Ranks(0, 0, 1))
    result = steps(one, 0, STEPS)
    keeper = saver(out / f"single-2-{precision}", one)
    keeper.begin(lambda: snapshot(one, STEPS), wait=True)
    steps(one, STEPS, STEPS + 1, bad=STEPS)
    later = steps(one, STEPS + 1, END, without=STEPS + 1)
    keeper.begin(lambda: snapshot(one, END), wait=True)
    return result, later


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus()
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def exact(out: Path) -> dict[str, Any]:
    return {precision: reference(precision, out) for precision in ("fp32", "bf16")}


@pytest.fixture(scope="module")
def two(out: Path) -> dict[Case, Any]:
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'auroraio[deepspeed]'")
    return dict(zip(SEVERAL, Launch(2, run_cases, SEVERAL, out / "2").results()[0], strict=True))


def compare(found: Any, wanted: Any, precision: str) -> None:
    """The gates: fp32 1e-5 of every loss. bf16 1.2e-3 of their weighted sum and 2.7% of the norm, three times what lies between
    bf16 and fp32 in one process (8 steps: 4.1e-4 and 0.91%; the order of samples alone: 3.3e-4 and 0.51%): engines that shard
    round once more, their weights. Single losses move by 4.4e-3 there, and are not held."""
    weights = BASE.objectives.weights()
    for (losses, norm), (expected, exact_norm) in zip(found, wanted, strict=True):
        assert losses.keys() == expected.keys() and len(losses) in (3, 4)
        if precision == "fp32":
            assert losses == pytest.approx(expected, rel=1e-5, abs=1e-5)
            assert norm == pytest.approx(exact_norm, rel=1e-4)
        else:
            total, other = (sum(weights[name] * x[name] for name in x) for x in (losses, expected))
            assert total == pytest.approx(other, rel=1.2e-3)
            assert norm == pytest.approx(exact_norm, rel=0.027)


@pytest.mark.parametrize("case", SEVERAL, ids=lambda case: "-".join(map(str, case)))
def test_two_ranks_give_the_losses_of_one_process(case: Case, two: Any, exact: Any) -> None:
    """Accumulation, clipping, negatives from all ranks; after a step with a NaN, which all ranks skip; averaged weights."""
    wanted, found = exact[case[2]], two[case]
    compare(found[0], wanted[0], case[2])
    compare(found[1], wanted[1], case[2])
    assert found[2], "the model that is scored has other weights than the averages in the checkpoint"


def test_parity_would_notice_a_change(exact: Any) -> None:
    """Both gates are far below what one skipped clipping, or half the accumulation, changes."""
    for change in ({"optim": dataclasses.replace(BASE.optim, clip=0.0)}, {"accumulation": 1}):
        other = steps(built(("single", 2, "fp32"), Ranks(0, 0, 1), **change), 0, STEPS)
        for gate in ("fp32", "bf16"):
            with pytest.raises(AssertionError):
                compare(other, exact["fp32"][0], gate)


@functools.cache
def numbers(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of a checkpoint, after it was verified."""
    state = checkpoint.verify(path)
    kinds = [kind for kind in ("model", "optimizer", "ema") if any(kind in name for name in state["sha256"])]
    return {kind: dict(checkpoint.stored(path, kind, state)) for kind in kinds}


@pytest.mark.parametrize(
    "case", [case for case in SEVERAL if case[2] == "fp32"], ids=lambda case: "-".join(map(str, case))
)
def test_every_engine_writes_the_same_checkpoint(case: Case, two: Any, exact: Any, out: Path) -> None:
    """Names, shapes, counts of updates; weights, their averages and moments up to rounding, after a step
    without masked pictures: the decoder of pixels rests in it, and the dense heads do in all."""
    name = "-".join(map(str, case))
    mine, theirs = (numbers(out / f"{run}/step-{END:06d}") for run in (f"2/{name}", "single-2-fp32"))
    for kind, wanted in theirs.items():
        assert set(mine[kind]) == set(wanted), kind
        assert all(mine[kind][key].shape == tensor.shape for key, tensor in wanted.items())
    counts = {t.item() for key, t in theirs["optimizer"].items() if key.startswith("step.")}
    assert counts == {END - 1, END - 2}  # the step with a NaN is none
    # No weight has moved further, decay apart.
    path = sum(lr_at(i, BASE.steps, BASE.optim) for i in range(END))
    bounds = {"model.": 1e-3 * path, "ema.": 1e-3 * path, "optimizer.step.": 0.0}
    for moment in ("exp_avg.", "exp_avg_sq."):
        found = [t for key, t in theirs["optimizer"].items() if key.startswith(moment)]
        bounds[f"optimizer.{moment}"] = 1e-4 * max(tensor.abs().max().item() for tensor in found)
    for kind, wanted in theirs.items():
        for key, tensor in wanted.items():
            (bound,) = (value for start, value in bounds.items() if f"{kind}.{key}".startswith(start))
            assert (mine[kind][key] - tensor).abs().max().item() <= bound, (kind, key)
    untouched = {key for key in theirs["model"] if f"step.{key}" not in theirs["optimizer"]}
    start = built(("single", 2, "fp32"), Ranks(0, 0, 1)).model.state_dict()
    assert {"pyramid", "query_heads"} <= {key.split(".")[0] for key in untouched}
    assert all(torch.equal(mine["model"][key], start[key]) for key in untouched & start.keys())


def test_sharded_files_are_spread_over_the_ranks(two: Any, out: Path) -> None:
    for case in ("ddp-2-fp32", "fsdp2-2-fp32", "deepspeed-2-fp32"):
        sizes = [
            (out / f"2/{case}/step-000003/optimizer-0000{rank}-of-00002.safetensors").stat().st_size
            for rank in (1, 2)
        ]
        assert max(sizes) < 1.3 * min(sizes), (case, sizes)


def go_on(cases: list[Case], start: Path, out: Path) -> list[Any]:
    """In each rank: from the checkpoint `start`, write it again, then train on."""
    ranks = Ranks.from_environment()
    join(ranks, "cpu", alone=True)
    found = []
    for case in cases:
        one = built(case, ranks, seed=1)  # other weights than those of the checkpoint
        one.load(checkpoint.read(start)[0].engine)
        keeper = saver(out / "-".join(map(str, case)), one)
        keeper.begin(lambda one=one: snapshot(one, STEPS), wait=True)  # type: ignore[misc]
        found.append(steps(one, STEPS, STEPS + 1))
    leave(ranks)
    return found


def same(a: Path, b: Path) -> None:
    mine, theirs = numbers(a), numbers(b)
    for kind, wanted in theirs.items():
        assert set(mine[kind]) == set(wanted), kind
        for key, tensor in wanted.items():
            assert torch.equal(mine[kind][key], tensor), (kind, key)


def test_any_engine_on_any_number_of_ranks_goes_on_exactly(two: Any, out: Path) -> None:
    """Written by two ranks of DeepSpeed ZeRO-2, read by one process, by four ranks, and by DeepSpeed ZeRO-3: every number is
    the same, and so are the losses after it."""
    start = out / "2/deepspeed-2-fp32/step-000003"
    one = built(("single", 2, "fp32"), Ranks(0, 0, 1), seed=1)
    one.load(checkpoint.read(start)[0].engine)
    keeper = saver(out / "again/single", one)
    keeper.begin(lambda: snapshot(one, STEPS), wait=True)
    same(out / "again/single/step-000003", start)
    straight = steps(one, STEPS, STEPS + 1)

    others: list[Case] = [("deepspeed", 3, "fp32")]
    for size, cases in ((4, FOUR), (2, others)):
        found = Launch(size, go_on, cases, start, out / f"again/{size}").results()[0]
        for case, result in zip(cases, found, strict=True):
            same(out / f"again/{size}/{'-'.join(map(str, case))}/step-000003", start)
            compare(result, straight, "fp32")


SHARDED: list[Case] = [("fsdp2", 3, "fp32"), ("deepspeed", 3, "fp32")]
FROZEN: list[Case] = [("fsdp2", 2, "fp32"), ("deepspeed", 2, "fp32")]


def specials(out: Path) -> tuple[list[Any], list[Any]]:
    """In each rank: losses with negatives of the whole step; losses with a frozen encoder, and a checkpoint."""
    ranks = Ranks.from_environment()
    join(ranks, "cpu", alone=True)
    negatives = [steps(built(case, ranks, itc_negatives="global", ema_decay=0.0), 0, 2) for case in SHARDED]
    frozen = [with_a_frozen_encoder(case, ranks, out) for case in FROZEN]
    leave(ranks)
    return negatives, frozen


def with_a_frozen_encoder(case: Case, ranks: Ranks, out: Path) -> Any:
    one = built(case, ranks, frozen="encoder.")
    found = steps(one, 0, 2)
    keeper = saver(out / "-".join(map(str, case)), one)
    keeper.begin(lambda: snapshot(one, 2), wait=True)
    return found


@pytest.fixture(scope="module")
def special(out: Path) -> Any:
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'auroraio[deepspeed]'")
    return Launch(2, specials, out / "special").results()[0]


def test_negatives_of_the_whole_step_on_sharded_weights(special: Any) -> None:
    single = built(("single", 2, "fp32"), Ranks(0, 0, 1), itc_negatives="global", ema_decay=0.0)
    wanted = steps(single, 0, 2)
    for found in special[0]:
        compare(found, wanted, "fp32")


def test_frozen_parts_stay_and_are_saved(special: Any, out: Path) -> None:
    wanted = with_a_frozen_encoder(("single", 2, "fp32"), Ranks(0, 0, 1), out / "special")
    theirs = numbers(out / "special/single-2-fp32/step-000002")
    start = built(("single", 2, "fp32"), Ranks(0, 0, 1)).model.state_dict()
    for case, found in zip(FROZEN, special[1], strict=True):
        compare(found, wanted, "fp32")
        mine = numbers(out / f"special/{'-'.join(map(str, case))}/step-000002")
        assert all(set(mine[kind]) == set(tensors) for kind, tensors in theirs.items())
        frozen = [key for key in mine["model"] if key.startswith("encoder.") and key in start]
        assert frozen and all(torch.equal(mine["model"][key], start[key]) for key in frozen)


SMALL = dataclasses.replace(PERCEIVER_SIZES["tiny"], latent_layers=1, encoder_layers=1, decoder_layers=1)


def a_batch_without_sounds(case: Case, ranks: Ranks, out: Path) -> list[Any]:
    """PerceiverIO: a step with all modalities, one with pictures and texts alone, one with all."""
    config = PerceiverPretrainConfig(
        model=SMALL, engine=case[0], zero_stage=case[1], batch_size=6, optim=BASE.optim, ema_decay=0.0
    )
    torch.manual_seed(0)
    one = build_engine(PerceiverIO(SMALL), config, torch.device("cpu"), Precision("fp32", ""), ranks)
    found = []
    for step in range(3):
        six = six_samples(step)
        pieces = {name: six["pieces"][name] for name in (("image", "text") if step == 1 else six["pieces"])}
        torch.manual_seed(step)  # hidden patches are drawn
        with one.micro_step(last=True):
            one.backward(
                one.module(
                    pieces,
                    six["samples"],
                    six["mlm_tokens"],
                    six["mlm_targets"],
                    objectives=config.objectives,
                )
            )
        result = one.step(1e-3)
        found.append((result.losses, result.grad_norm))
    keeper = saver(out / "-".join(map(str, case)), one)
    keeper.begin(lambda: snapshot(one, 3), wait=True)
    return found


def in_one_rank(out: Path) -> Any:
    ranks = Ranks.from_environment()
    join(ranks, "cpu", alone=True)
    sounds = a_batch_without_sounds(("deepspeed", 2, "fp32"), ranks, out)
    offloaded = steps(built(("deepspeed", 2, "fp32"), ranks, offload=True), 0, STEPS)
    leave(ranks)
    return sounds, offloaded


@pytest.fixture(scope="module")
def one_rank(out: Path) -> Any:
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'auroraio[deepspeed]'")
    return Launch(1, in_one_rank, out / "one").results()[0]


def test_deepspeed_leaves_alone_what_a_batch_has_nothing_for(one_rank: Any, out: Path) -> None:
    """Losses, updates that were made, weights: those of torch's optimizer, which passes over what has no gradient."""
    wanted = a_batch_without_sounds(("single", 2, "fp32"), Ranks(0, 0, 1), out / "one")
    theirs = numbers(out / "one/single-2-fp32/step-000003")
    for (losses, norm), (expected, exact_norm) in zip(one_rank[0], wanted, strict=True):
        assert losses == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert norm == pytest.approx(exact_norm, rel=1e-4)
    mine = numbers(out / "one/deepspeed-2-fp32/step-000003")
    for kind in ("model", "optimizer"):
        assert set(mine[kind]) == set(theirs[kind])
    for key, tensor in theirs["model"].items():
        count = f"step.{key}"
        assert mine["optimizer"].get(count) == theirs["optimizer"].get(count), key
        assert (mine["model"][key] - tensor).abs().max().item() <= 1e-3 * 3e-3, (
            key
        )  # of the way of three steps
    rested = [key for key in theirs["optimizer"] if key.startswith("step.") and theirs["optimizer"][key] < 3]
    never = [key for key in theirs["model"] if f"step.{key}" not in theirs["optimizer"]]
    assert rested or never


def test_offloaded_optimizer_gives_the_same_losses(one_rank: Any, exact: Any) -> None:
    compare(one_rank[1], exact["fp32"][0], "fp32")


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    """Moments in 8 bits are not what the shards hold."""
    pytest.importorskip("torchao", reason="needs torchao: pip install 'auroraio[torchao]'")
    eight = OptimConfig(kind="torch-8bit")
    one = built(("single", 2, "fp32"), Ranks(0, 0, 1), optim=eight)
    steps(one, 0, 1)
    keeper = saver(tmp_path, one)
    keeper.begin(lambda: snapshot(one, 1), wait=True)
    with pytest.raises(AssertionError, match="keeps its moments in 8 bits, this run's whole"):
        Launch(1, go_on, [("fsdp2", 2, "fp32")], tmp_path / "step-000001", tmp_path / "x").results()
