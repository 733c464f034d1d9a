"""Segmentations of a text drawn at random, for subword regularisation, from a seed of one's own.

    unigram   of all segmentations one, in proportion to its probability to the power of alpha: forward filtering, backward
              sampling over the lattice of pieces (arXiv:1804.10959)
    BPE       each merge that is due is left out with probability alpha (BPE-dropout, arXiv:1910.13267)

SentencePiece draws them too, by the same rules, but 0.2.3 salts its random numbers anew in each process, whatever the seed, so
that no run could be repeated or resumed.
"""

from __future__ import annotations

import functools
import heapq
import math
import random
import re
from collections.abc import Iterator
from typing import Any

UNKNOWN_PENALTY = 10.0
"""So much less than the least likely piece is a character that no piece has, to SentencePiece."""
SPACE = "\u2581"
Arrived = tuple[tuple[tuple[int, ...], tuple[float, ...], float], ...]
"""For each place of a word: where the pieces that end there begin, the weights of all ways through each, and their sum"""


class Segmenter:
    """Of one SentencePiece model, unigram or BPE. Thread-safe."""

    def __init__(self, processor: Any) -> None:
        """processor: a sentencepiece.SentencePieceProcessor. Raises ValueError for models with nothing to draw (of words or
        characters), and for BPE with pieces that no merge makes (user-defined symbols)."""
        try:
            processor.encode("a", enable_sampling=True, alpha=0.5, nbest_size=-1)
        except RuntimeError as error:
            raise ValueError(
                f"this tokenizer's segmentations cannot be drawn at random ({error}); unigram and BPE models' can"
            ) from error
        self._normalize, self._unknown = processor.normalize, processor.unk_id()
        count = processor.get_piece_size()
        usable = [
            i
            for i in range(count)
            if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) or processor.is_unused(i))
        ]  # fmt: skip
        self._ids: dict[str, int] = {processor.id_to_piece(i): i for i in usable}
        self._scores = [processor.get_score(i) for i in range(count)]
        self._longest = max(map(len, self._ids), default=1)
        self._floor = min((self._scores[i] for i in usable), default=0.0) - UNKNOWN_PENALTY
        bytes_of = {processor.id_to_piece(i): i for i in range(count) if processor.is_byte(i)}
        self._bytes = [bytes_of[f"<0x{byte:02X}>"] for byte in range(256)] if len(bytes_of) == 256 else None
        try:  # only unigram models know the n best
            self.unigram = bool(processor.nbest_encode("a", nbest_size=1))
        except RuntimeError:
            self.unigram = False
        if not self.unigram and (odd := [piece for piece in self._ids if not self._is_merged(piece)]):
            raise ValueError(
                f"this BPE tokenizer has {len(odd)} pieces that no merge makes, such as {odd[0]!r} (user-defined symbols?); "
                "its segmentations cannot be drawn at random"
            )
        across = any(SPACE in piece.lstrip(SPACE) for piece in self._ids)
        self._words = re.compile(r".*" if across else f"{SPACE}*[^{SPACE}]*", re.DOTALL)
        """what is segmented by itself: a word with its space, unless pieces reach across spaces"""
        self._arrived = functools.lru_cache(1 << 16)(self._arrive)

    def __call__(self, text: str, alpha: float, seed: int) -> list[int]:
        """Ids of one segmentation; the same for the same arguments, everywhere."""
        draw = random.Random(int(seed)).random
        normal = self._normalize(text)
        if not self.unigram:
            return list(self._known(self._merged(normal, alpha, draw)))
        pieces = [piece for word in self._words.findall(normal) for piece in self._drawn(word, alpha, draw)]
        return list(self._known(pieces))

    def _is_merged(self, piece: str) -> bool:
        """Whether a piece is a character, or two pieces put together."""
        return len(piece) == 1 or any(
            (at == 1 or piece[:at] in self._ids) and (at == len(piece) - 1 or piece[at:] in self._ids)
            for at in range(1, len(piece))
        )

    def _known(self, pieces: list[str]) -> Iterator[int]:
        """Ids; what has none is spelled in bytes, or is unknown, once for all in a row."""
        last = None
        for piece in pieces:
            one = self._ids.get(piece)
            if one is not None:
                yield one
            elif self._bytes is not None:
                for byte in piece.encode("utf-8", "surrogatepass"):
                    yield self._bytes[byte]
            elif last != self._unknown:
                yield self._unknown
            last = self._unknown if one is None else one

    def _arrive(self, word: str, alpha: float) -> Arrived:
        """Forward filtering of one word."""
        ids, scores, end = self._ids, self._scores, len(word)
        starts: list[list[int]] = [[] for _ in range(end + 1)]
        weights: list[list[float]] = [[] for _ in range(end + 1)]
        ways = 0.0  # logarithm of the summed weights of all ways to `start`
        for start in range(end):
            if start:
                highest = max(weights[start])
                ways = highest + math.log(sum(math.exp(weight - highest) for weight in weights[start]))
            single = False
            for stop in range(start + 1, min(end, start + self._longest) + 1):
                one = ids.get(word[start:stop])
                if one is not None:
                    starts[stop].append(start)
                    weights[stop].append(ways + alpha * scores[one])
                    single |= stop == start + 1
            if not single:
                starts[start + 1].append(start)
                weights[start + 1].append(ways + alpha * self._floor)
        found = []
        for begins, logs in zip(starts, weights, strict=True):
            highest = max(logs, default=0.0)
            shares = tuple(math.exp(log - highest) for log in logs)
            found.append((tuple(begins), shares, sum(shares)))
        return tuple(found)

    def _drawn(self, word: str, alpha: float, draw: Any) -> list[str]:
        """Backward sampling of one word."""
        arrived, end, pieces = self._arrived(word, alpha), len(word), []
        while end:
            starts, shares, left = arrived[end]
            start = starts[-1]
            if len(starts) > 1:
                left *= draw()
                for candidate, share in zip(starts, shares, strict=True):
                    left -= share
                    if left < 0:
                        start = candidate
                        break
            pieces.append(word[start:end])
            end = start
        return pieces[::-1]

    def _merged(self, text: str, alpha: float, draw: Any) -> list[str]:
        """Merges in the order of their scores, the leftmost of equals first; one that is left out is not asked again."""
        pieces: list[str] = list(text)
        before, after = list(range(-1, len(text) - 1)), [*range(1, len(text)), -1]
        due: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                both = pieces[left] + pieces[right]
                if both in self._ids:
                    heapq.heappush(due, (-self._scores[self._ids[both]], left, right, both))

        for left in range(len(text) - 1):
            offer(left, left + 1)
        while due:
            _, left, right, both = heapq.heappop(due)
            if not pieces[left] or not pieces[right] or pieces[left] + pieces[right] != both:
                continue  # one of them was merged with another meanwhile
            if alpha and draw() < alpha:
                continue
            pieces[left], pieces[right] = both, ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [piece for piece in pieces if piece]
