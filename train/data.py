"""From a DataConfig to loaders: which shards, which tokenizer, how many samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from dataload import scenes, shards
from dataload.pipeline import EvalSet, Loader, LoaderConfig
from dataload.tokenizer import Tokenizer
from train.config import ConfigError, DataConfig, PretrainConfig, micro_batch

LARGEST_SCENE = 64  # pixels; larger models see the built-in pictures enlarged


@dataclass(frozen=True)
class Sources:
    """The files of a run."""

    train: tuple[shards.Address, ...]
    heldout: tuple[shards.Address, ...]
    tokenizer: Path
    builtin: bool  # training pictures are the built-in corpus'

    @property
    def builtin_heldout(self) -> bool:
        """Held-out captions name color and shape as the built-in corpus' do."""
        return self.builtin and bool(self.heldout) and self.heldout[0].parent == self.train[0].parent


@dataclass(frozen=True)
class Data:
    """What the loop reads."""

    sources: Sources
    tokenizer: Tokenizer
    loader: Loader
    heldout: EvalSet | None
    pairs: int  # captioned pictures per rank and micro-step (the mean, rounded)


def find_sources(config: DataConfig, image_size: int, say: Callable[[str], None]) -> Sources:
    """Expand the shards of a configuration; draws the built-in corpus first where none are named.

    Raises ValueError or OSError where something named is not there.
    """
    if config.train:
        heldout: tuple[shards.Address, ...] = tuple(shards.expand(config.heldout)) if config.heldout else ()
        tokenizer = Path(config.tokenizer)
        if not tokenizer.is_file():
            raise ConfigError(
                f"data.tokenizer {tokenizer} does not exist; make one with python -m dataload.tokenizer"
            )
        return Sources(tuple(shards.expand(config.train)), heldout, tokenizer, builtin=False)
    directory = Path(config.cache).expanduser() if config.cache else scenes.default_directory()
    say(
        f"data        the built-in corpus, in {directory} (drawn the first time; "
        "--data.train takes your own shards)"
    )
    paths = scenes.build(directory, size=min(image_size, LARGEST_SCENE))
    heldout = tuple(shards.expand(config.heldout)) if config.heldout else paths.heldout
    return Sources(paths.train, heldout, paths.tokenizer, builtin=True)


def load_tokenizer(path: Path, vocabulary: int) -> Tokenizer:
    """Raises ConfigError where the tokenizer has more pieces than the model has rows."""
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > vocabulary:
        raise ConfigError(
            f"the tokenizer {path} has {tokenizer.vocab_size} pieces, more than the model's vocabulary of "
            f"{vocabulary}; set --model.vocabulary {tokenizer.vocab_size}"
        )
    return tokenizer


def uncaptioned_fraction(config: PretrainConfig, captioned: int, uncaptioned: int, world_size: int) -> float:
    """Share of uncaptioned pictures in every batch of a run.

    What the configuration says, or else the data's own share. With several ranks it becomes a whole number of
    pictures per rank and micro-step: the contrastive loss gathers as many pairs from each rank.
    """
    wanted = config.data.uncaptioned_fraction
    if wanted is None:
        wanted = uncaptioned / (captioned + uncaptioned)
    size = micro_batch(config, world_size)
    if world_size == 1 or wanted in (0, 1) or size == 1:
        return wanted
    whole = min(max(round(wanted * size), 1), size - 1)
    if Fraction(str(wanted)) * size == whole:
        return wanted
    # The loader counts with exact decimals, rounded down: a hair more keeps every batch at this number.
    return whole / size if Fraction(str(whole / size)) == Fraction(whole, size) else whole / size + 1e-12


def loader_config(
    config: PretrainConfig, sources: Sources, world_size: int, device: str = "auto"
) -> LoaderConfig:
    """The training pipeline of one rank, whose model is on `device`."""
    data = config.data
    index = shards.index(sources.train, exclude=data.exclude)
    captioned = index.captioned[index.has("image")]
    pairs = int(captioned.sum())
    return LoaderConfig(
        shards=tuple(str(path) for path in sources.train),
        batch_size=micro_batch(config, world_size),
        image_size=config.model.image_size,
        text_length=config.model.text_length,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        flip=data.flip,
        interpolation=data.interpolation,
        color_jitter=data.color_jitter,
        uncaptioned_fraction=uncaptioned_fraction(config, pairs, len(captioned) - pairs, world_size),
        mim_ratio=data.mim_ratio,
        mlm_probability=data.mlm_probability,
        mlm_share=data.mlm_share,
        tokenizer_sampling=data.tokenizer_sampling,
        captions_per_image=data.captions_per_image,
        seed=config.seed,
        backend=data.backend,
        exclude=data.exclude,
        device=device,
        workers=data.workers,
        prefetch=data.prefetch,
        max_broken=data.max_broken,
        quarantine=str(Path(config.out) / "broken.jsonl"),
    )


def open_data(
    config: PretrainConfig, sources: Sources, rank: int, world_size: int, device: str = "auto"
) -> Data:
    """Open the training loader of one rank and the held-out set."""
    tokenizer = load_tokenizer(sources.tokenizer, config.model.vocabulary)
    settings = loader_config(config, sources, world_size, device)
    loader = Loader(settings, tokenizer, rank=rank, world_size=world_size)
    heldout = None
    if sources.heldout:
        paths = tuple(str(path) for path in sources.heldout)
        size, length = config.model.image_size, config.model.text_length
        heldout = EvalSet(
            paths, tokenizer, size, length, interpolation=settings.interpolation, workers=settings.workers
        )
    share = settings.uncaptioned_fraction or 0.0
    return Data(sources, tokenizer, loader, heldout, pairs=round(settings.batch_size * (1 - share)))
