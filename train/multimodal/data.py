"""From a MultimodalDataConfig to loaders: which shards, which tokenizer, which held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dataload import scenes, shards
from dataload.multimodal import (
    PAIRS,
    AudioConfig,
    ImageConfig,
    MixtureConfig,
    MixtureLoader,
    PairSet,
    SourceConfig,
    TextConfig,
    VideoConfig,
    mixture,
)
from dataload.scenes import media as scenes_media
from dataload.tokenizer import Tokenizer
from train.config import ConfigError, micro_batch
from train.data import LARGEST_SCENE, load_tokenizer
from train.multimodal.config import CELL, MultimodalDataConfig, PerceiverPretrainConfig


@dataclass(frozen=True)
class PairSources:
    """The files of a run, by the kind of pair."""

    train: Mapping[str, tuple[shards.Address, ...]]
    heldout: Mapping[str, tuple[shards.Address, ...]]
    tokenizer: Path
    builtin: bool


@dataclass(frozen=True)
class MultimodalData:
    """What the loop reads."""

    sources: PairSources
    tokenizer: Tokenizer
    loader: MixtureLoader
    heldout: Mapping[str, PairSet] | None
    """by the kind of pair; None where nothing is held out"""


def find_pairs(config: MultimodalDataConfig, image_size: int, say: Callable[[str], None]) -> PairSources:
    """Expand the shards of a configuration; makes the built-in corpus first where none are named. Raises ValueError or
    OSError where something named is not there, ImportError where the built-in corpus cannot be made."""
    pairs = config.pairs()
    heldout = {kind: tuple(shards.expand(pair.heldout)) for kind, pair in pairs.items() if pair.heldout}
    if any(pair.train for pair in pairs.values()):
        tokenizer = Path(config.tokenizer)
        if not tokenizer.is_file():
            raise ConfigError(
                f"data.tokenizer {tokenizer} does not exist; make one with python -m dataload.tokenizer"
            )
        train = {kind: tuple(shards.expand(pair.train)) for kind, pair in pairs.items() if pair.train}
        return PairSources(train, heldout, tokenizer, builtin=False)
    directory = Path(config.cache).expanduser() if config.cache else scenes.default_directory()
    say(
        f"data        the built-in corpus, in {directory} (made the first time; --data.image-text.train and so on take yours)"
    )
    paths = scenes_media.build(directory, size=min(image_size, LARGEST_SCENE))
    return PairSources(
        dict(zip(PAIRS, (paths.pictures.train, paths.clips, paths.sounds), strict=True)),
        dict(zip(PAIRS, (paths.pictures.heldout, paths.heldout_clips, paths.heldout_sounds), strict=True)) | heldout,
        paths.tokenizer,
        builtin=True,
    )  # fmt: skip


def mixture_config(config: PerceiverPretrainConfig, sources: PairSources, world_size: int) -> MixtureConfig:
    """The training pipeline of one rank."""
    data = config.data
    weights = {kind: pair.weight for kind, pair in data.pairs().items() if pair.weight is not None}
    named = {kind: tuple(str(path) for path in paths) for kind, paths in sources.train.items()}
    mixed = mixture(data.mixture, named, weights)
    mixed = {kind: replace(source, exclude=data.exclude) for kind, source in mixed.items()}
    return views(config, mixed, micro_batch(config, world_size))


def views(
    config: PerceiverPretrainConfig, sources: Mapping[str, SourceConfig], batch_size: int
) -> MixtureConfig:
    """How samples of these sources are made into what the model reads."""
    data, model = config.data, config.model
    crops = {"crop_scale": data.crop_scale, "crop_ratio": data.crop_ratio, "flip": data.flip}
    return MixtureConfig(
        sources,
        batch_size=batch_size,
        image=ImageConfig(
            model.image_size,
            data.interpolation,
            **crops,  # type: ignore[arg-type]
            color_jitter=data.color_jitter,
            cell=CELL if model.image_size >= 4 * CELL else CELL // 2,
            mask_ratio=config.objectives.mask_ratio,
        ),
        audio=AudioConfig(model.audio_seconds),
        video=VideoConfig(model.video_frames, data.video_seconds, model.video_size, **crops),  # type: ignore[arg-type]
        text=TextConfig(
            model.text_length, data.tokenizer_sampling, data.mlm_probability, data.captions_per_sample
        ),
        seed=config.seed,
        workers=data.workers,
        prefetch=data.prefetch,
        max_broken=data.max_broken,
        quarantine=str(Path(config.out) / "broken.jsonl"),
    )


def open_pairs(
    config: PerceiverPretrainConfig, sources: PairSources, rank: int, world_size: int
) -> MultimodalData:
    """Open the training loader of one rank and the held-out sets."""
    tokenizer = load_tokenizer(sources.tokenizer, config.model.vocabulary)
    settings = mixture_config(config, sources, world_size)
    loader = MixtureLoader(settings, tokenizer, rank=rank, world_size=world_size)
    heldout = {kind: pair_set(kind, paths, settings, tokenizer) for kind, paths in sources.heldout.items()}
    return MultimodalData(sources, tokenizer, loader, heldout or None)


def pair_set(
    kind: str,
    paths: Sequence[shards.Address],
    settings: MixtureConfig,
    tokenizer: Tokenizer,
    batch_size: int = 32,
) -> PairSet:
    """The held-out pairs of one kind."""
    needs = (PAIRS[kind][0], "text")
    source = SourceConfig(tuple(map(str, paths)), modalities=PAIRS[kind], needs=needs)
    return PairSet(kind, source, settings, tokenizer, batch_size)


def evaluation_sets(
    config: PerceiverPretrainConfig,
    heldout: Mapping[str, Sequence[shards.Address]],
    tokenizer: Tokenizer,
    batch_size: int,
) -> dict[str, PairSet]:
    """Held-out pairs by their kind, without a training run around them."""
    sources = {kind: SourceConfig(tuple(map(str, paths))) for kind, paths in heldout.items()}
    settings = views(config, sources, batch_size)
    return {kind: pair_set(kind, paths, settings, tokenizer, batch_size) for kind, paths in heldout.items()}
