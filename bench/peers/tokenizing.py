"""Tokenizing: captions to ids, one by one and as padded rows of a batch, beside Hugging Face's `tokenizers` with the
same model.

The model is trained here on generated text (words of syllables, as frequent as words are), and given to both: pieces,
scores and normalisation of the Unigram model, merges of the BPE one. The check before the clock: equal ids for every
text. What is counted is CPU seconds of the whole process, as `tokenizers` spreads a batch over all cores.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import measure
from bench.record import Accuracy, Row
from bench.subject import Absent, pair_rows, worst

MISSING = ""
try:
    from dataload.tokenizer import BOS, EOS, PAD, UNK, Tokenizer, train_tokenizer
except ImportError as error:
    MISSING = f"{error.name} is not installed"

TOKENIZER = "tokenizer"
TEXTS, WORDS, LENGTH, VOCABULARY = 512, 6000, 24, 6000
Encode = Callable[[list[str]], torch.Tensor | list[list[int]]]


@dataclass(frozen=True)
class TextCase:
    """`model_type` is "unigram" or "bpe"; `batch`: rows with BOS, EOS and padding instead of lists of ids."""

    model_type: str
    batch: bool

    @property
    def name(self) -> str:
        """ "unigram-batch"."""
        return f"{self.model_type}-{'batch' if self.batch else 'one-by-one'}"

    @property
    def shape(self) -> str:
        """For readers."""
        what = f"rows of {LENGTH} ids" if self.batch else "lists of ids"
        return f"{TEXTS} captions of 11 words to {what}, vocabulary of {VOCABULARY:,}"


@cache
def texts() -> tuple[str, ...]:
    """Captions of generated words, eleven in the mean; a few do not fit into a row."""
    rng = np.random.default_rng(0)
    syllables = [a + b + c for a in "bdfgklmnprstvw" for b in "aeiou" for c in ("", "n", "r", "s", "t")]
    words = ["".join(rng.choice(syllables, int(rng.integers(1, 5)))) for _ in range(WORDS)]
    shares = 1 / (np.arange(WORDS) + 3)
    lengths = rng.poisson(10, 12_000) + 1
    drawn = rng.choice(WORDS, int(lengths.sum()), p=shares / shares.sum())
    lines = np.split(drawn, np.cumsum(lengths)[:-1])
    return tuple(" ".join(words[word] for word in line).capitalize() + "." for line in lines)


@cache
def model(model_type: str) -> Tokenizer:
    """Trained once per process, in memory."""
    with tempfile.TemporaryDirectory(prefix="auroraio-bench-") as folder:
        return train_tokenizer(texts(), Path(folder) / "t.model", VOCABULARY, model_type=model_type)


def _ours(case: TextCase) -> Encode:
    tokenizer = model(case.model_type)
    if case.batch:
        return lambda some: tokenizer.encode_batch(some, LENGTH)
    return lambda some: [tokenizer.encode(text) for text in some]


def _theirs(case: TextCase) -> Encode:
    tokenizer = _hugging_face(case.model_type, case.batch)
    if case.batch:
        return lambda some: torch.tensor([one.ids for one in tokenizer.encode_batch(some)])
    return lambda some: [tokenizer.encode(text).ids for text in some]


def _hugging_face(model_type: str, batch: bool) -> Any:
    """`tokenizers` with our model. Raises Absent where it, transformers or protobuf is not installed."""
    try:
        protobuf: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
        from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
        from tokenizers import Tokenizer as HuggingFace
        from transformers.convert_slow_tokenizer import generate_merges
    except ImportError as error:
        raise Absent(f"tokenizers, transformers or protobuf is not installed ({error})") from None
    proto = protobuf.ModelProto()
    proto.ParseFromString(model(model_type).model)
    if model_type == "unigram":
        tokenizer = HuggingFace(models.Unigram([(p.piece, p.score) for p in proto.pieces], UNK, True))
    else:
        vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
        merges = generate_merges(vocabulary, {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL})
        tokenizer = HuggingFace(
            models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
        normalizers.Strip(),
        normalizers.Replace(Regex(" {2,}"), " "),
    ])  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if batch:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
        tokenizer.enable_truncation(LENGTH)
        tokenizer.enable_padding(length=LENGTH, pad_id=PAD, pad_token="<pad>")
    return tokenizer


PEERS: dict[str, Callable[[TextCase], Encode]] = {"auroraio": _ours, "tokenizers": _theirs}


def check(found: torch.Tensor | list[list[int]], expected: torch.Tensor | list[list[int]]) -> Accuracy:
    """Ids against others: any difference is too much."""
    mine, theirs = (x.tolist() if isinstance(x, torch.Tensor) else x for x in (found, expected))
    wrong = sum(one != other for one, other in zip(mine, theirs, strict=True))
    return Accuracy("out", float(wrong), 0.0, wrong / len(theirs), 0.0)


def solve(case: TextCase, *, budget: float, peers: Collection[str] | None = None) -> list[Row]:
    """Rows of both; see bench.subject.solve."""
    rows = [
        Row(
            TOKENIZER, case.name, "encode", name, "int64", case.shape, name == "auroraio", "absent", MISSING,
            items=TEXTS, unit="texts",
        )
        for name in PEERS if peers is None or name in peers
    ]  # fmt: skip
    if MISSING:
        return rows
    some = list(texts()[:TEXTS])
    running: dict[str, Encode] = {}
    expected = _ours(case)(some)
    for place, row in enumerate(rows):
        try:
            encode = PEERS[row.peer](case)
            verdict = check(encode(some), expected)
        except Absent as why:
            rows[place] = replace(row, note=str(why))
        except Exception as error:  # a peer that breaks is a result too
            rows[place] = replace(row, status="failed", note=f"{type(error).__name__}: {error}"[:400])
        else:
            good = verdict.good
            rows[place] = replace(
                row,
                status="ok" if good else "wrong",
                note="" if good else worst([verdict]),
                accuracy=(verdict,),
            )
            if good:
                running[row.peer] = encode
    calls = {name: [lambda encode=encode: encode(some)] for name, encode in running.items()}
    timed = measure.interleave(calls, device="cpu", budget=budget, clock="cpu") if calls else {}
    return pair_rows(
        [
            replace(row, clock=timed[row.peer][0], seconds=timed[row.peer][1]) if row.peer in timed else row
            for row in rows
        ]
    )
