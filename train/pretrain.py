"""Pre-train Aurora: `python -m train.pretrain [PRESET] [--field value ...]` (--help explains every field).

set up       device, precision, data, model, optimizer, a checkpoint to go on from        train/setup.py
each step    fetch micro-batches -> agree on denominators -> forward, backward -> clip, update
at times     evaluate on held-out pictures, save a checkpoint
at the end   evaluate on all of them, summary.json, report.html                           train/finish.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from dataload.pipeline import TooManyBroken, WorkerStuck
from dataload.sandbox import SandboxError
from train import cli
from train.checkpoint import CheckpointError
from train.config import ConfigError, PretrainConfig
from train.dryrun import dry_run
from train.finish import finish
from train.optim import lr_at
from train.run import Run
from train.saving import SaveError
from train.setup import set_up
from train.signals import Interrupted, Stop


class TrainingError(RuntimeError):
    """The run cannot go on; the message says what to do."""


def pretrain(config: PretrainConfig, command: Sequence[str]) -> int:
    """Run (or go on with) the training that `config` describes. Returns the exit code: 0, or 130/143 when a
    signal stopped it.

    command: the arguments as typed, for the line that says how to resume.
    """
    run = set_up(config, command)
    stop = Stop().install()
    orderly = False
    try:
        if run.evaluation_is_missing():
            run.evaluate(stop)
        done = train(run, stop)
        if done:
            try:
                finish(run, stop)
            except Interrupted:  # every step is done and saved; only the last evaluation is missing
                done = False
        code = 0 if done else interrupted(run, stop)
        orderly = True
        return code
    finally:
        stop.uninstall()
        run.close(together=orderly)


def train(run: Run, stop: Stop) -> bool:
    """Optimizer steps run.step+1 to config.steps. False when a signal ended them early; the run is saved
    either way.
    """
    config, engine, loader, beat = run.config, run.engine, run.data.loader, run.watchdog.beat
    skipped_in_a_row = 0
    while run.step < config.steps:
        if run.observer:
            run.observer.before(run.step + 1)
        started = time.perf_counter()
        beat(f"step {run.step + 1}: data")
        here = run.position()  # data and generators before this step: what is saved if it does not get done
        batches = [next(loader) for _ in range(config.accumulation)]
        waited = time.perf_counter() - started

        beat(f"step {run.step + 1}: meeting the others")
        normalizers, stopping = engine.agree(batches, bool(stop))
        micro_batches = [] if stopping else engine.micro_batches(batches)
        for i, micro in enumerate(micro_batches):
            if stopping:
                break
            beat(f"step {run.step + 1}: micro-step {i + 1} of {len(batches)}")
            with engine.micro_step(last=i == len(batches) - 1):
                engine.backward(engine.losses(micro, config.objectives, normalizers))
            stopping = bool(stop) and run.ranks.size == 1  # several ranks stop together, at the next step
        if stopping:
            engine.discard()
            run.save(here, wait=True)
            return False

        beat(f"step {run.step + 1}: update")
        lr = lr_at(run.step, config.steps, config.optim)
        result = engine.step(lr)
        run.step += 1
        if result.skipped:
            skipped_in_a_row += 1
            run.skipped += 1
            run.say(
                f"step {run.step} skipped: loss {result.loss:g}, gradient norm {result.grad_norm:g} "
                f"({skipped_in_a_row} in a row)"
            )
            if skipped_in_a_row >= config.optim.max_skipped:
                run.saver.finish(must=False)
                raise TrainingError(
                    f"{skipped_in_a_row} steps in a row had a non-finite loss or gradient "
                    f"(optim.max_skipped); the weights are those of step {run.step - skipped_in_a_row}. "
                    "Try a lower --optim.lr, a longer --optim.warmup, or --precision fp32"
                )
        else:
            skipped_in_a_row = 0
        run.log_step(result, lr, seconds=time.perf_counter() - started, waited=waited)

        last = run.step == config.steps
        run.saver.poll()
        if last or (config.save_every and run.step % config.save_every == 0):
            run.save(run.position(), wait=last)
        if not last and config.eval_every and run.step % config.eval_every == 0:
            run.evaluate(stop)
    return not run.any_rank(bool(stop))


def interrupted(run: Run, stop: Stop) -> int:
    """Say what was saved and how to go on."""
    name = stop.signal.name if stop.signal else "a signal to another process"
    run.say(f"stopped by {name} after step {run.step} of {run.config.steps}; saved in {run.saved}")
    run.say(f"go on with: {run.resume_command}")
    return stop.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 1 the run failed, 2 it could not be started as asked, 130/143 stopped
    by a signal.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        config = cli.parse(args)
        if config is None:
            return 0
        if config.dry_run:
            return dry_run(config)
        return pretrain(config, args)
    except (ConfigError, CheckpointError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingError, SaveError, TooManyBroken, WorkerStuck, SandboxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted before the first step; nothing to save", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
