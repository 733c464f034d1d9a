"""What `auto` takes on a Hopper GPU, held against what one measured (bench/results/)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import cases, record
from bench.record import RUN_FILE, Row
from kernels.latent_attention import op as latent
from kernels.window_attention import op as window
from kernels.window_attention.geometry import Grid

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
# `auto` is to reach 0.97 of the fastest; at head_dim 96 and few blocks, with gradients, it reaches 0.966.
LEAST = 0.96
PEERS = {"triton": "triton", "sdpa": "torch-cudnn"}  # what a backend is called in the run


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200, as far as plans ask."""
    for module in (latent, window):
        monkeypatch.setattr(module, "is_hopper", lambda device: True)
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
        k = torch.empty(case.batch, case.keys, case.heads, case.head_dim, **sizes)
        v = torch.empty(case.batch, case.keys, case.heads, case.v_dim or case.head_dim, **sizes)
        backend = latent.plan(q, k, v, 0.0, False, dense=not case.ragged).preferred
        fastest = min(row.median for row in rows.values())
        assert fastest / rows[PEERS[backend]].median >= LEAST, (name, mode, backend)
        chosen.append(backend)
    assert set(chosen) == {"triton", "sdpa"} and len(chosen) == 14


@pytest.mark.usefixtures("hopper")
def test_latent_attention_goes_to_triton_where_torch_cannot() -> None:
    q = torch.empty(8, 512, 12, 128, device="meta", dtype=torch.bfloat16)
    assert latent.plan(q, q, q, 0.0, False, dense=True).preferred == "sdpa"
    for dropout_p, return_lse, dense in ((0.1, False, True), (0.0, True, True), (0.0, False, False)):
        assert latent.plan(q, q, q, dropout_p, return_lse, dense).preferred == "triton"
    single = q.float()
    assert latent.plan(single, single, single, 0.0, False, dense=True).preferred == "eager"
    odd, none = q[..., :100], q[:0]  # what cuDNN does not take, and nothing at all
    assert latent.plan(odd, odd, odd, 0.0, False, dense=True).preferred == "triton"
    assert latent.plan(none, none, none, 0.0, False, dense=True).preferred == "triton"


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
