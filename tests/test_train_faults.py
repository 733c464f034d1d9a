"""Faults as they happen: killed and stopped processes, lost nodes, full disks, hung ranks. Each is really done, and the run
that goes on afterwards is compared with one that nothing happened to."""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from micro import ROOT, arguments, losses
from ranks import Agent, Launch, free_port

from train import checkpoint
from train.engine import StepResult, TorchEngine
from train.engines.meeting import meet
from train.pretrain import main

# Dropout differs between numbers of ranks; everything else must not.
STILL = (
    "--model.decoder-dropout",
    "0",
    "--batch-size",
    "32",
    "--accumulation",
    "2",
    "--steps",
    "9",
    "--optim.lr",
    "3e-4",
)
Act = Callable[[int], None]  # called with the number of the step that begins


def run(typed: list[str], act: Act | None = None, keys: Path | None = None) -> int:
    """`python -m train.pretrain` in this process; `act` happens in the forward pass of each step, and the keys of what is
    trained on go into a file."""
    forward, concluded, step = TorchEngine.losses, TorchEngine.concluded, [0, 0]

    def watched(self: TorchEngine, micro: Any, *rest: Any) -> Any:
        if keys is not None:
            with keys.with_name(f"{keys.name}-{self.ranks.rank}").open("a") as file:
                file.write("".join(f"{key}\n" for key in micro.batch.keys))
        if act is not None and step[1] == 0:
            act(step[0])
        step[1] += 1
        return forward(self, micro, *rest)

    def counted(self: TorchEngine, *results: Any) -> StepResult:
        step[:] = [step[0] + 1, 0]
        return concluded(self, *results)

    TorchEngine.losses, TorchEngine.concluded = watched, counted  # type: ignore[method-assign]
    try:
        return main(typed)
    finally:
        TorchEngine.losses, TorchEngine.concluded = forward, concluded  # type: ignore[method-assign]


class Terminate:
    """A signal to one rank, in the step with this number (counted since the start of the process)."""

    def __init__(self, at: int, rank: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.at, self.rank, self.number = at, rank, number

    def __call__(self, step: int) -> None:
        if step == self.at and os.environ["RANK"] == str(self.rank):
            os.kill(os.getpid(), self.number)


class Sleep(Terminate):
    """A rank that does not go on."""

    def __call__(self, step: int) -> None:
        if step == self.at and os.environ["RANK"] == str(self.rank):
            time.sleep(1000)


class NoRoom(Terminate):
    """A rank may not write files of any size, from one step on to another."""

    def __init__(self, at: int, rank: int, until: int) -> None:
        super().__init__(at, rank)
        self.until = until

    def __call__(self, step: int) -> None:
        if os.environ["RANK"] == str(self.rank):
            limit = 20_000 if self.at <= step < self.until else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine steps in one process, to which nothing happens."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert run(arguments(out, *STILL), keys=out.parent / "keys") == 0
    return out


def same_losses(out: Path, wanted: Path) -> None:
    found, expected = losses(out), losses(wanted)
    assert found.keys() == expected.keys()
    for step, parts in expected.items():
        assert found[step] == pytest.approx(parts, rel=2e-5, abs=2e-6), step


def same_weights(a: Path, b: Path, step: int) -> bool:
    one, other = (checkpoint.read(out / f"checkpoints/step-{step:06d}")[0].engine for out in (a, b))
    pairs = ((one.model, other.model), (one.optimizer, other.optimizer))
    return all(set(x) == set(y) and all(torch.equal(x[name], y[name]) for name in x) for x, y in pairs)


def test_other_ranks_and_engines_take_over_and_no_sample_is_lost(straight: Path, tmp_path: Path) -> None:
    """Four ranks of FSDP2 until SIGTERM reaches one of them, two of DeepSpeed until SIGUSR1 does, then one process.
    Each sample of the first epoch is seen once; the losses are those of the run in one process."""
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'auroraio[deepspeed]'")
    out, keys = tmp_path / "run", tmp_path / "keys"
    typed = [*arguments(out, *STILL), "--save-every", "0"]
    on = ["--resume", "auto"]
    ranks = Launch(
        4, run, [*typed, "--engine", "fsdp2"], Terminate(1, 3), keys, RANKS_OUTPUT=str(tmp_path / "a")
    ).results()
    assert ranks == [143] * 4
    assert "stopped by a signal to another process after step 2 of 9" in (tmp_path / "a-0.txt").read_text()
    ranks = Launch(
        2,
        run,
        [*typed, *on, "--engine", "deepspeed"],
        Terminate(1, 0, signal.SIGUSR1),
        keys,
        RANKS_OUTPUT=str(tmp_path / "b"),
    ).results()
    assert ranks == [128 + signal.SIGUSR1, 143]
    assert "stopped by SIGUSR1 after step 4 of 9" in (said := (tmp_path / "b-0.txt").read_text())
    assert "engine was 'fsdp2' in the checkpoint; from now on 'deepspeed'" in said
    assert run([*typed, *on, "--engine", "single"], keys=keys) == 0
    same_losses(out, straight)

    seen = Counter(line for file in tmp_path.glob("keys-*") for line in file.read_text().split())
    assert seen == Counter((straight.parent / "keys-0").read_text().split())
    # 9 steps of 24 captioned and 8 uncaptioned pictures, of 80 and 40: two epochs and 56 of the third, one and 32 of the second
    assert Counter(seen.values()) == {3: 56, 2: 24 + 32, 1: 8}


SHORT = ("--engine", "fsdp2", "--steps", "6", "--save-every", "2")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is killed below, left alone. With dropout."""
    out = tmp_path_factory.mktemp("two") / "run"
    assert Launch(2, run, arguments(out, *SHORT)).results() == [0, 0]
    return out


def test_all_ranks_killed_at_a_random_moment(two_ranks: Path, tmp_path: Path) -> None:
    """SIGKILL, wherever they are; the run that goes on ends with the same bits."""
    out = tmp_path / "run"
    seconds = random.Random().uniform(0, 0.3)
    print(f"killed {seconds} s after a step")
    ranks = Launch(2, run, arguments(out, *SHORT))
    wait_for_step(out, random.Random().choice([2, 3, 4]))
    time.sleep(seconds)
    ranks.kill()
    again = Launch(2, run, arguments(out, *SHORT, "--resume", "auto"))
    assert again.results() == [0, 0]
    assert same_weights(out, two_ranks, 6) and losses(out) == losses(two_ranks)
    assert not list((out / "checkpoints").glob(".unfinished*"))


def wait_for_step(out: Path, step: int, saved: int = 0, seconds: float = 200) -> None:
    """Until this step is logged, and the checkpoint of step `saved` is whole: it is written beside later steps."""
    end, metrics = time.monotonic() + seconds, out / "metrics.jsonl"
    while time.monotonic() < end:
        there = not saved or (out / f"checkpoints/step-{saved:06d}").is_dir()
        if there and metrics.is_file() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come")


def test_torchrun_starts_a_killed_rank_again(straight: Path, tmp_path: Path) -> None:
    """--max-restarts: one rank gets SIGKILL at a random moment; the same command goes on from the newest checkpoint."""
    out = tmp_path / "run"
    launcher = [
        *("--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
    ]
    agent = Agent(launcher, run, arguments(out, *STILL), RANKS_OUTPUT=str(tmp_path / "said"))
    try:
        wait_for_step(out, random.Random().choice([4, 5, 6]), saved=3)
        os.kill(random.Random().choice(agent.ranks), signal.SIGKILL)
        assert agent.join(100) == [0]
    finally:
        agent.kill()
        print(said := (tmp_path / "said-0.txt").read_text())
    assert re.search(r"checkpoints/step-00000[36]: going on after step [36] of 9", said)
    same_losses(out, straight)


def two_rounds(out: Path) -> int:
    """In a rank: meet and be killed; then meet again, rank 0 late."""
    again, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    if again and rank == 0:
        time.sleep(1)
    meet("gloo", rank, 2, timedelta(seconds=20))
    ones = torch.ones(1)
    dist.all_reduce(ones)
    if not again:
        os.kill(os.getpid(), signal.SIGKILL)
    (out / str(rank)).write_text(str(ones.item()))
    return 0


def test_a_late_rank_is_waited_for_after_a_restart(tmp_path: Path) -> None:
    """With `dist.init_process_group("gloo")` in place of `meet`, and nothing else of ours, this fails: rank 1 connects to where
    rank 0 listened before it was killed (torch 2.13)."""
    launcher = ["--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1"]
    agent = Agent(
        [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"], two_rounds, tmp_path
    )
    try:
        assert agent.join(60) == [0]
    finally:
        agent.kill()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2.0", "2.0"]


def test_a_lost_node_is_done_without(straight: Path, tmp_path: Path) -> None:
    """Two nodes of one process, --nnodes 1:2. One is lost with all that runs on it: the other meets alone and goes on."""
    out = tmp_path / "run"
    launcher = [
        *("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--monitor-interval", "0.1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "x"),
        *("--local-addr", "127.0.0.1", "--rdzv-conf"),
    ]
    patience = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=2,join_timeout=60"
    typed = [*arguments(out, *STILL), "--resume", "auto"]
    kept, lost = nodes = [  # the first one is where they meet
        Agent(
            [*launcher, f"{patience},is_host={host}"], run, typed, RANKS_OUTPUT=str(tmp_path / f"said{host}")
        )
        for host in (1, 0)
    ]
    try:
        wait_for_step(out, 4, saved=3)
        lost.kill()
        assert kept.join(100) == [0]
    finally:
        for node in nodes:
            node.kill()
        print(said := "".join(file.read_text() for file in sorted(tmp_path.glob("said*"))))
    assert "2 processes" in said and "engine      single: one process" in said
    assert re.search(r"checkpoints/step-00000[36]: going on after step [36] of 9", said)
    same_losses(out, straight)


def test_a_hung_rank_is_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    ranks = Launch(
        2, run, [*arguments(out, "--hang-timeout", "4")], Sleep(2, 1), RANKS_OUTPUT=str(tmp_path / "said")
    )
    assert ranks.join() == [1, 1]
    for rank in (0, 1):
        said = (tmp_path / f"said-{rank}.txt").read_text()
        assert re.search(r"rank 1 hangs at: step 3: micro-step 1 of 1 \(process \d+ on .*\)", said), said
        assert "time.sleep(1000)" in said, "the line where it hangs"
        assert "rank 0 hangs" not in said


def test_a_stopped_process_is_named(tmp_path: Path) -> None:
    """SIGSTOP, as a machine that freezes: it cannot say anything itself."""
    out = tmp_path / "run"
    ranks = Launch(2, run, [*arguments(out, "--hang-timeout", "4")], RANKS_OUTPUT=str(tmp_path / "said"))
    wait_for_step(out, 2)
    pid = ranks.processes[1].pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    ranks.processes[0].join(100)
    ranks.kill()
    assert ranks.processes[0].exitcode == 1
    assert re.search(
        rf"rank 1 hangs: it gives no sign of life, .*process {pid} on", (tmp_path / "said-0.txt").read_text()
    )


def test_a_rank_without_room_fails_one_checkpoint_not_the_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    typed = arguments(out, "--engine", "fsdp2", "--save-every", "2", "--steps", "6")
    assert Launch(2, run, typed, NoRoom(3, 1, 5), RANKS_OUTPUT=str(tmp_path / "said")).results() == [0, 0]
    said = (tmp_path / "said-0.txt").read_text()
    assert re.search(
        r"could not save .*step-000004: rank 1: .*File too large.*the newest is .*step-000002", said
    ), said
    assert [path.name for path in checkpoint.find(out)] == ["step-000006", "step-000002"]
    assert not list((out / "checkpoints").glob(".unfinished*"))
    checkpoint.verify(out / "checkpoints/step-000006")


NEW_MOUNTS, NEW_USER, PRIVATE = (
    0x00020000,
    0x10000000,
    0x4000 | 0x40000,
)  # CLONE_NEWNS, CLONE_NEWUSER, MS_REC | MS_PRIVATE


def on_a_small_disk(folder: Path, size: str) -> tuple[int, list[str], str] | str:
    """A run on a file system of its own that gets full. Returns its exit code, the checkpoints, and what is missing."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_MOUNTS):  # not as root: as root of a namespace, then
        if libc.unshare(NEW_MOUNTS | NEW_USER):
            return f"no namespaces here: {os.strerror(ctypes.get_errno())}"
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"none", b"/", None, PRIVATE, None):
        return f"no mounts of one's own here: {os.strerror(ctypes.get_errno())}"
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()):
        return f"no tmpfs here: {os.strerror(ctypes.get_errno())}"
    out = folder / "run"
    code = main(arguments(out, "--steps", "6", "--save-every", "2"))
    found = checkpoint.find(out)
    for path in found:
        checkpoint.verify(path)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return (
        code,
        [path.name for path in found],
        f"{last['step']} steps, {len(list((out / 'checkpoints').glob('.un*')))} left",
    )


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A real one, of a few megabytes: one checkpoint fits, the next does not; the last one fails the run, and says so."""
    (tmp_path / "disk").mkdir()
    (found,) = Launch(
        1, on_a_small_disk, tmp_path / "disk", size_of_one_and_a_half(), RANKS_OUTPUT=str(tmp_path / "said")
    ).results()
    if isinstance(found, str):
        pytest.skip(found)
    code, names, rest = found
    said = (tmp_path / "said-0.txt").read_text()
    assert re.search(
        r"could not save .*step-000004: rank 0: .*No space left on device .*training goes on", said
    ), said
    assert re.search(r"error: could not save .*step-000006: .*No space left on device", said), said
    assert (code, names, rest) == (1, ["step-000002"], "6 steps, 0 left")


def size_of_one_and_a_half() -> str:
    """Bytes of a checkpoint of the small model, times 1.5: weights and two moments."""
    from micro import MODEL

    from models import Aurora

    return str(int(1.5 * 3 * 4 * sum(p.numel() for p in Aurora(MODEL).parameters())))


def test_the_deepspeed_launcher(tmp_path: Path, straight: Path) -> None:
    """`deepspeed` instead of torchrun: it passes --local_rank."""
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'auroraio[deepspeed]'")
    out = tmp_path / "run"
    program = Path(sys.executable).with_name("deepspeed")
    typed = [*arguments(out, *STILL), "--steps", "9", "--engine", "deepspeed", "--zero-stage", "1"]
    done = subprocess.run(
        [
            *(str(program), "--num_gpus", "2", "--master_port", str(free_port()), "--module", "train.pretrain"),
            *typed,
        ],
        cwd=ROOT, env={**os.environ, "LOCAL_SIZE": "2"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ZeRO-1: optimizer in 2 shards" in done.stdout
    same_losses(out, straight)
