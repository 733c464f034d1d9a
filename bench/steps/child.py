"""One row, in a process of its own. What it has measured is on the disk at every moment."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.peaks import peak_of
from bench.steps.cases import FORWARD, LATENT, STEP, Case, smaller
from bench.steps.plain import NAMES, attention
from bench.steps.share import RankShare, made_on, model_on
from bench.steps.timing import Row, clear, rate, rounds, trace
from models.layers import swiglu_width
from models.perceiver.latents import LatentTransformer
from models.perceiver.model import init_weights
from train.engine import Ranks, StepResult, TorchEngine
from train.families import family_of
from train.machine import Precision
from train.multimodal.config import PerceiverPretrainConfig
from train.plan.arithmetic import attention as products
from train.plan.arithmetic import flops_of, linear, self_block
from train.plan.batches import batch_of
from train.plan.measure import filled


def run(case: Case, path: Path, seconds: float) -> int:
    """Measure a case, with fewer samples where they do not fit; the exit status."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row, end, left = Row(case, path, device), time.monotonic() + seconds, case
    try:
        ceilings(row)
        while True:
            row.describe(left)
            try:
                {STEP: step, FORWARD: forward, LATENT: latent}[left.kind](left, row, end)
                break
            except torch.OutOfMemoryError as error:
                said = str(error).split("\n")[0][:160]
            # Outside of the handler: its traceback holds the tensors.
            row.note(f"{left.samples} samples: out of memory ({said})")
            clear(device)
            row.add(variants={})
            again = smaller(left)
            if again is None:
                row.add(status="out of memory")
                return 1
            left = again
        row.add(status="ok")
    except Exception as error:
        traceback.print_exc()
        row.add(status="failed", error=f"{type(error).__name__}: {str(error)[:500]}")
        return 1
    return 0


def ceilings(row: Row) -> None:
    """What this device multiplies at best, measured now, and what its data sheet says."""
    kind = row.device.type
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    found = machine.ceilings(kind, (dtype,))
    clear(row.device)
    peak = peak_of(torch.cuda.get_device_name()) if kind == "cuda" else None
    row.add(
        device=machine.device_name(kind), matmul=next(iter(found.matmul.values())), copy=found.copy,
        sheet=peak.bf16 if peak else None, precision="bf16" if kind == "cuda" else "fp32",
    )  # fmt: skip


# --- the three kinds of rows --------------------------------------------------------------------------


def flops(case: Case, forward_only: bool = False) -> float:
    """Model FLOPs of all micro-steps of a case, by the plan's closed forms. Contrast is with this process's own texts."""
    config, total = case.config, 0.0
    for kind, count in case.counts.items():
        one = flops_of(config, kind, others=case.samples)
        total += count * (sum(one.forward.values()) if forward_only else one.total)
    return total * case.accumulation


def engine_of(case: Case, device: torch.device) -> TorchEngine:
    """The engine of a row: one process's, or one rank's share of ZeRO-2."""
    torch.manual_seed(0)
    config, bf16 = case.config, device.type == "cuda"
    precision = Precision("bf16" if bf16 else "fp32", "measured")
    if case.ranks > 1:
        model = model_on(config, device, torch.bfloat16 if bf16 else torch.float32)
        return RankShare(model, config, device, precision, case.ranks)
    return TorchEngine(model_on(config, device, torch.float32), config, device, precision, Ranks(0, 0, 1))


def batch_on(case: Case, device: torch.device) -> Any:
    """A micro-batch of random values, full lengths."""
    return filled(batch_of(case.config, case.counts)).to(device)


def optimizer_step(engine: TorchEngine, batch: Any, accumulation: int) -> StepResult:
    """A whole step, as the loop makes it."""
    batches = [batch] * accumulation
    normalizers, _ = engine.agree(batches, False)
    for i, micro in enumerate(engine.micro_batches(batches)):
        with engine.micro_step(last=i + 1 == accumulation):
            engine.backward(engine.losses(micro, engine.config.objectives, normalizers))
    return engine.step(1e-5)


def step(case: Case, row: Row, end: float) -> None:
    """A training step: Aurora's with the project's window attention and with the usual one in turn, PerceiverIO's alone."""
    begun = time.monotonic()
    engine, batch = engine_of(case, row.device), batch_on(case, row.device)
    names = NAMES[:1] if isinstance(engine.config, PerceiverPretrainConfig) else NAMES

    def made(name: str, accumulation: int) -> Callable[[], None]:
        def call() -> None:
            try:
                with attention(name):
                    result = optimizer_step(engine, batch, accumulation)
            except torch.OutOfMemoryError:
                engine.discard()
                raise
            row.variant(name, loss=result.loss, grad_norm=result.grad_norm)
            if result.skipped:  # its work is the same
                row.note(f"{name}: loss {result.loss}, gradient norm {result.grad_norm}: a step was skipped")

        return call

    weights = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    parameters = sum(p.numel() for p in engine.model.parameters())
    row.add(build_seconds=time.monotonic() - begun, weight_bytes=weights, parameters=parameters)
    calls = {name: made(name, case.accumulation) for name in names}
    rounds(calls, row, end)
    for name in names:
        samples = case.samples * case.accumulation
        rate(row, name, flops(case), samples, tokens_of(case, batch) * case.accumulation)
    trace(row, {name: made(name, 1) for name in names}, end)


def tokens_of(case: Case, batch: Any) -> float:
    """What PerceiverIO's encoders make of a micro-batch, and its texts: tokens that go in. 0 for Aurora."""
    config = case.config
    if not isinstance(config, PerceiverPretrainConfig):
        return 0.0
    model, total = config.model, float(len(batch.text.values))
    for grid, pieces in (
        (model.image_grid, len(batch.images)), (model.audio_grid, len(batch.audio_sample)),
        (model.video_grid, len(batch.video_sample)),
    ):  # fmt: skip
        each = 1
        for side in grid:
            each *= side
        total += each * pieces
    return total


def lowered(device: torch.device) -> Any:
    """bf16 autocast on a GPU, as the engines have it."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def forward(case: Case, row: Row, end: float) -> None:
    """The pre-training losses without gradients, of weights that are bf16 on a GPU."""
    begun = time.monotonic()
    config, device = case.config, row.device
    torch.manual_seed(0)
    model = model_on(config, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    batch, family = batch_on(case, device), family_of(config)
    normalizers = family.normalizers([max(float(n), 1.0) for n in family.counts(batch, config)], 1)

    def call() -> None:
        with torch.no_grad(), lowered(device):
            losses = family.forward(model, batch, config.objectives, normalizers, None)
            total = torch.stack([*losses.values()]).sum().item()
        row.variant("ours", loss=total)

    row.add(build_seconds=time.monotonic() - begun, parameters=sum(p.numel() for p in model.parameters()))
    rounds({"ours": call}, row, end)
    rate(row, "ours", flops(case, forward_only=True), case.samples, tokens_of(case, batch))
    trace(row, {"ours": call}, end)


def latent(case: Case, row: Row, end: float) -> None:
    """PerceiverIO's latent transformer alone over the tokens of full pictures: forward, and forward and backward with
    activation checkpointing, gradients freed as they come."""
    begun = time.monotonic()
    config, device = case.config, row.device
    assert isinstance(config, PerceiverPretrainConfig)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)

    def make() -> LatentTransformer:
        made = LatentTransformer(config.model)
        init_weights(made)
        return made.train()

    model = made_on(make, device, dtype)
    model.gradient_checkpointing = case.checkpointing
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(drop)
    n = config.model.image_grid[0] * config.model.image_grid[1]
    inputs = torch.randn(case.samples * n, config.model.encoder_width, device=device, dtype=dtype)
    inputs.requires_grad_()
    offsets = torch.arange(case.samples + 1, device=device, dtype=torch.int32) * n

    def ahead() -> None:
        with torch.no_grad(), lowered(device):
            model(inputs, offsets)

    def both() -> None:
        with lowered(device):
            out = model(inputs, offsets)
        out.float().square().mean().backward()
        inputs.grad = None

    row.add(build_seconds=time.monotonic() - begun, parameters=sum(p.numel() for p in model.parameters()))
    calls = {"forward": ahead, "forward and backward": both}
    rounds(calls, row, end)
    once = case.samples * latent_flops(config, n)
    for name, times in (("forward", 1), ("forward and backward", 3)):
        rate(row, name, times * once, case.samples, case.samples * n)
    trace(row, calls, end)


def drop(p: Tensor) -> None:
    """Free a gradient."""
    p.grad = None


def latent_flops(config: PerceiverPretrainConfig, n: int) -> float:
    """Forward FLOPs of one sample with n input tokens, as `train.plan.arithmetic` counts its part "latents"."""
    model, total = config.model, 0.0
    m, wide = model.latents, model.latent_width
    for read in range(model.input_reads):
        total += linear(n, 2 * wide * model.encoder_width) + products(m, n, wide)
        total += linear(m, wide * wide, 3 * wide * swiglu_width(wide), wide * wide if read else 0)
    return total + model.latent_layers * self_block(m, wide)
