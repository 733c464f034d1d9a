"""Mixtures by name: which kinds of pairs there are, and in what proportion they are read."""

from __future__ import annotations

from collections.abc import Mapping

from dataload.multimodal.config import SourceConfig

PAIRS: dict[str, tuple[str, ...]] = {
    "image-text": ("image", "text"),
    "video-text": ("video", "audio", "text"),
    "audio-text": ("audio", "text"),
}
"""What is read of each kind of pair: the first and the last are needed; a video's sound comes along where there is some."""

MIXTURES: dict[str, dict[str, float]] = {
    "mm-align": {"image-text": 2.5e9, "video-text": 0.8e9, "audio-text": 0.3e9},
    "equal": {"image-text": 1.0, "video-text": 1.0, "audio-text": 1.0},
}
"""Pairs of each kind by the name of the mixture: "mm-align" is MM-Align-2.0's 2.5 : 0.8 : 0.3 billion."""


def mixture(
    name: str, shards: Mapping[str, tuple[str, ...]], weights: Mapping[str, float] | None = None
) -> dict[str, SourceConfig]:
    """The sources of a mixture over your own shards, for `MixtureConfig`.

    shards: by the kind of pair, "image-text", "video-text", "audio-text"; kinds without shards are left out, and the
    others keep their proportion. weights: in place of the mixture's own, for some kinds. Raises ValueError for an unknown
    mixture or kind, and without any shards.
    """
    if name not in MIXTURES:
        raise ValueError(f"no mixture is called {name!r}; there are {', '.join(MIXTURES)}")
    if unknown := sorted({*shards, *(weights or {})} - set(PAIRS)):
        raise ValueError(f"no kind of pair is called {unknown[0]!r}; there are {', '.join(PAIRS)}")
    parts = MIXTURES[name] | dict(weights or {})
    found = {
        kind: SourceConfig(
            tuple(shards[kind]), weight=parts[kind], modalities=read, needs=(read[0], read[-1])
        )
        for kind, read in PAIRS.items()
        if shards.get(kind)
    }
    if not found:
        raise ValueError(f"no shards were given for any of {', '.join(PAIRS)}")
    return found
