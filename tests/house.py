"""What the tests of the house share: where it is, how a command runs in it, what it requires."""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "models", "dataload", "train")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# What `make test` or a shell hands down, and would make commands inside a test do something else.
NOT_INHERITED = {
    "MAKEFLAGS",
    "MFLAGS",
    "MAKELEVEL",
    "MAKEOVERRIDES",
    "ARGS",
    "JOBS",
    "PYTHON",
    "TORCH",
    "PYTHONPATH",
}
USE_KERNELS = """
import torch, kernels
qkv = torch.randn(1, 9, 7, 3, 2, 16)
out = kernels.window_attention(qkv, window=4, shift=2)
torch.testing.assert_close(out, kernels.window_attention(qkv, window=4, shift=2, backend="reference"))
print(kernels.__file__)
"""


def run(
    *command: str | Path, cwd: Path = ROOT, check: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with `env` on top of the environment; a failure shows what it printed."""
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, env=inherited | env, capture_output=True, text=True, timeout=240)
    if check and done.returncode:
        pytest.fail(f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    project = PROJECT["project"]
    lines = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}
