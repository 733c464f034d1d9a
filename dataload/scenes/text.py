"""What a generated scene holds, which scenes are held out, and the true captions of a scene.

A scene is a background and one or two objects; an object is a shape, a color, a texture, a size and one of
five places. Everything here is plain Python over words; `dataload.scenes.draw` turns a scene into pixels and
`dataload.scenes` into shards.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

# Canonical name -> the words that captions use for it (the canonical name is the first of them).
COLORS: dict[str, tuple[str, ...]] = {
    "red": ("red",),
    "green": ("green",),
    "blue": ("blue",),
    "yellow": ("yellow",),
    "purple": ("purple",),
    "orange": ("orange",),
    "black": ("black",),
    "brown": ("brown",),
}
SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("circle",),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross",),
    "ring": ("ring",),
}
TEXTURES: dict[str, tuple[str, ...]] = {
    "solid": ("solid", "plain"),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
}
SIZES: dict[str, tuple[str, ...]] = {"small": ("small", "little"), "large": ("large", "big")}
# "left" and "right" occur nowhere but in places, so that a caption with the two swapped is true of the mirrored picture
# (dataload.images.mirror_caption).
PLACES: dict[str, tuple[str, ...]] = {
    "top left": ("top left", "upper left"),
    "top right": ("top right", "upper right"),
    "center": ("center", "middle"),
    "bottom left": ("bottom left", "lower left"),
    "bottom right": ("bottom right", "lower right"),
}
THIRDS: dict[str, tuple[int, int]] = {
    "top left": (0, 0), "top right": (0, 2), "center": (1, 1), "bottom left": (2, 0), "bottom right": (2, 2)
}  # fmt: skip
"""Row and column of a place where the picture is cut into three by three."""

# No background shares its word with an object color: words_of() must not mistake one for the other.
BACKGROUNDS: tuple[str, ...] = ("gray", "pink", "tan", "mint", "sky")

TEXTURE_NOUNS: dict[str, str] = {"striped": "with stripes", "dotted": "with dots"}
CAPTIONS_PER_SCENE = 5
MAX_WORDS = 22  # words and commas of a caption; each is one SentencePiece token, and bos and eos make 24
HELDOUT_SHARE = 0.1  # of the (shape, color, texture) triples
TWO_OBJECTS = 0.2  # share of the scenes that have two objects

Triple = tuple[str, str, str]


@dataclass(frozen=True)
class SceneObject:
    """One object; every field is a canonical name."""

    shape: str
    color: str
    texture: str
    size: str
    place: str

    @property
    def triple(self) -> Triple:
        """(shape, color, texture): the combination that is either trained on or held out."""
        return self.shape, self.color, self.texture


@dataclass(frozen=True)
class Scene:
    """A background and one or two objects in reading order of their places, so that equal scenes compare
    equal."""

    background: str
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class Claim:
    """What one caption says: per object its attributes (None = not said), and the background (None = not
    said)."""

    background: str | None
    objects: tuple[tuple[str, str, str | None, str | None, str | None], ...]

    def true_of(self, scene: Scene) -> bool:
        """Whether all that is said holds in `scene`, which may hold more than is said."""
        if self.background not in (None, scene.background):
            return False
        pairings = itertools.permutations(scene.objects, len(self.objects))
        return any(all(map(_holds, self.objects, pairing)) for pairing in pairings)


def _holds(said: tuple[str | None, ...], item: SceneObject) -> bool:
    facts = (item.shape, item.color, item.texture, item.size, item.place)
    return all(word is None or word == fact for word, fact in zip(said, facts, strict=True))


@cache
def heldout_triples() -> frozenset[Triple]:
    """The (shape, color, texture) triples that no training picture contains: 14 of 144, whatever the seed of
    a build.

    Taken one by one, each time a triple whose shape, color and texture are held out least so far, so that every
    attribute stays common in training; a hash of the names decides between equals.
    """
    triples = list(itertools.product(SHAPES, COLORS, TEXTURES))
    triples.sort(key=lambda triple: hashlib.blake2b(" ".join(triple).encode()).digest())
    taken: list[Triple] = []
    names = (SHAPES, COLORS, TEXTURES)
    while len(taken) < int(HELDOUT_SHARE * len(names[0]) * len(names[1]) * len(names[2])):

        def held(triple: Triple) -> float:
            return max(
                sum(other[axis] == triple[axis] for other in taken) * len(names[axis]) for axis in range(3)
            )

        taken.append(min((triple for triple in triples if triple not in taken), key=held))
    return frozenset(taken)


@cache
def split_triples(heldout: bool) -> tuple[Triple, ...]:
    """The held-out triples, or all others."""
    held = heldout_triples()
    return tuple(
        triple for triple in itertools.product(SHAPES, COLORS, TEXTURES) if (triple in held) == heldout
    )


def sample_scene(rng: random.Random, *, heldout: bool) -> Scene:
    """A random scene: all its objects are held-out triples, or none is."""
    count = 2 if rng.random() < TWO_OBJECTS else 1
    sizes = [rng.choice(tuple(SIZES)) for _ in range(count)]
    places = _places(rng, count)
    triples = [rng.choice(split_triples(heldout)) for _ in range(count)]
    objects = [
        SceneObject(*triple, size, place) for triple, size, place in zip(triples, sizes, places, strict=True)
    ]
    objects.sort(key=lambda item: tuple(PLACES).index(item.place))
    return Scene(rng.choice(BACKGROUNDS), tuple(objects))


def _places(rng: random.Random, count: int) -> list[str]:
    """One object stands anywhere, two in different corners: there even two large ones cannot touch."""
    return rng.sample([place for place in PLACES if count == 1 or place != "center"], count)


def write_captions(scene: Scene, rng: random.Random, unique: Callable[[Claim], bool]) -> list[str]:
    """Five different true captions of `scene`.

    The first two say everything; each of the others leaves out up to two of size, texture, place and
    background, unless `unique` says that what is left would also be true of another picture: then it says
    everything too.
    """
    captions: list[str] = []
    plans: list[frozenset[str]] = [frozenset(), frozenset()]
    plans += rng.sample(_PARTIAL, CAPTIONS_PER_SCENE - len(plans))
    for left_out in plans:
        if left_out and not unique(claim_of(scene, left_out)):
            left_out = frozenset()
        caption = _caption(scene, left_out, rng)
        while caption in captions:
            caption = _caption(scene, left_out, rng)
        captions.append(caption)
    return captions


_PARTIAL: list[frozenset[str]] = [
    frozenset(words)
    for words in (
        ("background",),
        ("size",),
        ("texture",),
        ("place",),
        ("background", "size"),
        ("background", "texture"),
        ("size", "texture"),
    )
]


def claim_of(scene: Scene, left_out: frozenset[str] = frozenset()) -> Claim:
    """What a caption of `scene` claims that leaves out the attributes of these names."""
    return Claim(
        None if "background" in left_out else scene.background,
        tuple(
            (
                item.shape,
                item.color,
                None if "texture" in left_out else item.texture,
                None if "size" in left_out else item.size,
                None if "place" in left_out else item.place,
            )
            for item in scene.objects
        ),
    )


def _caption(scene: Scene, left_out: frozenset[str], rng: random.Random) -> str:
    """One random wording of at most MAX_WORDS words and commas."""
    while True:
        place_first = rng.random() < 0.25
        phrases = [phrase(item, left_out, place_first, rng) for item in scene.objects]
        rng.shuffle(phrases)
        text = rng.choice((" and ", ", ")).join(phrases)
        if "background" not in left_out:
            ground = scene.background
            text = rng.choice(
                (
                    f"{text} on {ground}",
                    f"on {ground} {text}",
                    f"{text}, {ground} background",
                    f"{ground} background with {text}",
                )
            )
        elif not place_first and rng.random() < 0.3:
            text = rng.choice(("there is ", "a picture of ")) + text
        if len(re.findall(r"\w+|,", text)) <= MAX_WORDS:
            return text


def phrase(item: SceneObject, left_out: frozenset[str], place_first: bool, rng: random.Random) -> str:
    """One object in words: "a small striped red ring at top left"; `left_out` names what is not said."""
    color, shape = rng.choice(COLORS[item.color]), rng.choice(SHAPES[item.shape])
    before, after = [color], ""
    if "texture" not in left_out:
        if item.texture in TEXTURE_NOUNS and rng.random() < 0.25:
            after = " " + TEXTURE_NOUNS[item.texture]
        else:
            before.insert(rng.randrange(2), rng.choice(TEXTURES[item.texture]))
    if "size" not in left_out:
        before.insert(0, rng.choice(SIZES[item.size]))
    thing = f"{' '.join(before)} {shape}{after}"
    # "orange" is the only word that would want "an"; it may stand first.
    thing = f"{'an' if thing.startswith('o') else 'a'} {thing}"
    if "place" in left_out:
        return thing
    place = rng.choice(PLACES[item.place])
    if place_first:
        return f"at {place} {thing}"
    return f"{thing} {rng.choice(('at', 'in the'))} {place}"


def words_of(caption: str) -> tuple[set[str], set[str]]:
    """The canonical names of the (colors, shapes) that a caption names; synonyms count as the name they stand
    for."""
    words = set(re.findall(r"[a-z]+", caption.lower()))
    colors = {name for name, synonyms in COLORS.items() if words.intersection(synonyms)}
    shapes = {name for name, synonyms in SHAPES.items() if words.intersection(synonyms)}
    return colors, shapes
