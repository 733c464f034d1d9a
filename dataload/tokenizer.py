"""SentencePiece tokenizer with fixed special ids, and the command that trains one.

    python -m dataload.tokenizer --input "data/train-{000..011}.tar" --output out/tokenizer.model

Ids 0 to 4 are the special tokens of the whole project; the 256 byte pieces follow, so that any text, emoji
included, survives a round trip. The special tokens are SentencePiece *control* symbols: no text can produce
them, not even the text "<mask>".
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from dataload.files import write_atomically
from dataload.progress import Progress
from dataload.segmentation import Segmenter

PAD, UNK, BOS, EOS, MASK = 0, 1, 2, 3, 4
FIRST_PIECE = 5  # ids below are special; the first ordinary piece is the byte 0x00
MODEL_TYPES = ("unigram", "bpe")
# SentencePiece leaves out longer lines without a word; we count them. In bytes of UTF-8.
MAX_TEXT_BYTES = 4192

DESCRIPTION = """\
Trains a SentencePiece tokenizer with byte fallback on captions; no text is unknown to it.

  python -m dataload.tokenizer --input 'shards/train-*.tar' --output shards/tokenizer.model
  python -m dataload.tokenizer --input captions.txt --vocab-size 8000 --model-type bpe --lowercase --output bpe.model"""


class Tokenizer:
    """A SentencePiece model whose ids 0..4 are PAD, UNK, BOS, EOS, MASK. Thread-safe, picklable."""

    def __init__(self, model: bytes, name: str = "tokenizer.model") -> None:
        """`model` is the content of a SentencePiece model file; `name` only appears in errors.

        Raises ValueError for bytes that are no such model, or one with other special ids.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{name} is not a SentencePiece model ({len(model)} bytes): {error}") from error
        self.model = model
        self.sha = hashlib.sha256(model).hexdigest()
        """SHA-256 of the model file, in hexadecimal."""
        self.vocab_size: int = self._processor.get_piece_size()
        _check_special_ids(self._processor, name)
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        self.word_starts: np.ndarray = np.array([piece.startswith("\u2581") for piece in pieces])
        """bool [vocab_size]: True where the piece begins a word."""

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a model file that `train_tokenizer` (or `save`) wrote."""
        return cls(Path(path).read_bytes(), str(path))

    def save(self, path: str | Path) -> None:
        """Writes the model file, byte for byte what was loaded, in one atomic step."""
        write_atomically(Path(path), self.model)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes]]:
        return Tokenizer, (self.model,)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS and EOS. Blank text gives an empty list."""
        return self._processor.encode(text)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in one call of SentencePiece on one thread: about twice as fast as one by one."""
        return self._processor.encode(list(texts), num_threads=1) if len(texts) else []

    def sample(self, text: str, alpha: float, seed: int) -> list[int]:
        """Ids of one segmentation drawn at random (subword regularisation, arXiv:1804.10959; for BPE,
        BPE-dropout).

        `alpha` is the inverse temperature of a unigram model (small = wilder, 0.1 to 0.5 is usual) or the
        dropout probability of a BPE model. The same (text, alpha, seed) gives the same ids in any thread, process and
        order.
        """
        return self._segmenter(text, alpha, seed)

    @cached_property
    def _segmenter(self) -> Segmenter:
        return Segmenter(self._processor)

    def row(self, ids: Sequence[int], length: int) -> np.ndarray:
        """int64 [length]: BOS, the ids (cut to fit), EOS, then PAD."""
        row = np.zeros(length, dtype=np.int64)
        count = min(len(ids), length - 2)
        row[0] = BOS
        row[1 : count + 1] = ids[:count]
        row[count + 1] = EOS
        return row

    def encode_batch(self, texts: Sequence[str], length: int) -> torch.Tensor:
        """int64 [B, length], each row BOS, ids, EOS, PAD...; a long text is cut and keeps its EOS.

        Raises ValueError when `length` has no room for BOS, one token and EOS.
        """
        if length < 3:
            raise ValueError(f"length is {length}; BOS, one token and EOS need at least 3")
        room = length - 2
        ids = [row[:room] for row in self.encode_many(texts)]
        counts = np.array([len(row) for row in ids], dtype=np.int64)
        rows = np.zeros((len(ids), length), dtype=np.int64)
        rows[:, 0] = BOS
        # The places of the ids, row by row, are in the order of the ids one after the other.
        rows[:, 1:-1][np.arange(room) < counts[:, None]] = list(chain.from_iterable(ids))
        rows[np.arange(len(ids)), counts + 1] = EOS
        return torch.from_numpy(rows)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens leave no trace, except UNK, which is shown as ' \u2047 '.

        Raises IndexError for an id outside of the vocabulary.
        """
        return self._processor.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        """The piece of an id as SentencePiece spells it ('\u2581' marks the start of a word), for tables and
        reports."""
        return self._processor.id_to_piece(token)

    def is_word_start(self, token: int) -> bool:
        """Whether the piece begins a word. Special tokens and byte pieces do not."""
        return bool(self.word_starts[token])


def _check_special_ids(processor: sentencepiece.SentencePieceProcessor, name: str) -> None:
    size = processor.get_piece_size()
    found = {
        "pad": processor.pad_id(),
        "unk": processor.unk_id(),
        "bos": processor.bos_id(),
        "eos": processor.eos_id(),
        "mask": processor.piece_to_id("<mask>"),
    }
    wanted = {"pad": PAD, "unk": UNK, "bos": BOS, "eos": EOS, "mask": MASK}
    if found != wanted or size <= MASK or not processor.is_control(MASK):
        raise ValueError(
            f"{name} has the special ids {found} and {size} pieces; this project needs {wanted}, with <mask> "
            "as a control symbol. Train one with `python -m dataload.tokenizer`."
        )


def train_tokenizer(
    texts: Iterable[str],
    output: str | Path,
    vocab_size: int = 32000,
    *,
    model_type: str = "unigram",
    lowercase: bool = False,
    character_coverage: float = 0.9995,
    max_texts: int = 2_000_000,
    threads: int = 4,
) -> Tokenizer:
    """Trains a SentencePiece model with byte fallback on `texts` and writes it to `output` (atomically).

    When the corpus does not allow `vocab_size` pieces, the model gets the most that it allows: compare
    `Tokenizer.vocab_size` with what was asked. Deterministic: the same texts, in the same order, and the same
    options give the same file on any machine (that is why `threads` is a fixed number and not the core
    count). `lowercase` is stored in the model and applies wherever it encodes. From more than `max_texts`
    texts SentencePiece draws that many at random. Blank texts, and texts over MAX_TEXT_BYTES, are not used.

    Raises ValueError when there is no text, or when `vocab_size` cannot hold the 5 special tokens, the 256
    bytes and the characters that `character_coverage` asks for.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type is {model_type!r}; supported are {', '.join(MODEL_TYPES)}")
    used = (text for text in texts if text.strip() and len(text.encode("utf-8", "replace")) <= MAX_TEXT_BYTES)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=used,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=character_coverage,
            normalization_rule_name="nmt_nfkc_cf" if lowercase else "nmt_nfkc",
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            control_symbols=["<mask>"],
            max_sentence_length=MAX_TEXT_BYTES,
            input_sentence_size=max_texts,
            shuffle_input_sentence=True,
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from error
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(output), model.getvalue())
    return Tokenizer(model.getvalue(), str(output))


def _explain(message: str, vocab_size: int) -> str:
    """A reader's version of the few training errors that a corpus can cause."""
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return "there is no text to train a tokenizer on (every text was blank or too long)"
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if needed:
        return (
            f"a vocabulary of {vocab_size} is too small for this corpus: 5 special tokens, 256 bytes and its "
            f"characters need at least {needed[1]}. Ask for more pieces, or lower the character coverage."
        )
    return f"SentencePiece could not train: {message}"


class _Corpus:
    """Texts of the inputs in order, counted as they are read.

    An input is a .txt file (a text per line) or shards. OSError and ValueError for what cannot be read.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        # Here, so that a tokenizer can be loaded without the reader of shards.
        from dataload import shards

        self._files = [name for name in inputs if name.endswith(".txt")]
        for name in self._files:
            open(name).close()
        patterns = [name for name in inputs if not name.endswith(".txt")]
        self._index = shards.index(shards.expand(patterns)) if patterns else None
        self.texts = self.blank = self.too_long = 0

    def __iter__(self) -> Iterator[str]:
        with Progress("texts read") as progress:
            for text in self._read():
                progress.step()
                self.texts += 1
                if not text.strip():
                    self.blank += 1
                elif len(text.encode("utf-8", "replace")) > MAX_TEXT_BYTES:
                    self.too_long += 1
                yield text
        # SentencePiece says nothing while it trains; 32,000 pieces of a million captions take it minutes.
        print(f"read {self.texts:,} texts; training ...", file=sys.stderr, flush=True)

    def _read(self) -> Iterator[str]:
        for name in self._files:
            with open(name, encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    yield line.rstrip("\n")
        if self._index is not None:
            for sample in range(len(self._index)):
                yield from self._index.captions(sample)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dataload.tokenizer",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="shards (a tar, a folder, a glob, train-{000..011}.tar) or .txt files",
    )
    parser.add_argument(
        "--output", required=True, help="the model file to write, for example out/tokenizer.model"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=32000, help="pieces wanted, 5 special and 256 bytes included"
    )
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="unigram")
    parser.add_argument(
        "--lowercase", action="store_true", help="fold case, in training and wherever the model encodes"
    )
    parser.add_argument(
        "--character-coverage", type=float, default=0.9995, help="share of characters given a piece"
    )
    parser.add_argument(
        "--max-texts", type=int, default=2_000_000, help="draw this many texts from a larger corpus"
    )
    options = parser.parse_args(arguments)
    output = Path(options.output)
    try:
        if output.is_dir():
            raise IsADirectoryError(f"--output {output} is a directory; a file is needed")
        before = output.read_bytes() if output.is_file() else None
        corpus = _Corpus(options.input)
        tokenizer = train_tokenizer(
            corpus,
            output,
            options.vocab_size,
            model_type=options.model_type,
            lowercase=options.lowercase,
            character_coverage=options.character_coverage,
            max_texts=options.max_texts,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    unused = f"{corpus.blank} blank, {corpus.too_long} over {MAX_TEXT_BYTES} bytes"
    print(f"read {corpus.texts} texts; not used: {unused}")
    if tokenizer.vocab_size < options.vocab_size:
        print(
            f"the corpus allows no more than {tokenizer.vocab_size} pieces, fewer than the "
            f"{options.vocab_size} asked for: the tokenizer has {tokenizer.vocab_size}"
        )
    size, sha = tokenizer.vocab_size, tokenizer.sha[:12]
    print(f"wrote {output}: {options.model_type}, {size} pieces, sha256 {sha}")
    if before is not None:
        other = hashlib.sha256(before).hexdigest()[:12]
        same = before == tokenizer.model
        print("it was there before, byte for byte" if same else f"replaced sha256 {other}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
