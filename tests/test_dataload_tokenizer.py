from __future__ import annotations

import hashlib
import io
import pickle
import random
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece

from dataload import tokenizer as module
from dataload.segmentation import Segmenter
from dataload.tokenizer import BOS, EOS, MASK, PAD, UNK, Tokenizer, main, train_tokenizer

ROOT = Path(__file__).absolute().parent.parent
NOUNS = "dog cat horse boy girl woman man bicycle ball surfer snowboarder".split()
VERBS = "runs jumps sleeps climbs watches follows".split()
PLACES = "in the park, on a grassy hill; near the water. under an old bridge! behind Kate's house".split(" ")


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        f"A {rng.choice(NOUNS)} {rng.choice(VERBS)} {' '.join(rng.sample(PLACES, 4))}" for _ in range(count)
    ]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(sentences(400), path, 340, model_type=request.param)


@pytest.mark.parametrize(
    "text",
    [
        "A dog runs near the water.",
        "Schnee fällt, 7 Kühe",
        "日本語のテキスト",
        "ok 👍🏽 👩‍👩‍👧 ❤️",
        "x^2 <b>&amp;</b> \\n",
        "a",
    ],
)
def test_round_trip_of_any_text(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert UNK not in ids and min(ids) > MASK
    assert trained.decode(ids) == text


def test_emoji_becomes_its_utf8_bytes(trained: Tokenizer) -> None:
    pieces = [trained.piece(token) for token in trained.encode("😀")]
    assert pieces[-4:] == [f"<0x{byte:02X}>" for byte in "😀".encode()]


def test_special_ids_and_what_text_cannot_do(trained: Tokenizer) -> None:
    assert [trained.piece(i) for i in range(5)] == ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    text = "<mask> <s> </s> <pad> <unk>"
    ids = trained.encode(text)
    assert not {PAD, BOS, EOS, MASK} & set(ids)
    assert trained.decode(ids) == text


def test_encode_batch(trained: Tokenizer) -> None:
    short, long = "a dog", " ".join(["a dog runs"] * 10)
    batch = trained.encode_batch([short, long, ""], 8)
    assert batch.shape == (3, 8) and str(batch.dtype) == "torch.int64"
    ids = trained.encode(short)
    assert batch[0].tolist() == [BOS, *ids, EOS] + [PAD] * (6 - len(ids))
    assert batch[1].tolist() == [BOS, *trained.encode(long)[:6], EOS]
    assert batch[2].tolist() == [BOS, EOS] + [PAD] * 6
    assert trained.decode(batch[0].tolist()) == short
    assert trained.encode_batch([], 8).shape == (0, 8)
    with pytest.raises(ValueError, match="length is 2"):
        trained.encode_batch(["a"], 2)


def test_word_starts_split_a_caption_into_its_words(trained: Tokenizer) -> None:
    text = "A snowboarder follows 👍 Kate's old bicycle"
    words: list[list[int]] = []
    for token in trained.encode(text):
        if trained.is_word_start(token):
            words.append([])
        words[-1].append(token)
    assert [trained.decode(word) for word in words] == text.split()
    assert not any(trained.is_word_start(token) for token in range(5 + 256))


def test_ids_outside_of_the_vocabulary_are_refused(trained: Tokenizer) -> None:
    with pytest.raises(IndexError):
        trained.decode([trained.vocab_size])


def test_sampling_depends_on_the_seed_alone(trained: Tokenizer) -> None:
    texts = sentences(20, seed=1)
    expected = [trained.sample(text, 0.2, seed) for seed, text in enumerate(texts)]
    assert [trained.decode(ids) for ids in expected] == texts
    assert any(ids != trained.encode(text) for ids, text in zip(expected, texts, strict=True))
    assert len({tuple(trained.sample(texts[0], 0.2, seed)) for seed in range(20)}) > 1
    results: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:  # other orders, at the same time
        order = list(range(20))
        random.Random(number).shuffle(order)
        drawn = {seed: trained.sample(texts[seed], 0.2, seed) for seed in order}
        results[number] = [drawn[seed] for seed in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[number] == expected for number in range(4))


def test_sampling_is_the_same_in_another_process(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "t.model")
    code = (
        f"from dataload.tokenizer import Tokenizer; t = Tokenizer.load({str(tmp_path / 't.model')!r})\n"
        "print([t.sample('A dog runs near the water', 0.2, seed) for seed in range(30)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    expected = [trained.sample("A dog runs near the water", 0.2, seed) for seed in range(30)]
    assert done.stdout == f"{expected}\n"


def test_the_extremes_of_sampling_are_the_best_segmentation(trained: Tokenizer) -> None:
    """SentencePiece's own: by a unigram model in the limit of large alpha, by BPE without dropout."""
    segmenter = Segmenter(trained._processor)
    sure = 1000.0 if segmenter.unigram else 0.0
    texts = [*sentences(60, seed=2), "", "  ", "日本語 ✨ ok  x", "naïve Ünï", "a\u0000b", "ﬁn ½"]
    for text in texts:
        assert segmenter(text, sure, 0) == trained.encode(text), text
    plain = io.BytesIO()  # without bytes to fall back on: unknown characters in a row are one unknown
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(200)), model_writer=plain, vocab_size=120, hard_vocab_limit=False,
        model_type="unigram" if segmenter.unigram else "bpe",
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=plain.getvalue())
    assert processor.encode("dog 日本 ✨x").count(processor.unk_id()) == 2
    assert Segmenter(processor)("dog 日本 ✨x", sure, 0) == processor.encode("dog 日本 ✨x")


def test_segmentations_are_as_frequent_as_sentencepieces(trained: Tokenizer) -> None:
    """Of two samples of 8,000 from one distribution the frequencies differ as SentencePiece's own two do."""
    text, count = "A snowboarder near Kate", 8000
    alpha, other = (0.08, 0.2) if Segmenter(trained._processor).unigram else (0.3, 0.5)
    draws = {"enable_sampling": True, "alpha": alpha, "nbest_size": -1}
    theirs, again = (
        Counter(tuple(trained._processor.encode(text, **draws)) for _ in range(count)) for _ in range(2)
    )
    ours = Counter(tuple(trained.sample(text, alpha, seed)) for seed in range(count))

    def distance(a: Counter[tuple[int, ...]], b: Counter[tuple[int, ...]]) -> float:
        return sum(abs(a[k] - b[k]) for k in a.keys() | b.keys()) / (2 * count)

    assert len(ours) > 5, ours
    assert distance(ours, theirs) < 1.5 * distance(theirs, again) + 0.01
    others = Counter(tuple(trained.sample(text, other, seed)) for seed in range(count))
    assert distance(others, theirs) > 2 * distance(theirs, again) + 0.01  # the measure sees a difference


def test_models_with_nothing_to_draw_are_refused() -> None:
    """Words, and BPE with a symbol that no merge makes; of a unigram model symbols are pieces like others."""

    def model(kind: str, **options: object) -> sentencepiece.SentencePieceProcessor:
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences(200)), model_writer=written, vocab_size=110, hard_vocab_limit=False,
            model_type=kind, **options,
        )  # fmt: skip
        return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())

    with pytest.raises(ValueError, match="cannot be drawn at random .* unigram and BPE"):
        Segmenter(model("word"))
    with pytest.raises(ValueError, match=r"1 pieces that no merge makes, such as '<img>'"):
        Segmenter(model("bpe", user_defined_symbols=["<img>"]))
    across = model("unigram", split_by_whitespace=False)
    text = "A dog runs near the water"
    assert Segmenter(across)(text, 1000.0, 0) == across.encode(text)


def test_files(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "copy.model"
    trained.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.sha == hashlib.sha256(path.read_bytes()).hexdigest() == trained.sha
    assert loaded.vocab_size == trained.vocab_size
    text = "A dog runs"
    assert loaded.encode(text) == pickle.loads(pickle.dumps(trained)).encode(text) == trained.encode(text)  # noqa: S301
    assert [file.name for file in tmp_path.iterdir()] == ["copy.model"]
    # and SentencePiece itself reads the file the same way
    assert sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(text) == trained.encode(text)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_is_deterministic(model_type: str, tmp_path: Path) -> None:
    shas = {
        train_tokenizer(sentences(300), tmp_path / f"{run}.model", 330, model_type=model_type).sha
        for run in range(3)
    }
    assert len(shas) == 1
    assert (
        train_tokenizer(sentences(300, 1), tmp_path / "other.model", 330, model_type=model_type).sha
        not in shas
    )


def test_lowercase_is_part_of_the_model(tmp_path: Path) -> None:
    folded = train_tokenizer(sentences(200), tmp_path / "a.model", 330, lowercase=True)
    assert folded.decode(folded.encode("A Dog RUNS")) == "a dog runs"


def test_foreign_models_and_garbage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(b"garbage")
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "none.model")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(200)), model_writer=model, vocab_size=60, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"'pad': -1.*needs \{'pad': 0"):
        Tokenizer(model.getvalue(), "foreign.model")


def test_training_errors_say_what_is_wrong(tmp_path: Path) -> None:
    for texts in ([], ["", "  \n"], ["x" * (module.MAX_TEXT_BYTES + 1)]):
        with pytest.raises(ValueError, match="no text"):
            train_tokenizer(texts, tmp_path / "t.model", 300)
    # 5 special tokens, 256 bytes, the space mark and three letters
    with pytest.raises(ValueError, match="100 is too small.* at least 265"):
        train_tokenizer(["abc cab"], tmp_path / "t.model", 100)
    with pytest.raises(ValueError, match="'word'; supported are unigram, bpe"):
        train_tokenizer(["abc"], tmp_path / "t.model", 300, model_type="word")
    assert not list(tmp_path.iterdir())


def test_command_on_text_says_when_the_corpus_allows_fewer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "captions.txt", tmp_path / "out" / "tokenizer.model"
    text.write_text("\n".join([*sentences(300), "", "y" * 5000]), encoding="utf-8")
    assert main(["--input", str(text), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    size = Tokenizer.load(output).vocab_size
    assert 300 < size < 32000
    assert f"allows no more than {size} pieces, fewer than the 32000 asked for" in printed
    assert "read 302 texts; not used: 1 blank, 1 over 4192 bytes" in printed
    # Exactly the largest: what was reached can be asked for, and one more is again cut to it.
    for asked in (size, size + 1):
        assert main(["--input", str(text), "--output", str(output), "--vocab-size", str(asked)]) == 0
        assert Tokenizer.load(output).vocab_size == size
        assert ("allows no more" in capsys.readouterr().out) == (asked > size)


def test_command_says_what_it_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, output = tmp_path / "captions.txt", tmp_path / "tokenizer.model"
    text.write_text("\n".join(sentences(300)), encoding="utf-8")
    printed = []
    for size in ("400", "400", "310"):
        assert main(["--input", str(text), "--output", str(output), "--vocab-size", size]) == 0
        printed.append(capsys.readouterr().out)
        if size == "400":
            before = Tokenizer.load(output).sha[:12]
    assert "there before" not in printed[0] and "replaced" not in printed[0]
    assert "there before, byte for byte" in printed[1]
    assert f"replaced sha256 {before}" in printed[2]


def test_command_on_shards_reads_all_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "0.jpg": b"",
        "0.txt": b"zebra zebra",
        "1.jpg": b"",
        "1.json": b'{"captions": ["quagga", "okapi"]}',
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    output = tmp_path / "tokenizer.model"
    assert main(["--input", str(tmp_path), "--output", str(output), "--vocab-size", "400"]) == 0
    assert "read 3 texts" in capsys.readouterr().out
    pieces = {Tokenizer.load(output).piece(token) for token in range(261, Tokenizer.load(output).vocab_size)}
    assert set("zebraquggokapi") <= set("".join(pieces))


def test_command_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "t.model")
    assert main(["--input", str(tmp_path / "none.txt"), "--output", output]) == 2
    assert main(["--input", str(tmp_path / "none.tar"), "--output", output]) == 2
    assert main(["--input", str(tmp_path / "none.tar"), "--output", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert "none.txt" in errors and "no shard at" in errors and "is a directory" in errors
    assert "Traceback" not in errors


def test_many_at_once_are_the_same_as_one_by_one(trained: Tokenizer) -> None:
    texts = [*sentences(50, seed=3), "", "日本語 👍", "  "]
    assert trained.encode_many(texts) == [trained.encode(text) for text in texts]
    assert (
        trained.encode_many(tuple(texts[:3])) == trained.encode_many(texts)[:3]
        and trained.encode_many([]) == []
    )
    rows = trained.encode_batch(texts, 9)
    assert rows.tolist() == [trained.row(trained.encode(text), 9).tolist() for text in texts]
