"""What sampled captions are worth: CIDEr-D against the training captions of their pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dataload.annotated import Items
from dataload.images import mirror_caption
from dataload.tokenizer import Tokenizer
from models.base import Base
from models.generation import Generator
from models.tokens import EOS
from train.generate.writing import KnownPieces
from train.scores.captioning import regex_tokenize
from train.scores.cider import CiderD, Weighed

END = "<end>"


class CiderReward:
    """Document frequencies are those of the whole training set, counted once. Words are split by the regular expression, not
    by Java's PTB tokenizer, which would start at every step.

    The end of a caption counts as a word, in the references too: else what stops in the middle ("a man on a") gathers the
    frequent n-grams and is worth most (arXiv:1612.00563, appendix E)."""

    def __init__(self, items: Items, tokenizer: Tokenizer, samples: int, prompt: Sequence[int] = ()) -> None:
        """samples: captions of each picture, at least 2. prompt: tokens that come before each."""
        self.tokenizer, self.samples, self.prompt = tokenizer, samples, tuple(prompt)
        self.references = [items.annotations(item).captions for item in items.items]
        """by the number of the item"""
        self.cider = CiderD([[ended(text) for text in texts] for texts in self.references])

    def of(self, items: Sequence[int], mirrored: Sequence[bool]) -> CiderCritic:
        """The critic of a batch: the numbers of its items, and whether each is seen as in a mirror."""
        weigh = self.cider.weigh
        references = [
            [weigh(ended(mirror_caption(text) if turned else text)) for text in self.references[item]]
            for item, turned in zip(items, mirrored, strict=True)
        ]
        return CiderCritic(self, references)


def ended(caption: str) -> str:
    """The tokens of a whole caption, its end among them."""
    return f"{regex_tokenize(caption)} {END}"


class CiderCritic:
    """See `models.writing.Critic`."""

    def __init__(self, reward: CiderReward, references: Sequence[Sequence[Weighed]]) -> None:
        """references: of each picture of the batch, its captions as CIDEr sees them."""
        self.reward, self.references = reward, references
        self.samples, self.prompt = reward.samples, reward.prompt

    def speaker(self, model: Base) -> Generator:
        return KnownPieces(model, self.reward.tokenizer)

    def rewards(self, captions: Sequence[Sequence[int]]) -> Tensor:
        decode = self.reward.tokenizer.decode
        texts = [
            ended(decode(list(ids[:-1]))) if ids and ids[-1] == EOS else regex_tokenize(decode(list(ids)))
            for ids in captions
        ]
        theirs = [several for several in self.references for _ in range(self.samples)]
        return torch.from_numpy(self.reward.cider(texts, theirs)).float()
