"""The runs this project ships: one small function each, deriving from the one before."""

from __future__ import annotations

import difflib
from dataclasses import replace

from models import AURORA_SIZES
from models.objectives import ObjectiveConfig
from train.config import ConfigError, DataConfig, OptimConfig, PretrainConfig
from train.multimodal.presets import PERCEIVER_PRESETS

XL_SAMPLES = 2_000_000_000  # 1.5 billion pairs and 0.5 billion uncaptioned pictures, seen once


def aurora_tiny() -> PretrainConfig:
    """8.5M parameters, 64 px, on the built-in corpus: about two minutes on 2 CPU cores."""
    return PretrainConfig(
        name="aurora-tiny",
        model=AURORA_SIZES["tiny"],
        # A softmax over 32 texts leaves its plateau in some 20 steps, the sigmoid loss in ten times as many.
        objectives=ObjectiveConfig(itc_kind="softmax"),
        # Crops this wide keep "top left" true. Masked language modelling reads a quarter of the captions and is asked
        # for more of each: as many words, half the work.
        data=DataConfig(
            uncaptioned_fraction=0.125,
            crop_scale=(0.85, 1.0),
            crop_ratio=(0.95, 1.05),
            mlm_share=0.25,
            mlm_probability=0.3,
        ),
        optim=OptimConfig(lr=1.5e-3, final_lr=1e-5, warmup=20),
        batch_size=40,
        steps=300,
        eval_every=100,
        eval_images=250,
        save_every=150,
    )


def aurora_photos() -> PretrainConfig:
    """6.8M parameters, 96 px, contrastive alone, for a few thousand captioned photographs of your own: minutes on a CPU."""
    tiny = aurora_tiny()
    return replace(
        tiny,
        name="aurora-photos",
        # 1,200 photographs are soon learned by heart. A bag of words does not learn captions so, a convolutional stem and a
        # mean with batch norm need fewer pictures; all five captions of a picture are read at each visit, and must agree.
        model=replace(
            tiny.model,
            image_size=96,
            windows=(12, 12, 6, 3),
            stem="conv",
            image_pooling="mean",
            text_pooling="words",
            embedding_width=512,
            drop_path=0.2,
            unimodal_layers=1,
            decoder_width=128,
        ),
        objectives=ObjectiveConfig(
            mim=0.0, caption=0.0, mlm=0.0, itc_kind="softmax", itc_word_dropout=0.3, itc_captions=0.5
        ),
        data=DataConfig(
            builtin=False,
            uncaptioned_fraction=0.0,
            captions_per_image=5,
            crop_scale=(0.4, 1.0),
            color_jitter=0.3,
        ),
        optim=replace(tiny.optim, weight_decay=0.2),
        batch_size=128,
        steps=400,
        ema_decay=0.99,
        eval_every=100,
        eval_views=14,
        save_every=100,
    )


def aurora_small() -> PretrainConfig:
    """95M parameters, 224 px, for your own shards: one GPU."""
    tiny = aurora_tiny()
    return replace(
        tiny,
        name="aurora-small",
        model=AURORA_SIZES["small"],
        objectives=ObjectiveConfig(),
        data=DataConfig(workers=8),
        optim=replace(tiny.optim, lr=5e-4, final_lr=1e-6, warmup=1_000),
        batch_size=256,
        steps=100_000,
        ema_decay=0.9999,
        eval_images=500,
        eval_every=2_000,
        save_every=1_000,
        log_every=20,
    )


def aurora_base() -> PretrainConfig:
    """318M parameters, 224 px: one large GPU, or several by torchrun."""
    small = aurora_small()
    return replace(
        small,
        name="aurora-base",
        model=AURORA_SIZES["base"],
        optim=replace(small.optim, lr=3e-4, warmup=2_000),
        batch_size=512,
        accumulation=2,
        steps=200_000,
        activation_checkpointing=True,
    )


def aurora_large() -> PretrainConfig:
    """1.0B parameters, 448 px: several large GPUs."""
    base = aurora_base()
    return replace(
        base,
        name="aurora-large",
        model=AURORA_SIZES["large"],
        optim=replace(base.optim, lr=2e-4, warmup=5_000),
        batch_size=1024,
        accumulation=4,
        metrics_every=10,
    )


def aurora_xl() -> PretrainConfig:
    """3.7B parameters, 448 px: the specified recipe, one pass over 2.0B samples (64 GPUs for weeks)."""
    large = aurora_large()
    return replace(
        large,
        name="aurora-xl",
        model=AURORA_SIZES["xl"],
        data=replace(large.data, uncaptioned_fraction=0.25),
        optim=replace(large.optim, lr=1.5e-4, final_lr=1e-6, warmup=5_000, clip=1.0, kind="torch"),
        batch_size=2048,
        accumulation=8,
        engine="deepspeed",
        zero_stage=2,
        itc_negatives="microstep",  # a second pass for the negatives of all micro-steps has no room in its weeks
        steps=-(-XL_SAMPLES // 2048),
        precision="bf16",
        ema_decay=0.0,
        activation_checkpointing=True,
        eval_every=10_000,
    )


PRESETS = {
    "aurora-tiny": aurora_tiny,
    "aurora-photos": aurora_photos,
    "aurora-small": aurora_small,
    "aurora-base": aurora_base,
    "aurora-large": aurora_large,
    "aurora-xl": aurora_xl,
}
DEFAULT = "aurora-tiny"


ALL = PRESETS | PERCEIVER_PRESETS


def preset(name: str) -> PretrainConfig:
    """The preset called `name`, exactly. Raises ConfigError with the list and the nearest name, which is
    never taken unasked.
    """
    if name in ALL:
        return ALL[name]()
    near = difflib.get_close_matches(name, ALL, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"no preset is called {name!r}.{hint} There are: {', '.join(ALL)}")


def listing() -> str:
    """One line per preset."""
    width = max(map(len, ALL)) + 1
    return "\n".join(
        f"  {name:{width}}{' '.join((make.__doc__ or '').split())}" for name, make in ALL.items()
    )
