"""The engine: accumulation equals the large batch, denominators, clipping, precision, generators."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
import time

import pytest
import torch
from micro import MODEL, ROOT

from dataload.batch import Batch
from dataload.images import normalize
from dataload.tokenizer import BOS, EOS, MASK
from models import Aurora
from models.objectives import ObjectiveConfig
from train import machine
from train.config import ConfigError, OptimConfig, PretrainConfig
from train.contrast import MicroBatch
from train.engine import Ranks, TorchEngine, gather_rng, load_rng, rng_state
from train.machine import Precision, choose_device, choose_precision

STILL = dataclasses.replace(MODEL, decoder_dropout=0.0)
ALONE = Ranks(0, 0, 1)
CPU = torch.device("cpu")


def engine(objectives: ObjectiveConfig, precision: str = "fp32", **values: object) -> TorchEngine:
    torch.manual_seed(0)
    config = dataclasses.replace(PretrainConfig(model=STILL, objectives=objectives), **values)
    return TorchEngine(Aurora(STILL), config, CPU, Precision(precision, ""), ALONE)


def batch(pairs: int, uncaptioned: int, seed: int = 0) -> Batch:
    """Captions of very different lengths, masks of very different sizes: a mean of means would be far off."""
    g = torch.Generator().manual_seed(seed)
    length = MODEL.text_length
    tokens = torch.randint(5, 300, (pairs, length), generator=g)
    tokens[:, 0] = BOS
    for row in range(pairs):
        end = 2 + row * (length - 3) // max(pairs - 1, 1)
        tokens[row, end] = EOS
        tokens[row, end + 1 :] = 0
    targets = torch.full_like(tokens, -100)
    targets[:, 1] = tokens[:, 1]
    targets[pairs // 2 :, 2:4] = tokens[pairs // 2 :, 2:4]
    targets[targets < 5] = -100
    hidden = torch.where(targets >= 0, MASK, tokens)
    mask = torch.ones(uncaptioned, 1, 1, dtype=torch.bool)
    mask[: uncaptioned // 4] = False
    return Batch(
        pair_images=torch.randint(0, 256, (pairs, 32, 32, 3), dtype=torch.uint8, generator=g),
        tokens=tokens,
        mlm_tokens=hidden,
        mlm_targets=targets,
        mim_images=torch.randint(0, 256, (uncaptioned, 32, 32, 3), dtype=torch.uint8, generator=g),
        mim_mask=mask,
        keys=(),
    )


def parts(whole: Batch, count: int) -> list[Batch]:
    chunks = [
        getattr(whole, name).chunk(count)
        for name in ("pair_images", "tokens", "mlm_tokens", "mlm_targets", "mim_images", "mim_mask")
    ]
    return [Batch(*(chunk[i] for chunk in chunks), keys=()) for i in range(count)]


def gradients(one: TorchEngine, batches: list[Batch]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    normalizers, stopping = one.agree(batches, False)
    assert not stopping
    for i, micro in enumerate(one.micro_batches(batches)):
        with one.micro_step(last=i == len(batches) - 1):
            one.backward(one.losses(micro, one.config.objectives, normalizers))
    found = {name: p.grad.clone() for name, p in one.model.named_parameters() if p.grad is not None}
    return found, {name: loss.item() for name, loss in one._sums.items()}


@pytest.mark.parametrize("objective", ["mim", "caption", "mlm"])
def test_accumulation_equals_the_large_batch(objective: str) -> None:
    off = {"mim": 0.0, "itc": 0.0, "caption": 0.0, "mlm": 0.0}
    objectives = ObjectiveConfig(**{**off, objective: 1.0})
    whole = batch(12, 4)
    one, four = engine(objectives), engine(objectives)
    large, loss = gradients(one, [whole])
    small, sums = gradients(four, parts(whole, 4))
    assert large.keys() == small.keys() and len(large) > 10
    scale = max(g.abs().max().item() for g in large.values())
    assert max((large[name] - small[name]).abs().max().item() for name in large) < 2e-5 * scale
    assert sums == pytest.approx(loss, rel=1e-5)


def test_the_accumulation_test_can_fail() -> None:
    """With each micro-batch divided by its own counts, as is often done, the same comparison shows it."""
    objectives = ObjectiveConfig(mim=0.0, itc=0.0, caption=0.0, mlm=1.0)
    whole = batch(12, 4)
    large, _ = gradients(engine(objectives), [whole])
    wrong = engine(objectives)
    for micro in parts(whole, 4):
        normalizers, _ = wrong.agree([micro], False)
        losses = wrong.losses(MicroBatch(micro), objectives, normalizers)
        wrong.backward({name: loss / 4 for name, loss in losses.items()})
    small = {name: p.grad for name, p in wrong.model.named_parameters() if p.grad is not None}
    scale = max(g.abs().max().item() for g in large.values())
    assert max((large[name] - small[name]).abs().max().item() for name in large) > 1e-2 * scale


def test_contrastive_loss_of_a_step_is_the_mean_of_its_micro_steps() -> None:
    objectives = ObjectiveConfig(mim=0.0, itc=1.0, caption=0.0, mlm=0.0)
    pieces = parts(batch(12, 4), 4)
    _, sums = gradients(engine(objectives), pieces)
    each = [gradients(engine(objectives), [piece])[1]["itc"] for piece in pieces]
    assert sums["itc"] == pytest.approx(sum(each) / 4, rel=1e-5)


def test_denominators_are_counts_of_the_whole_step() -> None:
    pieces = parts(batch(12, 4), 4)
    normalizers, _ = engine(ObjectiveConfig()).agree(pieces, False)
    whole = batch(12, 4)
    assert normalizers.caption_tokens == (whole.tokens[:, 1:] != 0).sum()
    assert normalizers.mlm_tokens == (whole.mlm_targets >= 0).sum()
    assert normalizers.mim_patches == 3
    assert normalizers.itc_share == 0.25


def test_any_wish_to_stop_is_passed_on() -> None:
    assert engine(ObjectiveConfig()).agree([batch(4, 2)], True)[1]


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_clipping_is_of_the_global_norm(clip: float) -> None:
    one = engine(ObjectiveConfig(), optim=OptimConfig(clip=clip))
    found, _ = gradients(one, [batch(4, 2)])
    norm = torch.cat([g.double().flatten() for g in found.values()]).norm().item()
    result = one.step(lr=1e-3)
    assert result.grad_norm == pytest.approx(norm, rel=1e-4) and norm > 0.5
    applied = {
        name: one.optimizer.state[p]["exp_avg"] / 0.1
        for name, p in one.model.named_parameters()
        if p in one.optimizer.state
    }
    factor = 0.5 / norm if clip else 1.0
    for name, g in found.items():
        assert torch.allclose(applied[name], g * factor, rtol=1e-3, atol=1e-8), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_changes_nothing(bad: float, where: str) -> None:
    one = engine(ObjectiveConfig(), ema_decay=0.9)
    gradients(one, [batch(4, 2)])
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    if where == "loss":
        one._sums["itc"] += bad
    else:
        one.model.encoder.stem.bias.grad[0] = bad
    result = one.step(lr=1e-3)
    assert result.skipped
    assert all(torch.equal(before[name], tensor) for name, tensor in one.model.state_dict().items())
    assert one.ema and one.ema.updates == 0
    assert not any(tensor.any() for state in one.optimizer.state.values() for tensor in state.values())
    assert all(p.grad is None for p in one.model.parameters())
    gradients(one, [batch(4, 2)])
    assert not one.step(lr=1e-3).skipped


def test_step_reports_the_weighted_sum() -> None:
    objectives = ObjectiveConfig(mim=0.5, itc=2.0, caption=3.0, mlm=0.0)
    one = engine(objectives)
    _, sums = gradients(one, [batch(4, 2)])
    result = one.step(lr=1e-3)
    assert result.losses.keys() == {"mim", "itc", "caption"}
    assert result.loss == pytest.approx(0.5 * sums["mim"] + 2 * sums["itc"] + 3 * sums["caption"], rel=1e-6)


def test_activation_checkpointing_changes_no_gradient() -> None:
    plain, _ = gradients(engine(ObjectiveConfig()), [batch(4, 2)])
    again, _ = gradients(engine(ObjectiveConfig(), activation_checkpointing=True), [batch(4, 2)])
    assert plain.keys() == again.keys()
    scale = max(g.abs().max().item() for g in plain.values())
    assert max((plain[name] - again[name]).abs().max().item() for name in plain) < 1e-5 * scale


def test_bf16_is_near_fp32_and_really_bf16() -> None:
    plain, exact = gradients(engine(ObjectiveConfig()), [batch(4, 2)])
    half, rough = gradients(engine(ObjectiveConfig(), precision="bf16"), [batch(4, 2)])
    assert rough == pytest.approx(exact, rel=0.03) and rough != exact
    assert all(g.dtype == torch.float32 for g in half.values())


def test_generators_go_through_a_checkpoint() -> None:
    torch.manual_seed(7)
    states = gather_rng(rng_state(CPU), ALONE)
    expected = torch.rand(5)
    assert load_rng(states, 0, CPU)
    assert torch.equal(torch.rand(5), expected)
    assert not load_rng(states, 1, CPU)


def test_normalised_pictures_are_what_the_model_gets() -> None:
    """One engine step on uint8 equals calling the model on normalised floats."""
    one, small = engine(ObjectiveConfig()), batch(4, 2)
    with torch.no_grad():
        direct = one.model(
            normalize(small.pair_images), small.tokens, small.mlm_tokens, small.mlm_targets,
            normalize(small.mim_images), small.mim_mask, ObjectiveConfig(),
        )  # fmt: skip
    _, sums = gradients(one, [small])
    assert sums == pytest.approx({name: value.item() for name, value in direct.items()}, rel=1e-5)


def test_ranks_come_from_torchruns_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks(0, 0, 1)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Ranks.from_environment() == Ranks(5, 1, 8) and not Ranks.from_environment().first


@pytest.mark.parametrize("speed, chosen", [(1 / 280, "fp32"), (1.1, "fp32"), (4.0, "bf16")])
def test_auto_takes_the_faster_arithmetic_and_says_why(
    speed: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "bf16_speed_on_cpu", lambda: speed)
    precision = choose_precision("auto", CPU)
    assert precision.name == chosen and "times as long as fp32" in precision.why
    assert choose_precision("bf16", CPU).name == "bf16"


def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    """In a child process: most pages of freed 64 MB blocks are not faulted in again."""
    program = """
import resource, sys
from train.machine import keep_freed_memory
import torch
print(keep_freed_memory())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, *later = [faults() for _ in range(20)]
print(sum(later) < 10 * first)
"""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc's malloc")
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    told = {**plain, "MALLOC_ARENA_MAX": "2"}
    for environment, expected in ((plain, ["True", "True"]), (told, ["False", "False"])):
        output = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert output.stdout.split() == expected


def test_the_measurement_of_bf16_is_short() -> None:
    """The best of three: others may be busy on this machine."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        assert machine.bf16_speed_on_cpu() > 0
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.0


def test_devices_that_are_not_there_are_refused() -> None:
    for name, said in (("cuda:99", "usable GPU"), ("tpu", "no torch device"), ("meta", "not supported")):
        with pytest.raises(ConfigError, match=said):
            choose_device(name)


@pytest.mark.parametrize(
    ("threads", "load", "said"),
    [(2, 2.3, None), (2, 3.4, "OMP_NUM_THREADS=1 "), (1, 5.0, None), (2, 5.0, "OMP_NUM_THREADS=1 ")],
)
def test_a_crowded_machine_is_said_where_fewer_threads_help(
    threads: int, load: float, said: str | None
) -> None:
    found = machine.crowded(threads, 2, load)
    assert found is None if said is None else said in str(found)


@pytest.mark.parametrize("ending", ["done", "stopped", "not finite"])
def test_running_statistics_are_those_of_steps_that_were_made(ending: str) -> None:
    """A step that is stopped or skipped leaves batch norm's mean, variance and count as they were."""
    torch.manual_seed(0)
    config = PretrainConfig(model=dataclasses.replace(STILL, image_pooling="mean"), itc_negatives="microstep")
    one = TorchEngine(Aurora(config.model), config, CPU, Precision("fp32", ""), ALONE)
    before = {name: buffer.clone() for name, buffer in one.model.named_buffers() if "image_pool.norm" in name}
    assert len(before) == 3
    batches = parts(batch(6, 4), 2)
    normalizers, _ = one.agree(batches, False)
    for micro in one.micro_batches(batches):
        losses = one.losses(micro, config.objectives, normalizers)
        one.backward(
            {name: loss * (torch.nan if ending == "not finite" else 1) for name, loss in losses.items()}
        )
    changed = dict(one.model.named_buffers())
    assert int(changed["image_pool.norm.num_batches_tracked"]) == 2
    if ending == "stopped":
        one.discard()
    else:
        assert one.step(1e-3).skipped is (ending == "not finite")
    same = [torch.equal(changed[name], value) for name, value in before.items()]
    assert same == [ending != "done"] * 3
