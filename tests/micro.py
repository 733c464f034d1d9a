"""What tests of train/ share: a model of a few thousand parameters, a corpus of a few pictures, and how to
run the command on them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dataload import scenes
from dataload.scenes import ScenePaths
from models import AuroraConfig

ROOT = Path(__file__).absolute().parent.parent

MODEL = AuroraConfig(
    image_size=32,
    width=16,
    head_dim=16,
    depths=(1, 1, 1, 1),
    windows=(4, 4, 2, 1),
    vocabulary=1024,
    text_length=12,
    decoder_width=32,
    decoder_head_dim=16,
    unimodal_layers=1,
    crossmodal_layers=1,
    decoder_dropout=0.1,  # so that an exact resume needs the generators' states
    queries=2,
    embedding_width=16,
    pyramid_width=16,
    projector_hidden=(32, 32),
)


def corpus() -> ScenePaths:
    """A small built-in corpus, in the test run's own cache; drawn once."""
    return scenes.build(scenes.default_directory(), size=32, train=80, uncaptioned=40, heldout=12)


def model_arguments(model: AuroraConfig = MODEL) -> list[str]:
    """The fields of a model as the command line takes them."""
    arguments = []
    for name, value in vars(model).items():
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            arguments += [f"--model.{name.replace('_', '-')}", *map(str, values)]
    return arguments


def arguments(out: Path, *more: str) -> list[str]:
    """`python -m train.pretrain` ARGUMENTS: 12 small steps on the small corpus, checkpoints every 3."""
    paths = corpus()
    return [
        *("aurora-tiny", *model_arguments(), "--device", "cpu", "--precision", "fp32"),
        *("--data.train", *map(str, paths.train), "--data.heldout", *map(str, paths.heldout)),
        *(
            "--data.tokenizer",
            str(paths.tokenizer),
            "--data.workers",
            "1",
            "--data.uncaptioned-fraction",
            "0.25",
        ),
        *(
            "--batch-size",
            "16",
            "--steps",
            "12",
            "--optim.warmup",
            "2",
            "--eval-every",
            "0",
            "--save-every",
            "3",
        ),
        *("--log-every", "1", "--keep-checkpoints", "9", "--out", str(out), *more),
    ]


def command(*words: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of this Python as a user would."""
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


def metric_lines(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(out: Path) -> dict[int, dict[str, float]]:
    """Step -> losses, with no step twice."""
    lines = metric_lines(out)
    assert len({line["step"] for line in lines}) == len(lines), "a step is there twice"
    return {line["step"]: line["losses"] for line in lines}
