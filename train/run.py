"""A run in progress: what the loop calls between optimizer steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train import checkpoint
from train.checkpoint import Snapshot
from train.config import PretrainConfig
from train.directory import Lock
from train.engine import Ranks, StepResult, TorchEngine, gather_rng, leave, rng_state, share
from train.engines.watchdog import Watchdog
from train.evaluate.measure import evaluate_model
from train.evaluate.pairs import score_pairs, summarize_pairs
from train.evaluate.result import NOTHING, EvalResult
from train.machine import cores_and_load, crowded, peak_memory
from train.multimodal.config import CONTRASTS, PerceiverPretrainConfig
from train.saving import Saver
from train.signals import Interrupted, Stop
from train.tasks.base import TaskResult
from train.tasks.config import FinetuneConfig
from train.tasks.running import evaluate_task, say_task
from train.telemetry.log import Metrics, Progress, TensorBoard
from train.telemetry.observe import Observer

SHOWN_CAPTIONS = 3  # generated captions printed at an evaluation during the run
SETTLED = 3  # steps after which the machine's load is looked at


@dataclass(frozen=True)
class Position:
    """Where a step begins: the loader's state and the random generators'."""

    loader: dict[str, Any]
    rng: dict[str, Tensor]


@dataclass
class Run:
    """One run in progress. `step` counts finished optimizer steps."""

    config: PretrainConfig
    out: Path
    command: str  # as typed
    resume_command: str
    ranks: Ranks
    engine: TorchEngine
    data: Any  # Data, or MultimodalData
    progress: Progress
    metrics: Metrics | None  # rank 0 only, as is the next
    board: TensorBoard | None
    saver: Saver
    watchdog: Watchdog
    step: int = 0
    seconds_before: float = 0.0  # spent before the resume
    skipped: int = 0
    steps_here: int = 0  # of this process
    started: float = field(default_factory=time.monotonic)
    evaluation_seconds: list[float] = field(default_factory=list)
    observer: Observer | None = None  # until the run is set up
    lock: Lock | None = None  # of the run's directory, on rank 0

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, those before a resume included."""
        return self.seconds_before + time.monotonic() - self.started

    def say(self, text: str = "") -> None:
        """A line on rank 0's output."""
        self.progress.say(text)

    def any_rank(self, mine: bool) -> bool:
        """Whether this is so on any rank. All ranks call this."""
        told = torch.tensor(float(mine), device=self.engine.device)
        if self.ranks.size > 1:
            dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told.item())

    def position(self) -> Position:
        """Where the next step begins."""
        return Position(self.data.loader.state_dict(), rng_state(self.engine.device))

    def save(self, position: Position, *, wait: bool = False) -> None:
        """Write the checkpoint of the steps done so far, unless it is there already. All ranks call this. wait: until it is
        on the disk, and raise saving.SaveError where it cannot be.
        """
        if self.saver.writes(self.step):
            if not wait:
                return
            self.saver.finish(must=False)
        if self.saver.saved is not None and checkpoint.step_of(self.saver.saved) == self.step:
            return

        def snapshot() -> Snapshot:
            return Snapshot(
                step=self.step,
                engine=self.engine.state(),
                rng=gather_rng(position.rng, self.ranks),
                loader=position.loader,
                precision=self.engine.precision.name,
                world_size=self.ranks.size,
                seconds=self.seconds,
                skipped=self.skipped,
            )

        with self.watchdog.patient("a checkpoint"):
            self.saver.begin(snapshot, wait=wait)

    @property
    def saved(self) -> Path | None:
        """The newest checkpoint that is whole."""
        return self.saver.saved

    def log_step(self, result: StepResult, lr: float, *, seconds: float, waited: float) -> None:
        """Tell metrics.jsonl, TensorBoard and the progress line about the step just done."""
        config, device = self.config, self.engine.device
        values = {
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "images": self.step * config.batch_size,
            "images_per_second": config.batch_size / seconds,
            "data_wait": waited / seconds,
            "peak_memory": peak_memory(device),
            "skipped": self.skipped,
        }
        observer = self.observer
        assert observer is not None
        if (mfu := observer.mfu(seconds)) is not None:
            values["mfu"] = mfu
        if self.step % config.metrics_every == 0 and self.metrics:
            self.metrics.write(
                "train", self.step, {"seconds": self.seconds, **values, "losses": result.losses}
            )
            observer.write("loss", self.step, {"total": result.loss, **result.losses})
            observer.write(
                "train", self.step, {name: value for name, value in values.items() if name != "loss"}
            )
        evaluations = (config.steps - self.step) // config.eval_every if config.eval_every else 1
        later = evaluations * sum(self.evaluation_seconds) / max(len(self.evaluation_seconds), 1)
        self.progress.step(self.step, {**values, "losses": result.losses}, seconds, waited, later)
        self.steps_here += 1
        if self.steps_here == SETTLED and self.engine.device.type == "cpu" and self.ranks.size == 1:
            if warning := crowded(torch.get_num_threads(), *cores_and_load()):
                self.say(f"note        {warning}")
        observer.after(self.step, seconds, waited)

    def evaluation_is_missing(self) -> bool:
        """Whether the run was stopped in the evaluation that belongs to the step it goes on from."""
        due = (
            self.config.eval_every
            and self.step
            and self.step % self.config.eval_every == 0
            and self.step < self.config.steps
        )
        return bool(due) and bool(
            share(self.metrics is not None and self.step not in self.metrics.evaluated, self.ranks)
        )

    def evaluate(self, stop: Stop) -> None:
        """Score the first eval_images held-out pictures on rank 0, and say so. A signal abandons it; the loop
        then stops.
        """
        if self.data.heldout is None:
            return
        try:
            with self.watchdog.patient("an evaluation"), self.engine.scored_weights() as model:
                if self.ranks.first:
                    self._evaluate(stop, model)
        except Interrupted:
            return

    def _evaluate(self, stop: Stop, model: Any) -> None:
        if isinstance(self.config, FinetuneConfig):
            scored = evaluate_task(self, stop, model, self.config.eval_images)
            self.record_scores(scored)
            return say_task(self, scored)
        several = isinstance(self.config, PerceiverPretrainConfig)
        if several:
            result = self.score_pairs(stop, model, most=self.config.eval_images, generate=SHOWN_CAPTIONS)
        else:
            result = self.score(stop, model, max_images=self.config.eval_images, generate=SHOWN_CAPTIONS)
        self.record_scores(result)
        self.say((summarize_pairs if several else summarize)(self.step, result))
        material = result.material
        for key, generated, captions in zip(
            material.keys, material.generated, material.captions, strict=False
        ):
            self.say(f'  {key}: "{generated}"  (one of its captions: "{captions[0]}")')

    def score(
        self,
        stop: Stop,
        model: Any,
        *,
        generate: int = 0,
        reconstruct: int = 0,
        scenes: bool = False,
        **options: Any,
    ) -> EvalResult:
        """evaluate_model of what `engine.scored_weights` gives, with this run's device, precision and batch size, for what
        it trains: an objective of weight 0 gets no score, since that would be noise beside its baselines."""
        assert self.data.heldout is not None
        trained = self.config.objectives
        tasks = [task for task, weight in (("retrieval", trained.itc), ("perplexity", trained.mlm)) if weight]
        started = time.monotonic()
        with stop.interruptible():
            result = evaluate_model(
                model,
                self.data.heldout,
                self.data.tokenizer,
                device=self.engine.device,
                autocast=self.engine.precision.autocast,
                seed=self.config.seed,
                tasks=tasks,
                generate=generate if trained.caption else 0,
                scenes=scenes and trained.caption > 0,
                reconstruct=reconstruct if trained.mim else 0,
                **options,
            )
        self.evaluation_seconds.append(time.monotonic() - started)
        return result

    def score_pairs(
        self, stop: Stop, model: Any, *, generate: int = 0, scenes: bool = False, **options: Any
    ) -> EvalResult:
        """`train.evaluate.pairs.score_pairs` with this run's device and precision, for the objectives it trains.
        Hidden words are asked of one caption of a sample."""
        assert isinstance(self.config, PerceiverPretrainConfig)
        trained = self.config.objectives
        weights = trained.weights()
        sets = {kind: pairs for kind, pairs in self.data.heldout.items() if weights[CONTRASTS[kind]]}
        if not sets:
            return EvalResult({}, {}, NOTHING)
        started = time.monotonic()
        with stop.interruptible():
            result = score_pairs(
                model,
                sets,
                self.data.tokenizer,
                tasks=["retrieval", *(["perplexity"] if trained.mlm else [])],
                generate=generate if trained.caption else 0,
                scenes=scenes and trained.caption > 0,
                asked=1,
                blind_mlm=trained.blind_mlm,
                device=self.engine.device,
                autocast=self.engine.precision.autocast,
                seed=self.config.seed,
                **options,
            )
        self.evaluation_seconds.append(time.monotonic() - started)
        return result

    def record_scores(self, result: EvalResult | TaskResult, views: int = 1) -> None:
        """Into metrics.jsonl and TensorBoard. `views`: of each picture, for retrieval."""
        scores = result.scalars()
        assert self.metrics and self.observer
        self.metrics.write("eval", self.step, {"seconds": self.seconds, "views": views, "scores": scores})
        self.observer.write("heldout", self.step, scores)

    def close(self, *, together: bool) -> None:
        """Release files and threads, and part from the other ranks when all of them come here."""
        self.watchdog.stop()
        self.data.loader.close()
        if self.observer and (path := self.observer.close()):
            self.say(f"profile     {path}")
        if self.metrics and self.board:
            self.metrics.close()
            self.board.close()
        if self.lock:
            self.lock.close()
        if together:
            leave(self.ranks)


def summarize(step: int, result: EvalResult) -> str:
    """An evaluation during the run in one line."""
    scores = result.scalars()
    said = []
    if "retrieval" in result.scores:
        ways = {
            way: "/".join(f"{100 * scores[f'{way}/R@{k}']:.1f}" for k in (1, 5, 10))
            for way in ("text_to_image", "image_to_text")
        }
        said.append(
            f"R@1/5/10 text to image {ways['text_to_image']}%, image to text {ways['image_to_text']}% "
            f"of {result.counts['images']} pictures"
        )
    if "perplexity" in result.scores:
        said.append(
            f"masked-word perplexity {scores['perplexity']:.1f} "
            f"({scores['perplexity/shuffled']:.1f} with shuffled pictures)"
        )
    return f"held out at step {step}: " + (
        "; ".join(said) or "neither itc nor mlm is trained, nothing to score"
    )
