"""Official caption scores: BLEU-1..4, METEOR, ROUGE-L, CIDEr, SPICE.

    found = score_captions({139: "a woman in a kitchen"}, {139: ["a woman stands in the dining area", ...]})
    found.scores["CIDEr"], found.reasons.get("SPICE"), found.tokenizer, found.per_image[139]["METEOR"]

CIDEr's weights come from the references that are scored: the mean over shards is not the score of the set, and that of
one image is 0. Gather everything (gather.py), then score once.

BLEU, ROUGE-L and CIDEr (which is CIDEr-D) are pycocoevalcap's. Captions are split by the PTB tokenizer, which needs Java;
without Java by a regular expression that comes close and says that it is not PTB. METEOR needs Java. SPICE also needs
jars that the operator provides. What cannot be scored is None, with the reason; it is never 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from train.scores.java import (
    PUNCTUATION,
    JavaError,
    find_java,
    meteor,
    missing_spice_jars,
    package_folder,
    ptb_tokenize,
    spice,
)
from train.scores.results_file import ResultsFile, ordered

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
TOKENIZERS = ("auto", "ptb", "regex", "none")
NOT_PTB = "regex (not PTB)"
ImageId = int | str

# The parts that PTB cuts off; words, with what may stand inside them; any other sign of its own.
_TOKEN = re.compile(r"n't\b|'(?:s|m|d|ll|re|ve)\b|[^\W_]+?(?=n't\b)|[^\W_]+(?:[-.,/&][^\W_]+)*|\S")


@dataclass(frozen=True)
class Plan:
    """What can be scored here, known before any model runs."""

    metrics: tuple[str, ...]
    """that were asked for"""
    tokenizer: str
    """ptb, regex, or none (the captions are tokens with spaces between them)"""
    java: str | None
    """path of java; None where nothing that is asked for needs it, or there is none"""
    spice_jars: Path | None
    reasons: dict[str, str]
    """metric -> why it will be None"""
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    may_change: bool = False
    """whether the regular expression takes the PTB tokenizer's place where that fails"""

    def __str__(self) -> str:
        able = [name for name in self.metrics if name not in self.reasons]
        lines = [f"scores: {', '.join(able) or 'none'}; tokenizer: {self.tokenizer}"]
        lines += [f"{name} will be null: {why}" for name, why in self.reasons.items()]
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set of captions, under the names of the official code."""

    scores: dict[str, float | None]
    reasons: dict[str, str]
    """metric -> why it is None"""
    per_image: dict[ImageId, dict[str, float]]
    """in the order of the ids; METEOR and SPICE only where they were scored"""
    tokenizer: str
    counts: dict[str, int]
    """images, references"""
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For a results file, without the single images."""
        return {
            "scores": self.scores, "reasons": self.reasons, "tokenizer": self.tokenizer, "counts": self.counts,
            "notes": list(self.notes), "versions": self.versions,
        }  # fmt: skip


def check(
    metrics: Sequence[str] = METRICS, *, tokenizer: str = "auto", spice_jars: Path | None = None
) -> Plan:
    """Looks for Java and jars before any compute is spent.

    tokenizer: auto (PTB where there is Java, else the regular expression), ptb, regex, or none. Raises ValueError for
    what is not known, for a tokenizer that was named and cannot run, and for a directory of jars that was named and lacks
    one; ImportError where pycocoevalcap is missing.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"no caption score is called {unknown[0]!r}; there are {', '.join(METRICS)}")
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"no tokenizer is called {tokenizer!r}; there are {', '.join(TOKENIZERS)}")
    package_folder()
    java: str | None = None
    said = ""
    if tokenizer in ("auto", "ptb") or {"METEOR", "SPICE"} & set(metrics):
        java, said = find_java()
    reasons, notes = {}, []
    chosen = {"auto": "ptb" if java else "regex"}.get(tokenizer, tokenizer)
    if chosen == "ptb" and java is None:
        raise ValueError(f"the PTB tokenizer needs Java: {said}")
    if tokenizer == "auto" and java is None:
        notes.append(f"captions are split by a regular expression, not by the PTB tokenizer: {said}")
    if "METEOR" in metrics and java is None:
        reasons["METEOR"] = f"it needs Java: {said}"
    if "SPICE" in metrics:
        lacking = missing_spice_jars(spice_jars)
        if lacking and spice_jars is not None:
            raise ValueError(f"SPICE: {lacking}")
        if lacking or java is None:
            reasons["SPICE"] = lacking or f"it needs Java: {said}"
    versions = {"pycocoevalcap": metadata.version("pycocoevalcap"), **({"java": said} if java else {})}
    may_change = tokenizer == "auto"
    return Plan(tuple(metrics), chosen, java, spice_jars, reasons, tuple(notes), versions, may_change)


@dataclass(frozen=True)
class Split:
    """Captions as tokens with spaces between them, in the order of the ids."""

    ids: list[ImageId]
    candidates: list[str]
    """one of each image"""
    references: list[list[str]]

    def saying(self, candidates: Sequence[str]) -> Split:
        """The same images with other captions, which are tokens already."""
        return Split(self.ids, list(candidates), self.references)


class CaptionScorer:
    """Scores sets by one plan."""

    def __init__(self, plan: Plan | None = None) -> None:
        self.plan = plan or check()

    def score(
        self, candidates: Mapping[ImageId, str], references: Mapping[ImageId, Sequence[str]]
    ) -> CaptionScores:
        """Scores one caption per image against the image's references. A score whose Java program fails is None, with the
        reason. ValueError where ids do not fit, or an image has no reference; JavaError where a PTB tokenizer fails that
        was asked for by name."""
        return self.score_split(self.split(candidates, references))

    def split(self, candidates: Mapping[ImageId, str], references: Mapping[ImageId, Sequence[str]]) -> Split:
        """All captions by one call of the tokenizer, which takes half a second to start. Errors as of `score`."""
        ids = _fitting(candidates, references)
        found = self.tokenize([candidates[i] for i in ids] + [text for i in ids for text in references[i]])
        texts = iter(found[len(ids) :])
        return Split(ids, found[: len(ids)], [[next(texts) for _ in references[i]] for i in ids])

    def score_split(self, split: Split) -> CaptionScores:
        """The scores of what `split` gave."""
        reasons = dict(self.plan.reasons)
        ids, mine, theirs = split.ids, split.candidates, split.references
        scores: dict[str, float | None] = dict.fromkeys(self.plan.metrics)
        per_image: dict[ImageId, dict[str, float]] = {i: {} for i in ids}
        found = self._measure(mine, theirs)
        for name, program in (("METEOR", self._meteor), ("SPICE", self._spice)):
            if name in scores and name not in reasons:
                try:
                    found[name] = program(mine, theirs)
                except (JavaError, OSError) as error:  # minutes of compute may lie behind: the others stand
                    reasons[name] = f"it failed: {error}"
        for name, (value, each) in found.items():
            if name in scores:
                scores[name] = value
                for number, one in zip(ids, each, strict=True):
                    per_image[number][name] = one
        counts = {"images": len(ids), "references": sum(map(len, theirs))}
        notes = list(self.plan.notes)
        if len(ids) == 1 and "CIDEr" in scores:
            notes.append("CIDEr of one image is 0 by its definition: its weights come from the set")
        tokenizer = NOT_PTB if self.plan.tokenizer == "regex" else self.plan.tokenizer
        return CaptionScores(scores, reasons, per_image, tokenizer, counts, tuple(notes), self.plan.versions)

    def tokenize(self, captions: Sequence[str]) -> list[str]:
        """Captions as tokens with spaces between them, one line each, whatever white space is in them."""
        lines = [" ".join(caption.split()) for caption in captions]
        match self.plan.tokenizer:
            case "ptb":
                assert self.plan.java is not None
                try:
                    return ptb_tokenize(self.plan.java, lines)
                except (JavaError, OSError) as error:
                    if not self.plan.may_change:
                        raise
                    note = f"captions are split by a regular expression, as the PTB tokenizer failed: {error}"
                    self.plan = replace(self.plan, tokenizer="regex", notes=(*self.plan.notes, note))
                    return self.tokenize(captions)
            case "regex":
                return [regex_tokenize(line) for line in lines]
            case _:
                return lines

    def _measure(self, mine: list[str], theirs: list[list[str]]) -> dict[str, tuple[float, list[float]]]:
        """Score and scores per image, of all that needs no Java."""
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

        res = {place: [text] for place, text in enumerate(mine)}
        gts = dict(enumerate(theirs))
        wanted = set(self.plan.metrics)
        found: dict[str, tuple[float, list[float]]] = {}
        if any(name.startswith("Bleu") for name in wanted):
            values, each = Bleu(4).compute_score(gts, res, verbose=0)
            found |= {f"Bleu_{n + 1}": (float(values[n]), list(map(float, each[n]))) for n in range(4)}
        for name, scorer in (("ROUGE_L", Rouge), ("CIDEr", Cider)):
            if name in wanted:
                value, single = scorer().compute_score(gts, res)
                found[name] = (float(value), list(map(float, single)))
        return found

    def _meteor(self, mine: list[str], theirs: list[list[str]]) -> tuple[float, list[float]]:
        assert self.plan.java is not None
        return meteor(self.plan.java).score(mine, theirs)

    def _spice(self, mine: list[str], theirs: list[list[str]]) -> tuple[float, list[float]]:
        assert self.plan.java is not None and self.plan.spice_jars is not None
        # SPICE parses sentences by itself, so it gets them as the official code gives them: tokenised
        found = spice(
            self.plan.java, self.plan.spice_jars,
            {str(place): text for place, text in enumerate(mine)},
            {str(place): several for place, several in enumerate(theirs)},
        )  # fmt: skip
        return sum(found.values()) / len(found), [found[str(place)] for place in range(len(mine))]


def score_captions(
    candidates: Mapping[ImageId, str], references: Mapping[ImageId, Sequence[str]], plan: Plan | None = None
) -> CaptionScores:
    """Scores one set; `plan` is what `check` found (None: everything that can be scored here)."""
    return CaptionScorer(plan).score(candidates, references)


def regex_tokenize(text: str) -> str:
    """Nearly what the PTB tokenizer gives, without Java: small letters, "'s" and "n't" cut off, punctuation dropped."""
    found = _TOKEN.findall(text.lower())
    return " ".join(word for word in found if word not in PUNCTUATION and word not in '()[]{}"')


def _fitting(candidates: Mapping[ImageId, str], references: Mapping[ImageId, Sequence[str]]) -> list[ImageId]:
    """The ids, sorted: sums do not depend on who gathered them."""
    if not candidates:
        raise ValueError("there are no captions to score")
    without = [i for i in candidates if i not in references]
    unsaid = [i for i in references if i not in candidates]
    if without or unsaid:
        first = f"; the first is {(without or unsaid)[0]!r}"
        raise ValueError(
            f"captions and references do not fit: {len(without):,} of {len(candidates):,} captions have no references, "
            f"{len(unsaid):,} of {len(references):,} images have no caption{first}"
        )
    if empty := [i for i in candidates if not any(text.strip() for text in references[i])]:
        raise ValueError(
            f"{len(empty):,} images have no reference that is not blank; the first is {empty[0]!r}"
        )
    return ordered(candidates)


# --- the official results file -------------------------------------------------------------------------------

RESULTS = ResultsFile(
    "results file of COCO captions",
    "image_id",
    "caption",
    '[{"image_id": 139, "caption": "..."}]',
    "images have more than one caption",
)
write_results, read_results = RESULTS.write, RESULTS.read
