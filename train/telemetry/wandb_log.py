"""Weights & Biases, where it is installed and asked for: the same numbers as in metrics.jsonl and TensorBoard."""

from __future__ import annotations

import importlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WandbLog:
    """One run of a project. Its id is kept in OUT/wandb.json, so that a resumed run goes on in the same one; without a network,
    WANDB_MODE=offline keeps it on disk."""

    def __init__(self, project: str, name: str, out: Path, config: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        path = out / "wandb.json"
        if path.is_file():
            run_id = str(json.loads(path.read_text())["id"])
        else:
            run_id = secrets.token_hex(4)
            path.write_text(json.dumps({"project": project, "id": run_id}) + "\n")
        self._run: Any = wandb.init(
            project=project, name=name, id=run_id, resume="allow", dir=str(out), config=dict(config)
        )
        self._run.define_metric(
            "*", step_metric="step"
        )  # their own step never goes back, as a resumed run's does

    def write(self, prefix: str, step: int, values: Mapping[str, float]) -> None:
        """Scalars under "prefix/name"."""
        self._run.log({"step": step, **{f"{prefix}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
