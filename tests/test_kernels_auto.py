"""What `auto` takes on a Hopper GPU, held against what one measured (bench/results/)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import auto as bench_auto
from bench import cases, record
from bench.record import RUN_FILE, Row
from bench.subject import TRAINING
from kernels.latent_attention import auto, flash_ops
from kernels.latent_attention import op as latent
from kernels.window_attention import op as window
from kernels.window_attention.geometry import Grid

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
LEAST = 0.97  # of the fastest
PEERS = {"triton": "triton", "sdpa": "torch-cudnn"}  # what a backend is called in the run


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200, as far as plans ask."""
    monkeypatch.setattr(window, "is_hopper", lambda device: True)
    monkeypatch.setattr(auto, "figures", lambda device: auto.TABLE[9, 0])
    for module in (latent, window):
        monkeypatch.setattr(module.triton_ops, "triton_refusal", lambda device: None)
    chip = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)


def rows_of(folder: str) -> dict[tuple[str, str], dict[str, Row]]:
    """Case and mode -> implementation -> its row, those with a time."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in record.load(RESULTS / folder / RUN_FILE).rows:
        if row.status == "ok":
            found.setdefault((row.case, row.mode), {})[row.peer] = row
    return found


@pytest.mark.usefixtures("hopper")
def test_latent_attention_is_given_to_whoever_was_fastest() -> None:
    shapes = {case.name: case for case in cases.GPU_LATENTS}
    chosen = []
    for (name, mode), rows in rows_of("2026-11-27-h200-latent").items():
        case = shapes[name]
        sizes = {"device": "meta", "dtype": torch.bfloat16}
        q = torch.empty(case.batch, case.queries, case.heads, case.head_dim, **sizes)
        q.requires_grad_(mode == TRAINING)
        k = torch.empty(case.batch, case.keys, case.heads, case.head_dim, **sizes)
        v = torch.empty(case.batch, case.keys, case.heads, case.v_dim or case.head_dim, **sizes)
        backend = latent.prefer(q, k, v, 0.0, False, dense=not case.ragged)[0]
        fastest = min(row.median for row in rows.values())
        assert fastest / rows[PEERS[backend]].median >= LEAST, (name, mode, backend)
        chosen.append(backend)
    assert set(chosen) == {"triton", "sdpa"} and len(chosen) == 14


@pytest.mark.usefixtures("hopper")
def test_latent_attention_goes_to_triton_where_torch_cannot() -> None:
    q = torch.empty(8, 512, 12, 128, device="meta", dtype=torch.bfloat16)
    assert latent.plan(q, q, q).preferred == "sdpa"
    hidden = torch.zeros(8, device="meta", dtype=torch.int32)
    for more in ({"dropout_p": 0.1}, {"return_lse": True}, {"key_lengths": hidden}):
        assert latent.plan(q, q, q, **more).preferred == "triton"
    single = q.float()
    assert latent.plan(single, single, single).preferred == "eager"
    odd, none = q[..., :100], q[:0]  # what cuDNN does not take, and nothing at all
    assert latent.plan(odd, odd, odd).preferred == "triton"
    assert latent.plan(none, none, none).preferred == "triton"


def test_the_table_is_what_the_runs_say() -> None:
    """`python -m bench.auto` has written auto.json from what is in bench/results/, and nobody else has."""
    assert auto.FILE.read_text(encoding="utf-8") == bench_auto.table(bench_auto.RUNS)


def test_every_measured_call_of_the_table_goes_to_the_faster() -> None:
    """Those in others.txt too: all widths of heads. A figure within 3% is a draw."""
    figures = auto.TABLE[9, 0]
    limits = {"forward": figures.sdpa_from, "training": figures.sdpa_from_training}
    assert all([width for width, _ in some] == list(bench_auto.WIDTHS) for some in limits.values())
    for row in json.loads(auto.FILE.read_text(encoding="utf-8"))["9.0"]["rows"]:
        limit = next(share for width, share in limits[row["mode"]] if row["head_dim"] <= width)
        sdpa = row["busy"] >= limit and not row["lengths"]
        ratio = row["sdpa / triton"] if sdpa else 1 / row["sdpa / triton"]
        assert ratio <= 1 / LEAST, row


def test_what_one_kind_of_gpu_measured_decides_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {(9, 0): "triton", (8, 0): "sdpa", (8, 9): "sdpa", (10, 0): "sdpa"}
    q = SimpleNamespace(device=torch.device("cuda"), shape=(1, 512, 8, 64), dtype=torch.bfloat16)
    q.requires_grad = False
    for (major, minor), backend in kinds.items():
        chip = SimpleNamespace(multi_processor_count=132, major=major, minor=minor, name="a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, chip=chip: chip)
        assert latent.prefer(q, q, q, 0.0, False, dense=False)[0] == backend  # type: ignore[arg-type]
        assert "compute capability" not in (flash_ops.machine_refusal(q.device) or "")


def test_a_table_is_refused_where_it_would_be_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = bench_auto.timed(bench_auto.RUNS[0])[1]
    with pytest.raises(ValueError, match="does not know how many multiprocessors"):
        bench_auto.entry("NVIDIA B200", calls)
    with pytest.raises(
        ValueError, match="auto gives calls with key lengths to triton, and these say nothing"
    ):
        bench_auto.entry("NVIDIA H200", [call for call in calls if "-" not in call.shape])
    every = [call for name in bench_auto.RUNS for call in bench_auto.timed(name)[1]]
    monkeypatch.setattr(bench_auto, "timed", lambda device: (device, every))
    with pytest.raises(ValueError, match="second of its kind"):
        bench_auto.table(["NVIDIA H200", "NVIDIA H100 80GB HBM3"])


def test_another_gpus_entry_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "auto.json"
    known = json.loads(auto.FILE.read_text())
    out.write_text(json.dumps(known | {"8.0": {}}))
    with pytest.raises(SystemExit):
        bench_auto.main(["--out", str(out)])
    assert "entries of compute capability 8.0, which none of these runs" in capsys.readouterr().err
    assert json.loads(out.read_text()).keys() == known.keys() | {"8.0"}
    out.unlink()
    assert bench_auto.main(["--out", str(out)]) == 0 and out.read_text() == auto.FILE.read_text()


@pytest.mark.usefixtures("hopper")
def test_window_attention_goes_to_triton_which_was_fastest() -> None:
    qkv = torch.empty(2, 28, 28, 3, 4, 32, device="meta", dtype=torch.bfloat16)
    grid = Grid(28, 28, (7, 7), (3, 3))
    assert window.plan(qkv, grid, True, False).preferred == "triton"
    assert window.plan(qkv.float(), grid, True, False).preferred == "eager"
    assert window.plan(qkv.double(), grid, True, False).preferred == "sdpa"
    found = rows_of("2026-11-27-h200-window")
    for rows in found.values():
        assert min(rows.values(), key=lambda row: row.median).peer == "triton"
    assert len(found) == 10
