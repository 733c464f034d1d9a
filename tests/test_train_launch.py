"""The files that start runs on clusters: shellcheck, the published Kubernetes schemas, and the SLURM script really run, with
stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.micro import ROOT
from train import cli
from train.plan.stated import RECIPES

LAUNCH = ROOT / "train" / "launch"
SLURM = LAUNCH / "slurm.sbatch"
VERSION = "1.31"  # backoffLimitPerIndex and podReplacementPolicy are in its schemas


def documents(name: str) -> list[dict[str, Any]]:
    return [part for part in yaml.safe_load_all((LAUNCH / f"{name}.yaml").read_text()) if part]


def shellcheck(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([Path(sys.executable).parent / "shellcheck", path], capture_output=True, text=True)


def test_shellcheck_finds_nothing_and_would_find_something(tmp_path: Path) -> None:
    assert shellcheck(SLURM).returncode == 0, shellcheck(SLURM).stdout
    bad = tmp_path / "bad.sbatch"
    bad.write_text(
        SLURM.read_text().replace('scontrol requeue "$SLURM_JOB_ID"', "scontrol requeue $SLURM_JOB_ID")
    )
    assert "SC2086" in shellcheck(bad).stdout


@pytest.mark.parametrize("name", RECIPES)
def test_kubernetes_files_fit_the_published_schemas_and_the_recipes(name: str) -> None:
    service, job = documents(name)
    for document in (service, job):
        kubernetes_validate.validate(document, VERSION, strict=True)
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    options = dict(
        word[2:].split("=", 1) for word in container["args"] if word.startswith("--") and "=" in word
    )
    assert spec["completions"] == spec["parallelism"] == int(options["nnodes"])
    assert int(options["nproc-per-node"]) == gpus and spec["completions"] * gpus == RECIPES[name].gpus
    # the pods find each other: names of an Indexed Job below the headless service
    assert options["rdzv-endpoint"] == f"{name}-0.{pod['subdomain']}:{service['spec']['ports'][0]['port']}"
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    # a checkpoint has time to be written before the pod is killed
    assert 60 <= int(options["shutdown-timeout"]) < pod["terminationGracePeriodSeconds"]
    words = container["args"][container["args"].index("train.pretrain") + 1 :]
    config = cli.parse([words[0], *(part for word in words[1:] for part in word.split("=", 1))])
    assert config is not None and config.name == name and config.resume == "auto"


def wrong_type(job: dict[str, Any]) -> None:
    job["spec"]["completions"] = "eight"


def misspelt(job: dict[str, Any]) -> None:
    job["spec"]["backoffLimitPerindex"] = 3


def no_rule(job: dict[str, Any]) -> None:
    del job["spec"]["podFailurePolicy"]["rules"][0]["action"]


@pytest.mark.parametrize("harm", [wrong_type, misspelt, no_rule])
def test_a_planted_error_is_caught(harm: Callable[[dict[str, Any]], None]) -> None:
    job = deepcopy(documents("aurora-xl")[1])
    harm(job)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSION, strict=True)


STAND_INS = {
    "scontrol": 'case "$1" in show) printf "node1\\nnode2\\n" ;; requeue) echo "$2" >> "$LOG/requeued" ;; esac',
    "srun": 'printf "%s\\n" "$@" > "$LOG/srun"; sleep "${TAKES:-0}"; exit "${CODE:-0}"',
}


def submit(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    env = {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(folder), "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[1-2]", "PYTHON": sys.executable, **environment,
    }  # fmt: skip
    return subprocess.run(["bash", SLURM, *words], env=env, capture_output=True, text=True, cwd=folder)


def test_slurm_starts_torchrun_on_every_node(tmp_path: Path) -> None:
    done = submit(tmp_path, "aurora-xl", "--data.train", "a b.tar", GPUS="4")
    assert done.returncode == 0 and "done after" in done.stdout
    words = (tmp_path / "srun").read_text().splitlines()
    at = {word: words[i + 1] for i, word in enumerate(words[:-1])}
    assert (at["--nnodes"], at["--nproc-per-node"], at["--rdzv-endpoint"]) == ("2", "4", "node1:29500")
    assert (
        at["--out"] == f"{tmp_path}/runs/aurora-xl"
        and at["--resume"] == "auto"
        and at["--data.train"] == "a b.tar"
    )
    from torch.distributed.run import parse_args

    parsed = parse_args(words[words.index("torch.distributed.run") + 1 :])  # torchrun knows every option
    assert parsed.max_restarts == 3 and "SIGUSR1" in parsed.signals_to_handle
    waits = tuple(map(int, version("torch").split(".")[:2])) >= (2, 12)
    assert ("--shutdown-timeout" in words) == waits and ("30 s after SIGTERM" in done.stderr) != waits
    assert not waits or parsed.shutdown_timeout == 540
    assert parsed.training_script == "train.pretrain" and parsed.training_script_args[0] == "aurora-xl"
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("torch", "waits"),
    [("2.9.1", False), ("2.11.0+cu130", False), ("2.12.0a0+git", True), ("3.0", True), ("", True)],
)
def test_slurm_asks_for_patience_where_torchrun_has_it(tmp_path: Path, torch: str, waits: bool) -> None:
    """An old torch's does not know the option; where the version is not told, it is taken for a newer one."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {torch}\n" if torch else "#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = submit(tmp_path, "aurora-xl", PYTHON=str(python))
    words = (tmp_path / "srun").read_text().splitlines()
    assert done.returncode == 0 and "--signals-to-handle" in words
    assert ("--shutdown-timeout" in words) == waits and (
        f"torchrun of torch {torch} kills" in done.stderr
    ) != waits


def test_slurm_requeues_what_ran_and_not_what_failed_at_once(tmp_path: Path) -> None:
    done = submit(tmp_path, "aurora-xl", CODE="143", TAKES="1", SHORTEST="1")
    assert (
        done.returncode == 0 and (tmp_path / "requeued").read_text() == "42\n" and "code 143" in done.stdout
    )
    (tmp_path / "requeued").unlink()
    at_once = submit(tmp_path, "aurora-xl", CODE="2")
    assert at_once.returncode == 2 and "not requeued" in at_once.stderr
    often = submit(tmp_path, "aurora-xl", CODE="1", TAKES="1", SHORTEST="1", SLURM_RESTART_COUNT="100")
    assert often.returncode == 1 and not (tmp_path / "requeued").exists()
    assert "usage: sbatch" in submit(tmp_path).stderr


def test_slurm_warns_long_before_it_kills() -> None:
    text = SLURM.read_text()
    warned = int(text.split("#SBATCH --signal=TERM@")[1].split()[0])
    assert int(text.split("grace=")[1].split()[0]) < warned and "#SBATCH --requeue" in text
