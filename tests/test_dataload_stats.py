"""python -m dataload.stats: counts against sources of their own, the page in a browser, copies that must be found."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from browser import Page, in_browser
from clips import mp4
from PIL import Image, ImageFilter

from dataload import shards
from dataload.pack.writer import ShardWriter
from dataload.sandbox import Sandbox
from dataload.stats import media
from dataload.stats.__main__ import main
from dataload.stats.counts import Distribution, same_text, words
from dataload.stats.looks import LOOK, WHOLE, look
from dataload.stats.near import search
from dataload.stats.trial import ALTERED, measure

HOSTILE = '</p><script>document.title="owned"</script><img src=x onerror=alert(1)> & "quotes" {{ 7 * 7 }}'


def run(*given: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main([str(word) for word in given])
    return status, out.getvalue(), err.getvalue()


def scene(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """A smooth random field: as different from another as two photographs."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.SMOOTH)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def sound(seconds: float) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.zeros(round(8000 * seconds)), 8000, format="WAV")
    return out.getvalue()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """train-000000.tar .. 02 of 20 pictures (one is broken, one has a hostile caption, one is uncaptioned), sounds
    and a broken video; test-000000.tar with copies of 3, 4 (smaller), 5 (mirrored), and two of its own."""
    with ShardWriter(tmp_path, "train", max_samples=8) as writer:
        for number in range(20):
            data = encoded(scene(number), quality=95)
            texts = [f"A scene with the number {number}", "Twice said"] if number else [HOSTILE]
            if number == 9:
                data = data[:400]
            if number == 11:
                texts = ["long " * 200]
            writer.write(f"{number:04d}", "jpg", data, [] if number == 10 else texts)
        writer.write_files("0020", {"wav": sound(1.5)}, (), {"label": "silence"})
        writer.write_files("0021", {"wav": sound(0.5), "mp4": b"no video"}, ["It is quiet."])
        writer.write_files("0022", {"png": encoded(scene(7), "PNG")}, ["Looks like seven."])
    with ShardWriter(tmp_path, "test") as writer:
        writer.write("a", "jpg", encoded(scene(3), quality=95), ["A scene with the number 3!"])
        writer.write("b", "jpg", encoded(scene(4).resize((60, 45)), quality=60), ["Smaller"])
        writer.write("c", "jpg", encoded(scene(5).transpose(Image.Transpose.FLIP_LEFT_RIGHT)), ["Mirrored"])
        writer.write("d", "jpg", encoded(scene(100)), [HOSTILE])
        writer.write("e", "png", encoded(Image.new("RGB", (50, 50), "navy"), "PNG"), ["Nothing to see"])
    return tmp_path


def test_counts(corpus: Path) -> None:
    status, out, _ = run(corpus / "train-*.tar", "--json", "-")
    told = json.loads(out)
    assert status == 0
    assert [shard["samples"] for shard in told["shards"]] == [8, 8, 7]
    assert (told["samples"], told["image"], told["audio"], told["video"]) == (23, 21, 2, 1)
    assert told["captioned"] == 21 and told["bytes"] == sum(
        p.stat().st_size for p in corpus.glob("train*.tar")
    )
    texts = [HOSTILE, "long " * 199 + "long", "It is quiet.", "Looks like seven."]
    texts += [
        text
        for n in range(1, 20)
        if n not in (10, 11)
        for text in (f"A scene with the number {n}", "Twice said")
    ]
    lengths, captions = [len(text) for text in texts], told["captions"]
    assert captions["count"] == len(texts) and captions["different"] == len(set(texts))
    assert captions["characters"]["mean"] == pytest.approx(statistics.mean(lengths), abs=1e-3)
    assert captions["characters"]["median"] == statistics.median_low(lengths)
    assert (captions["characters"]["min"], captions["characters"]["max"]) == (min(lengths), max(lengths))
    assert sum(bar[2] for bar in captions["characters"]["histogram"]) == len(texts)
    assert captions["frequent_captions"] == [["Twice said", 17]]
    assert dict(map(tuple, captions["frequent_words"]))["scene"] == 17
    assert captions["per_sample"] == {"0": 2, "1": 4, "2": 17}
    assert captions["long"] == {"over_characters": 500, "count": 1, "first": [["train-000001/0011", 999]]}
    assert told["pictures"]["formats"] == {"JPEG": 19, "PNG": 1}
    assert [key for key, _ in told["pictures"]["broken"]["first"]] == ["train-000001/0009"]
    assert told["pictures"]["width"]["median"] == 120 and told["pictures"]["aspect"]["median"] == 1.35
    assert told["audios"]["hours"] == pytest.approx(2.0 / 3600, abs=1e-4)
    assert told["audios"]["kinds"] == {"8,000 Hz, 1 channel": 2}
    assert told["videos"]["broken"]["count"] == 1 and "0021" in told["videos"]["broken"]["first"][0][0]
    assert told["duplicates"]["exact"] == 0


def test_a_video_without_a_decoder_is_broken() -> None:
    video = mp4(7, frames=3, size=32, hertz=None)
    with Sandbox() as sandbox:
        assert media.header(video, "video", sandbox).kind == "32x32, 12 fps, silent"
        with pytest.raises(media.BrokenMedia, match="no decoder"):
            media.header(video.replace(b"avc1", b"zzzz"), "video", sandbox)


def test_counts_of_real_captions(real_data: Path, tmp_path: Path) -> None:
    """Against the annotation file itself, the headers as Pillow reads them."""
    annotations = json.loads((real_data / "coco_mini" / "captions.json").read_text())
    with ShardWriter(tmp_path, "coco") as writer:
        for image in annotations["images"][:40]:
            texts = [
                " ".join(a["caption"].split())
                for a in annotations["annotations"]
                if a["image_id"] == image["id"]
            ]
            writer.write(
                str(image["id"]),
                "jpg",
                (real_data / "coco_mini/images" / image["file_name"]).read_bytes(),
                texts,
            )
    told = json.loads(run(tmp_path, "--json", "-")[1])
    wanted = {image["id"] for image in annotations["images"][:40]}
    texts = [" ".join(a["caption"].split()) for a in annotations["annotations"] if a["image_id"] in wanted]
    assert told["captions"]["count"] == len(texts)
    assert told["captions"]["words"]["mean"] == pytest.approx(
        statistics.mean(len(t.split()) for t in texts), rel=0.02
    )
    shortest = [min(image["width"], image["height"]) for image in annotations["images"][:40]]
    assert told["pictures"]["shortest side"]["median"] == statistics.median_low(shortest)
    assert told["pictures"]["shortest side"]["max"] == max(shortest)


def test_against_finds_copies_and_says_which(corpus: Path, tmp_path: Path) -> None:
    lists, excludes = tmp_path / "list.jsonl", tmp_path / "exclude.jsonl"
    options = ("--list", lists, "--exclude-to", excludes, "--fail-above")
    command = (corpus / "train-*.tar", "--against", corpus / "test-*.tar")
    status, out, err = run(*command, *options, 0.5)
    assert status == 1 and "0.6000 of the evaluation pictures are in the corpus, over 0.5" in err
    assert "3 of 5 evaluation pictures (60.00%) are here too, in 3 samples" in out
    assert "2 of 5 evaluation samples share a caption" in out  # whatever the case and punctuation
    found = [json.loads(line) for line in lists.read_text().splitlines()]
    assert [(one["key"], one["like_key"], one["kind"]) for one in found] == [
        ("0003", "a", "exact"), ("0004", "b", "near"), ("0005", "c", "mirrored")
    ]  # fmt: skip
    assert found[0]["distance"] == found[0]["check"] == 0 and 0 <= found[1]["distance"] <= 12
    # The list is one that indexing takes.
    kept = shards.index(shards.expand([str(corpus / "train-*.tar")]), exclude=[excludes])
    left = {kept.where(sample)[1] for sample in range(len(kept))}
    assert len(left) == 20 and not {"0003", "0004", "0005"} & left
    assert run(*command, "--fail-above", 0.6)[0] == 0


def test_duplicates_of_a_corpus(corpus: Path, tmp_path: Path) -> None:
    with ShardWriter(corpus, "more") as writer:
        writer.write("again", "jpg", encoded(scene(1), quality=95))
        writer.write("flat1", "png", encoded(Image.new("RGB", (30, 30), "red"), "PNG"))
        writer.write("flat2", "png", encoded(Image.new("RGB", (40, 30), "blue"), "PNG"))
    excludes = tmp_path / "exclude.jsonl"
    status, out, _ = run(
        corpus / "{train,more}-*.tar", "--duplicates", "--exclude-to", excludes, "--json", "-"
    )
    told = json.loads(out)["duplicates"]
    assert status == 0 and (told["exact"], told["near"], told["groups"]) == (1, 1, 2)
    assert told["without_contrast"] == 2  # two flat pictures are not the same picture
    lines = [json.loads(line) for line in excludes.read_text().splitlines()]
    assert [line["key"] for line in lines] == ["again", "0022"]
    assert "exact of" in lines[0]["reason"] and "near of" in lines[1]["reason"]


@pytest.mark.parametrize("against", [False, True])
def test_looks_that_were_not_compared_are_not_none(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, against: bool
) -> None:
    """One picture (0022) looks like an earlier one. Without --duplicates nobody looked, so no number may be told."""
    options: tuple[object, ...] = ("--against", corpus / "test-*.tar") if against else ()
    if not against:
        monkeypatch.setitem(sys.modules, "imagehash", None)  # not needed, and not there
    folder, file = tmp_path / "report", tmp_path / "stats.json"
    status, out, _ = run(corpus / "train-*.tar", *options, "--report", folder, "--json", file)
    said = "was not compared (--duplicates does)"
    assert status == 0 and "that look like one" not in out
    assert f"0 pictures with the bytes of an earlier one; whether others look like one {said}" in out
    for told in (file, folder / "stats.json"):
        copies = json.loads(told.read_text())["duplicates"]
        assert (copies["exact"], copies["near"], copies["without_contrast"]) == (0, None, None)
    page = Page((folder / "index.html").read_text(encoding="utf-8")).text
    assert "Extra copies by bytes; looks not compared" in page and "more look like one" not in page
    assert "Whether others look like one was not compared: --duplicates does." in page


def test_looks_that_were_compared(corpus: Path, tmp_path: Path) -> None:
    status, out, _ = run(corpus / "train-*.tar", "--duplicates", "--report", tmp_path / "report")
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8")).text
    assert status == 0 and "0 pictures with the bytes of an earlier one, 1 that look like one" in out
    assert "an earlier one, 1 more look like one." in page and "not compared" not in out + page


def test_hashes_are_kept_beside_the_shard(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = (corpus / "train-*.tar", "--duplicates", "--json", "-")
    first = run(*command)[1]
    kept = sorted(path.name for path in corpus.glob("*.looks.npz"))
    assert kept == [f"train-00000{number}.tar.looks.npz" for number in range(3)]

    def never(*_: object) -> None:
        raise AssertionError("hashed again")

    with monkeypatch.context() as patch:
        patch.setattr("dataload.stats.looks.look", never)
        assert run(*command)[1] == first
        tar = corpus / "train-000001.tar"
        tar.write_bytes(tar.read_bytes())  # another time: may be another content
        with pytest.raises(AssertionError, match="hashed again"):
            run(*command)
    (corpus / "train-000002.tar.looks.npz").write_bytes(b"PK\x03\x04 damaged")
    assert run(*command)[1] == first


@pytest.mark.parametrize("distance", [0, 5, 12])
def test_search_is_exhaustive(distance: int) -> None:
    """Every pair within the distance, against counting bits of Python's integers."""
    rng = np.random.default_rng(distance)
    rows = np.zeros(300, dtype=LOOK)
    rows["state"] = WHOLE
    base = rng.integers(0, 2**63, 12, dtype=np.uint64)
    for name in ("hash", "mirrored"):
        flips = [sum(1 << int(bit) for bit in rng.choice(63, int(rng.integers(0, 9)))) for _ in range(300)]
        rows[name] = base[rng.integers(0, 12, 300)] ^ np.array(flips, dtype=np.uint64)
    rows["state"][::17] = 0
    pairs = search(rows[:40], rows, distance=distance, check=256)
    whole = [i for i in range(300) if i % 17]
    expected = {
        (q, t)
        for q in whole if q < 40
        for t in whole
        if min((int(rows[name][q]) ^ int(rows["hash"][t])).bit_count() for name in ("hash", "mirrored")) <= distance
    }  # fmt: skip
    assert (
        set(zip(pairs.query.tolist(), pairs.found.tolist(), strict=True)) == expected and len(expected) > 20
    )
    assert len(pairs) == len(expected)
    inside = search(rows, rows, distance=distance, check=256, within=True)
    both = {
        (q, t)
        for q in whole
        for t in whole
        if q < t
        and min(int(rows[name][q] ^ rows["hash"][t]).bit_count() for name in ("hash", "mirrored")) <= distance
    }
    assert set(zip(inside.query.tolist(), inside.found.tolist(), strict=True)) == both


def test_looks_agree_with_imagehash_itself() -> None:
    imagehash = pytest.importorskip("imagehash", reason="needs imagehash: pip install 'auroraio[data]'")
    picture = scene(1, (640, 480))
    row, kind = look(encoded(picture, "PNG"), True)
    assert kind == "PNG" and (row["width"], row["height"]) == (640, 480)
    for name, size, image in (
        ("hash", 8, picture),
        ("mirrored", 8, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        ("fine", 16, picture),
    ):
        theirs = np.packbits(imagehash.phash(image, hash_size=size).hash)
        ours = np.frombuffer(row[name].tobytes(), dtype=np.uint8)
        # They shrink in one step and to another size; a bit at the median may fall to the other side.
        assert np.bitwise_count(ours ^ theirs).sum() <= size * size // 32, name
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, _ = look(encoded(picture.transpose(Image.Transpose.ROTATE_90), exif=exif, quality=95), True)
    assert (turned["width"], turned["height"]) == (640, 480)
    assert int(turned["hash"] ^ row["hash"]).bit_count() <= 2


def test_altered_photographs_are_found(real_data: Path) -> None:
    """The experiment of the README on a tenth of its photographs; the limits leave room for chance."""
    files = sorted((real_data / "flickr8k_2000" / "images").iterdir())[:60]
    ways = [way for way in ALTERED if "10%" not in way and "corner" not in way]
    found, wrong, pairs = measure([path.read_bytes() for path in files], ways=ways[::2])
    assert wrong == 0 and pairs == 60 * 59 // 2
    assert min(found.values()) >= 0.95, found
    found, _, _ = measure(
        [path.read_bytes() for path in files[:10]], distance=0, check=0, ways=["cropped by 4%"]
    )
    assert found["cropped by 4%"] < 0.5


def test_distributions() -> None:
    values = np.random.default_rng(0).integers(3, 90, 500)
    told = Distribution()
    for value in values.tolist():
        told.add(value)
    figures = told.to_json()
    assert figures["mean"] == pytest.approx(values.mean(), abs=1e-3)
    assert figures["p95"] == np.quantile(values, 0.95, method="inverted_cdf")
    assert figures["median"] == np.quantile(values, 0.5, method="inverted_cdf")
    for low, high, count in figures["histogram"][:-1]:
        assert count == ((values >= low) & (values < high)).sum()
    assert Distribution().to_json() == {"count": 0}
    assert words("It's 2 dogs, Naïve—Übung") == ["it's", "2", "dogs", "naïve", "übung"]
    assert same_text("A dog!") == same_text(" a  DOG") != same_text("a dogs")


def test_errors(corpus: Path) -> None:
    assert run(corpus / "none-*.tar")[0] == 2
    status, _, err = run(corpus / "train-*.tar", "--against", corpus / "train-000000.tar")
    assert status == 2 and "is named as the corpus and as its evaluation data" in err
    for options in (["--fail-above", "0.1"], ["--exclude-to", "x"], ["--distance", "60"], ["--workers", "0"]):
        with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            main([str(corpus), *options])


ASK = """
  const pictures = [...document.images];
  pictures.forEach((picture) => { picture.loading = "eager"; });
  await Promise.all(pictures.map((one) => one.decode().catch(() => problems.push("picture: " + one.alt))));
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
  return {
    pictures: pictures.length, shown: pictures.filter((one) => one.clientWidth > 40).length,
    charts: [...document.querySelectorAll(".chart svg")].filter((one) => one.clientHeight > 60).length,
    scripts: document.querySelectorAll("main script").length,
  };
"""


@pytest.fixture
def report(corpus: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "report"
    status, _, err = run(
        corpus / "train-*.tar", "--against", corpus / "test-*.tar", "--duplicates", "--report", folder
    )
    assert status == 0, err
    return folder / "index.html"


def test_the_page_holds_what_was_counted(report: Path) -> None:
    page = Page(report.read_text(encoding="utf-8"))
    assert page.open == []
    for text in (
        "23 samples with 21 pictures, 2 sounds, 1 videos in 3 shards.", "60.00%", "Caption length in words",
        "Twice said", "train-000001/0011", "mirrored", "8,000 Hz, 1 channel", "1 very long captions",
    ):  # fmt: skip
        assert text in page.text, text
    assert page.text.count(HOSTILE) >= 2  # letter by letter: on the sheet, and among the shared captions
    assert not [a for tag, a in page.tags if "onerror" in a or a.get("src") == "x"]
    assert not [tag for tag, _ in page.tags if tag == "script"]
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            target = attributes.get(name)
            assert not target or target.startswith(("data:", "#")), target
    assert json.loads(report.with_name("stats.json").read_text())["samples"] == 23


def test_the_page_in_a_browser(report: Path, chromium_command: list[str]) -> None:
    # The watcher of the tests is a script, which the page's own policy forbids.
    html = report.read_text(encoding="utf-8")
    report.write_text(
        html.replace("style-src 'unsafe-inline'", "style-src 'unsafe-inline'; script-src 'unsafe-inline'")
    )
    phone, desktop = in_browser(chromium_command, report, (400, 1280), ASK)
    for answer in (phone, desktop):
        assert answer["problems"] == []
        assert answer["wanted"] <= answer["width"]
        assert answer["pictures"] == answer["shown"] >= 20 and answer["charts"] >= 6
        assert answer["requests"] == 0 and answer["scripts"] == 0
        assert answer["title"] == "train-*.tar · corpus"  # not "owned"
