"""What sampled captions are worth: CIDEr-D against the training captions of their pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dataload.annotated import Items
from dataload.images import mirror_caption
from dataload.tokenizer import Tokenizer
from models.aurora.model import Aurora
from models.generation import Generator
from models.tokens import EOS
from train.scores.captioning import regex_tokenize
from train.scores.cider import CiderD


class CiderReward:
    """Document frequencies are those of the whole training set, counted once. Words are split by the regular expression, not
    by Java's PTB tokenizer, which would start at every step."""

    def __init__(self, items: Items, tokenizer: Tokenizer, samples: int, prompt: Sequence[int] = ()) -> None:
        """samples: captions of each picture, at least 2. prompt: tokens that come before each."""
        self.tokenizer, self.samples, self.prompt = tokenizer, samples, tuple(prompt)
        self.references = [items.annotations(item).captions for item in items.items]
        """by the number of the item"""
        self.cider = CiderD([[regex_tokenize(text) for text in texts] for texts in self.references])

    def of(self, items: Sequence[int], mirrored: Sequence[bool]) -> CiderCritic:
        """The critic of a batch: the numbers of its items, and whether each is seen as in a mirror."""
        references = [
            [regex_tokenize(mirror_caption(text) if turned else text) for text in self.references[item]]
            for item, turned in zip(items, mirrored, strict=True)
        ]
        return CiderCritic(self, references)


class CiderCritic:
    """See `models.aurora.answering.Critic`."""

    def __init__(self, reward: CiderReward, references: Sequence[Sequence[str]]) -> None:
        """references: of each picture of the batch, its tokenised captions."""
        self.reward, self.references = reward, references
        self.samples, self.prompt = reward.samples, reward.prompt

    def speaker(self, model: Aurora) -> Generator:
        from train.generate.__main__ import KnownPieces

        return KnownPieces(model, self.reward.tokenizer)

    def rewards(self, captions: Sequence[Sequence[int]]) -> Tensor:
        decode = self.reward.tokenizer.decode
        texts = [regex_tokenize(decode([token for token in ids if token != EOS])) for ids in captions]
        theirs = [texts for texts in self.references for _ in range(self.samples)]
        return torch.from_numpy(self.reward.cider(texts, theirs)).float()
