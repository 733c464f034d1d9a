"""The PerceiverIO runs this project ships: one small function each, deriving from the one before."""

from __future__ import annotations

from dataclasses import replace

from models.perceiver import PERCEIVER_SIZES, PerceiverObjectives
from train.config import OptimConfig
from train.multimodal.config import MultimodalDataConfig, PairConfig, PerceiverPretrainConfig

XL_SAMPLES = 3_600_000_000  # 2.5 + 0.8 + 0.3 billion pairs, seen once


def perceiver_tiny() -> PerceiverPretrainConfig:
    """9M parameters, on the built-in pictures, clips and sounds: 350 processor seconds, about three minutes on 2 cores."""
    return PerceiverPretrainConfig(
        name="perceiver-tiny",
        model=PERCEIVER_SIZES["tiny"],
        # Softmax as in aurora-tiny. A quarter of the samples is read with hidden parts too: contrast and captions are
        # what these few minutes are for.
        objectives=PerceiverObjectives(contrastive_kind="softmax", masked_share=0.25),
        data=MultimodalDataConfig(
            crop_scale=(0.85, 1.0),
            crop_ratio=(0.95, 1.05),
            interpolation="bilinear",
            video_seconds=1.0,
            mlm_probability=0.3,
        ),
        optim=OptimConfig(lr=1.5e-3, final_lr=1e-5, warmup=20),
        batch_size=36,  # 25 pictures, 8 clips and 3 sounds, exactly the mixture's shares
        steps=200,
        eval_every=100,
        eval_images=100,
        save_every=100,
    )


def perceiver_real() -> PerceiverPretrainConfig:
    """Contrast alone, 64 px, for a few thousand photographs, sounds and clips of your own: minutes on a CPU."""
    tiny = perceiver_tiny()
    return replace(
        tiny,
        name="perceiver-real",
        # So few photographs are soon learned by heart. Convolutions in front and a bag of words behind need fewer of them,
        # and all captions of a picture are read at each visit.
        model=replace(
            tiny.model,
            image_stem="conv",
            image_patch=16,
            encoder_width=256,
            text_length=32,
            text_pooling="words",
            embedding_width=256,
            encoder_layers=0,
            latents=8,
            latent_width=192,
            latent_layers=1,
            layer_scale_init=0.1,
        ),
        objectives=PerceiverObjectives(
            contrastive_kind="softmax",
            word_dropout=0.3,
            agreement=0.5,
            caption=0.0,
            mlm=0.0,
            mim=0.0,
            mvm=0.0,
            mam=0.0,
        ),
        data=MultimodalDataConfig(
            # 192, 60 and 4 of a batch: a contrast is as good as it has negatives, and of labels there are few.
            image_text=PairConfig(weight=48.0),
            video_text=PairConfig(weight=1.0),
            audio_text=PairConfig(weight=15.0),
            builtin=False,
            captions_per_sample=5,
            crop_scale=(0.4, 1.0),
            color_jitter=0.3,
            interpolation="bilinear",
            video_seconds=3.0,
        ),
        optim=replace(tiny.optim, weight_decay=0.2),
        batch_size=256,
        steps=300,
        ema_decay=0.98,
        eval_every=100,
        eval_views=14,
        save_every=100,
    )


def perceiver_sounds() -> PerceiverPretrainConfig:
    """1.6M parameters, for a few hundred labelled sounds (train.finetune audio): seconds on 2 cores."""
    tiny = perceiver_tiny()
    return replace(
        tiny,
        name="perceiver-sounds",
        # Convolutions learn from a few hundred sounds what patches need thousands for; few latents think fast.
        model=replace(
            tiny.model,
            latents=12,
            latent_width=128,
            latent_layers=2,
            latent_head_dim=32,
            encoder_width=96,
            encoder_head_dim=32,
            text_width=96,
            decoder_width=96,
            decoder_head_dim=32,
            decoder_layers=1,
            query_width=64,
            audio_stem="conv",
            audio_range=10.0,
        ),
        steps=60,
        eval_every=0,
        save_every=60,
    )


def perceiver_small() -> PerceiverPretrainConfig:
    """87M parameters, 224 px, 10 s of sound, for your own shards: one GPU."""
    tiny = perceiver_tiny()
    return replace(
        tiny,
        name="perceiver-small",
        model=PERCEIVER_SIZES["small"],
        objectives=PerceiverObjectives(),
        data=MultimodalDataConfig(builtin=False, workers=8),
        optim=replace(tiny.optim, lr=5e-4, final_lr=5e-5, warmup=1_000),
        batch_size=256,
        steps=100_000,
        eval_images=500,
        eval_every=2_000,
        save_every=1_000,
        log_every=20,
    )


def perceiver_base() -> PerceiverPretrainConfig:
    """324M parameters, 256 px: one large GPU."""
    small = perceiver_small()
    return replace(
        small,
        name="perceiver-base",
        model=PERCEIVER_SIZES["base"],
        optim=replace(small.optim, lr=3e-4, final_lr=3e-5, warmup=2_000),
        batch_size=512,
        accumulation=2,
        steps=200_000,
        activation_checkpointing=True,
    )


def perceiver_large() -> PerceiverPretrainConfig:
    """1.1B parameters, 512 px: one large GPU for long, or a start on several."""
    base = perceiver_base()
    return replace(
        base,
        name="perceiver-large",
        model=PERCEIVER_SIZES["large"],
        optim=replace(base.optim, lr=2e-4, final_lr=2e-5, warmup=5_000),
        batch_size=1024,
        accumulation=4,
        metrics_every=10,
    )


def perceiver_xl() -> PerceiverPretrainConfig:
    """18B parameters, 512 px bicubic, 10 s at 16 kHz: the specified recipe, one pass over 3.6B pairs (256 GPUs for weeks)."""
    large = perceiver_large()
    return replace(
        large,
        name="perceiver-xl",
        model=PERCEIVER_SIZES["xl"],
        # Each sample is read once, half of them with hidden parts: reading all of them both ways takes twice the nine weeks.
        objectives=replace(large.objectives, masked_twice=False, masked_share=0.5),
        data=replace(large.data, mixture="mm-align", interpolation="bicubic"),
        optim=replace(large.optim, lr=1e-4, final_lr=1e-5, warmup=10_000, clip=1.0, kind="torch"),
        batch_size=2048,  # 8 on each of 256 GPUs
        accumulation=1,
        engine="deepspeed",
        zero_stage=2,
        steps=-(-XL_SAMPLES // 2048),
        precision="bf16",
        activation_checkpointing=True,
        eval_every=10_000,
    )


PERCEIVER_PRESETS = {
    "perceiver-tiny": perceiver_tiny,
    "perceiver-real": perceiver_real,
    "perceiver-sounds": perceiver_sounds,
    "perceiver-small": perceiver_small,
    "perceiver-base": perceiver_base,
    "perceiver-large": perceiver_large,
    "perceiver-xl": perceiver_xl,
}
