"""Made-up runs of the benchmark, for the tests of what presents them."""

from __future__ import annotations

import dataclasses
from typing import Any

from bench.record import Accuracy, Ceilings, Paired, Row, Run

FINE = Accuracy("out", error=1e-7, allowed=4e-7, relative=1e-7, allowed_relative=1e-5)
BAD = Accuracy("dqkv", error=3e-6, allowed=1e-6, relative=1e-6, allowed_relative=1e-5)


def row(peer: str = "triton", seconds: tuple[float, ...] = (0.001,) * 9, **changes: Any) -> Row:
    """8,000 tokens in 1 ms, 2 GFLOP over 10 MB: 2 TFLOP/s at 200 FLOP/byte."""
    return dataclasses.replace(
        Row(
            "window_attention", "tiny", "forward", peer, "bfloat16", "16 x 16x16 map", peer == "triton", "ok",
            seconds=seconds, clock="graph", items=8000, unit="tokens", flops=2e9, bytes=1e7, peak_memory=5_000_000,
            accuracy=(FINE,),
        ),
        **changes,
    )  # fmt: skip


def make_run(rows: tuple[Row, ...], **changes: Any) -> Run:
    run = Run(
        "2026-03-14T10:21:07+00:00", "pytest bench/ --profile a100", "1a90658c0ffee", "NVIDIA A100-SXM4-80GB", "cuda",
        "a100", {"torch": "2.13.0", "triton": "3.9.0"}, Ceilings(5e10, {"bfloat16": 2e13}), rows=rows,
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def typical() -> Run:
    """Two subjects and every kind of row: ours 2 x as fast as timm and half as fast as flex, one wrong, one absent,
    one failed."""
    pairs = (Paired("timm", 0.5, 0.49, 0.51), Paired("flex", 2.0, 1.9, 2.1))
    rows = (
        row(paired=pairs),
        row("timm", (0.002,) * 9, note="compiled"),
        row("flex", (0.0005,) * 9),
        row("transformers", (), status="wrong", note="ignores the shift", accuracy=(FINE, BAD)),
        row("flash-attn", (), status="absent", note="flash-attn is not installed", accuracy=()),
        row("cudnn", (), status="failed", note="RuntimeError: no engine", accuracy=()),
        row(case="base", mode="training", seconds=(0.004,) * 9, shape=""),
        row(
            subject="data_loader",
            mode="load",
            unit="images",
            flops=0.0,
            bytes=0.0,
            peak_memory=None,
            accuracy=(),
        ),
    )
    return make_run(rows)
