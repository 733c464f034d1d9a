"""What a run shows of itself besides its losses: utilisation, every rank's times, a trace on request, Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import to_dict
from train.engines.straggler import Watch, as_columns, stragglers
from train.telemetry.profiling import StepProfiler
from train.telemetry.utilization import device_rate, shares_of, step_flops
from train.telemetry.wandb_log import WandbLog

if TYPE_CHECKING:
    from train.run import Run


class Observer:
    """One per rank; rank 0 writes. `before` and `after` go around each optimizer step of all ranks."""

    def __init__(self, run: Run) -> None:
        config, ranks, engine = run.config, run.ranks, run.engine
        self.run = run
        self.watch = Watch(ranks, engine.device)
        self.profiler: StepProfiler | None = None
        if config.profile and ranks.first:
            first, last = config.profile
            self.profiler = StepProfiler(run.out / "profile", first, last, ranks.rank, engine.device)
        self.wandb: WandbLog | None = None
        if config.wandb and ranks.first:
            self.wandb = WandbLog(config.wandb, config.name, run.out, to_dict(config))
        shares = shares_of(config, run.data, ranks.size)
        rate = device_rate(engine.device, engine.precision.autocast is not None) if shares else None
        self._full: float | None = None
        if shares and rate:
            self._full = step_flops(config, shares, ranks.size) / (rate * ranks.size)

    def before(self, step: int) -> None:
        """Step `step` (1-based) begins."""
        if self.profiler:
            self.profiler.before(step)

    def mfu(self, seconds: float) -> float | None:
        """Model FLOPs of a step that took `seconds`, over what the devices could have done; None where that is unknown."""
        return self._full / seconds if self._full else None

    def after(self, step: int, seconds: float, waited: float) -> None:
        """Step `step` is done; at every log_every-th all ranks meet, and one that holds the others up is named."""
        run = self.run
        self.watch.add(seconds, waited)
        if step % run.config.log_every == 0 or step == run.config.steps:
            reports = self.watch.report()
            if run.ranks.size > 1:
                if run.metrics:
                    run.metrics.write("ranks", step, as_columns(reports))
                for sentence in stragglers(reports):
                    run.say(f"step {step}: {sentence}")
        if self.profiler and (path := self.profiler.after(step)):
            run.say(f"profile     {path}: open it in ui.perfetto.dev or chrome://tracing")

    def write(self, prefix: str, step: int, values: Mapping[str, Any]) -> None:
        """To TensorBoard, and to Weights & Biases where it is on."""
        if self.run.board:
            self.run.board.write(prefix, step, values)
        if self.wandb:
            self.wandb.write(prefix, step, values)

    def close(self) -> Path | None:
        """Write what is left; the trace's file where a run ended within the steps that it was to record."""
        if self.wandb:
            self.wandb.close()
        return self.profiler.close() if self.profiler else None
