"""Configuration: presets, the recipe of XL, checks in words, JSON and back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from dataload import tokenizer
from models import AURORA_SIZES, tokens
from models.parameters import count_aurora
from train.config import ConfigError, PretrainConfig, differences, from_dict, micro_batch, problems, to_dict
from train.presets import PRESETS, preset


def test_xl_is_the_specified_recipe() -> None:
    xl = preset("aurora-xl")
    assert xl.model == AURORA_SIZES["xl"]
    assert (xl.model.image_size, xl.model.vocabulary) == (448, 32_000)
    assert (xl.optim.lr, xl.optim.final_lr, xl.optim.warmup, xl.optim.clip) == (1.5e-4, 1e-6, 5_000, 1.0)
    assert (xl.batch_size, xl.accumulation, xl.precision) == (2048, 8, "bf16")
    assert xl.activation_checkpointing
    assert xl.data.crop_scale[0] < 1 and xl.data.flip == 0.5
    # one pass over 1.5 billion pairs and 0.5 billion uncaptioned pictures
    assert xl.steps == 976_563 and (xl.steps - 1) * 2048 < 2_000_000_000 <= xl.steps * 2048
    assert xl.data.uncaptioned_fraction == 0.5e9 / 2.0e9
    assert micro_batch(xl, 64) == 4


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound_and_named_after_their_size(name: str) -> None:
    config = preset(name)
    assert config.name == name
    if name == "aurora-photos":  # tiny's encoder behind another stem: 3x3 convolutions instead of 4x4 patches
        photos, tiny = (count_aurora(model) for model in (config.model, AURORA_SIZES["tiny"]))
        assert 6e6 < photos["total"] < 10e6
        channels = config.model.width
        convolutions = 9 * channels * (3 + channels + 2 * channels) + 2 * 4 * channels  # and batch norms
        convolutions += 2 * channels * channels + channels  # 1x1
        assert photos["encoder"] - tiny["encoder"] == convolutions - (48 * channels + channels)
    else:
        assert config.model == AURORA_SIZES[name.removeprefix("aurora-")]
    if name == "aurora-photos":  # its pictures are yours: forgetting them is noticed
        (found,) = problems(config)
        assert "aurora-photos is for your own pictures, and no --data.train was given" in found
        yours = dataclasses.replace(config.data, train=("train-000000.tar",), tokenizer="tokenizer.model")
        assert (
            problems(dataclasses.replace(config, data=dataclasses.replace(config.data, builtin=True))) == []
        )
        config = dataclasses.replace(config, data=yours)
    assert problems(config) == []


def test_presets_cover_the_ladder() -> None:
    ladder = [name.removeprefix("aurora-") for name in PRESETS if name != "aurora-photos"]
    assert ladder == list(AURORA_SIZES)


def test_unknown_preset_is_refused_with_the_list_and_the_nearest() -> None:
    with pytest.raises(
        ConfigError,
        match="Did you mean aurora-xl.*aurora-tiny, aurora-photos, aurora-small, aurora-base, aurora-large",
    ):
        preset("aurora-xxl")
    with pytest.raises(ConfigError) as error:
        preset("resnet")
    assert "Did you mean" not in str(error.value)


def replaced(**values: object) -> PretrainConfig:
    """The tiny preset with fields replaced; dots in names are written __."""
    config = preset("aurora-tiny")
    for name, value in values.items():
        *path, last = name.split("__")
        if path:
            part = dataclasses.replace(getattr(config, path[0]), **{last: value})
            config = dataclasses.replace(config, **{path[0]: part})
        else:
            config = dataclasses.replace(config, **{last: value})
    return config


@pytest.mark.parametrize(
    "values, said",
    [
        ({"batch_size": 63, "accumulation": 2}, "split over accumulation 2 x 1 process; try 62 or 64"),
        ({"batch_size": 1, "accumulation": 2}, "try 2"),
        ({"log_every": 0}, "log_every is 0; it must be at least 1"),
        ({"accumulation": 0}, "accumulation is 0; it must be at least 1"),
        ({"save_every": -1}, "save_every is -1; it must be 0"),
        ({"steps": 400, "optim__warmup": 400}, "optim.warmup is 400 steps, but the run has 400"),
        ({"optim__final_lr": 1.0}, "wanted: 0 <= final_lr <= lr"),
        ({"optim__lr": 0.0, "optim__final_lr": 0.0}, "lr > 0"),
        ({"optim__clip": -1.0}, "optim.clip is -1; it must be 0 (off) or more"),
        ({"optim__max_skipped": 0}, "optim.max_skipped is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1; it must be in [0, 1)"),
        ({"data__flip": 1.5}, "data.flip is 1.5; it must be in [0, 1]"),
        ({"data__train": ("a.tar",)}, "data.train is given without data.tokenizer"),
        ({"data__tokenizer": "t.model"}, "data.tokenizer is given without data.train"),
    ],
)  # fmt: skip
def test_every_mistake_is_named(values: dict[str, object], said: str) -> None:
    found = problems(replaced(**values))
    assert len(found) == 1 and said in found[0], found


def test_pairs_cannot_be_mixed_in_micro_batches_of_one() -> None:
    photos = preset("aurora-photos")
    objectives = dataclasses.replace(photos.objectives, itc_mix=0.25)
    photos = dataclasses.replace(photos, objectives=objectives, accumulation=128)
    (found,) = [problem for problem in problems(photos) if "itc_mix" in problem]
    assert "itc_mix is 0.25 with micro-batches of 1" in found
    assert not any("itc_mix" in problem for problem in problems(dataclasses.replace(photos, accumulation=64)))


def test_several_mistakes_are_listed_together() -> None:
    assert len(problems(replaced(batch_size=0, steps=0, ema_decay=2.0))) >= 3


def test_the_batch_must_divide_over_processes() -> None:
    assert problems(replaced(batch_size=64), world_size=4) == []
    assert "accumulation 1 x 3 processes; try 63 or 66" in problems(replaced(batch_size=64), world_size=3)[0]


@pytest.mark.parametrize("name", PRESETS)
def test_json_and_back(name: str) -> None:
    config = dataclasses.replace(preset(name), resume="auto")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=("a.tar", "b.tar")))
    assert from_dict(PretrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    weights = dataclasses.replace(config.model, bias_windows=(7, 7, 7, 7))
    config = dataclasses.replace(config, model=weights)
    assert from_dict(PretrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_json_with_whole_numbers_and_missing_fields() -> None:
    config = from_dict(PretrainConfig, {"optim": {"lr": 1}, "ema_decay": 0})
    assert isinstance(config.optim.lr, float) and isinstance(config.ema_decay, float)
    assert config.batch_size == PretrainConfig().batch_size


def test_json_of_another_version_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="OptimConfig has no field momentum"):
        from_dict(PretrainConfig, {"optim": {"momentum": 0.9}})


def test_differences_are_dotted() -> None:
    tiny = preset("aurora-tiny")
    changed = differences(tiny, replaced(optim__lr=2e-3, steps=401))
    assert changed == {"optim.lr": (tiny.optim.lr, 2e-3), "steps": (tiny.steps, 401)}


def test_models_and_dataload_mean_the_same_special_tokens() -> None:
    for name in ("PAD", "UNK", "BOS", "EOS", "MASK"):
        assert getattr(tokens, name) == getattr(tokenizer, name)
