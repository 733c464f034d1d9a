"""Which engine a run gets, in words, and what does not go together."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from train.config import OptimConfig, PretrainConfig
from train.engines.choice import engine_problems, in_words

BASE = PretrainConfig()


@pytest.mark.parametrize(
    "values, size, said",
    [
        ({"engine": "single"}, 2, "engine is single, and there are 2 processes"),
        ({"engine": "ddp"}, 1, "engine is ddp, and there is one process"),
        ({"engine": "fsdp2", "zero_stage": 1}, 2, "fsdp2 supports 2 and 3"),
        ({"engine": "fsdp2", "optim": OptimConfig(kind="torch-8bit")}, 2, "'torch-8bit'; fsdp2 shards the moments of torch"),
        ({"engine": "ddp", "offload": True}, 2, "only deepspeed puts the optimizer into main memory"),
        ({"engine": "deepspeed", "compile": True}, 2, "compile is on, and the engine is deepspeed"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(values: dict[str, Any], size: int, said: str) -> None:
    found = engine_problems(dataclasses.replace(BASE, **values), size)
    assert len(found) == 1 and said in found[0]


def test_deepspeed_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import train.engines.deepspeed_settings as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    (said,) = engine_problems(dataclasses.replace(BASE, engine="deepspeed"), 2)
    assert "pip install 'auroraio[deepspeed]'" in said
    monkeypatch.undo()
    monkeypatch.setattr(module, "version", lambda name: "0.15.4")
    (said,) = engine_problems(dataclasses.replace(BASE, engine="deepspeed"), 2)
    assert "0.15.4 is installed, 0.19.8 or newer is needed" in said


def test_an_engine_is_named_in_words() -> None:
    assert in_words(BASE, 1) == "single: one process"
    assert "everything on each of 4 ranks" in in_words(BASE, 4)
    named = dataclasses.replace(BASE, engine="deepspeed", zero_stage=2, offload=True)
    assert in_words(named, 64) == (
        "deepspeed: DeepSpeed, ZeRO-2: gradients and optimizer in 64 shards, the optimizer in main memory"
    )
