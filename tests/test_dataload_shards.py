"""Shards: found, read by offset, and what is said of those that are damaged."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset

from dataload import shards
from dataload.broken import BrokenSample
from dataload.shards import BrokenShard, ShardWarning, expand
from tests.tars import contents, pairs, picture, quiet_index, write_tar

# finding shards


def test_expand(tmp_path: Path) -> None:
    for name in ("a-000.tar", "a-001.tar", "a-010.tar", "b-000.tar", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.tar").touch()

    def names(*patterns: str) -> list[str]:
        return [path.name for path in expand([str(tmp_path / pattern) for pattern in patterns])]

    assert names("a-{000..001}.tar") == ["a-000.tar", "a-001.tar"]
    assert names("{b,a}-000.tar") == ["b-000.tar", "a-000.tar"]
    assert names("a-*.tar") == ["a-000.tar", "a-001.tar", "a-010.tar"]
    assert names(".") == ["a-000.tar", "a-001.tar", "a-010.tar", "b-000.tar"]
    assert names("**/c.tar", "b-000.tar") == ["c.tar", "b-000.tar"]
    with pytest.raises(FileNotFoundError, match=r"a-002\.tar \(from .*000\.\.002"):
        names("a-{000..002}.tar")
    with pytest.raises(FileNotFoundError, match="no shard at .*z-"):
        names("z-*.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no \.tar"):
        names("empty")
    with pytest.raises(ValueError, match="named twice"):
        names("a-000.tar", "a-*.tar")


def test_commands_are_refused() -> None:
    with pytest.raises(ValueError, match="is a command"):
        expand(["pipe:cat a.tar"])


def test_expand_takes_a_sequence() -> None:
    with pytest.raises(ValueError, match="one string"):
        expand("a.tar")
    with pytest.raises(ValueError, match="no shards"):
        expand([])


# the format, against the webdataset library


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_webdataset_wrote_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(20):
            sample = {"__key__": f"{i:06d}", "jpg": picture(i)}
            if i % 3:
                sample["txt"] = f"caption {i}"
            if i % 4:
                sample["json"] = {"caption": f"caption {i}", "url": "x", "status": "success"}
            writer.write(sample)
    index = quiet_index(path)
    assert len(index) == 20
    assert contents(index) == {
        f"w/{i:06d}": (picture(i), [f"caption {i}"] if i % 3 or i % 4 else []) for i in range(20)
    }
    assert index.captioned.tolist() == [bool(i % 3 or i % 4) for i in range(20)]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_webdataset_and_we_see_the_same_samples(tmp_path: Path) -> None:
    files = [("dir.v1/a.b.jpg", b"no key a, extension b.jpg"), *pairs(5), ("x/00001.png", b"other folder")]
    path = write_tar(tmp_path / "s.tar", [*files, ("x/00001.json", b'{"captions": ["c", "d"]}')])
    theirs = {
        sample["__key__"]: sample
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
        if "jpg" in sample or "png" in sample
    }
    with pytest.warns(ShardWarning, match=r"dir\.v1/a: left out: .* \(\.b\.jpg\)"):
        ours = contents(shards.index([path]))
    assert set(ours) == {f"s/{key}" for key in theirs} == {*(f"s/{i:05d}" for i in range(5)), "s/x/00001"}
    for key, sample in theirs.items():
        assert ours[f"s/{key}"][0] == sample.get("jpg", sample.get("png"))
    assert ours["s/x/00001"][1] == ["c", "d"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_dialects_and_long_names(tmp_path: Path, format: int) -> None:
    name = f"{'a' * 90}/{'b' * 90}" if format == tarfile.USTAR_FORMAT else "é" * 150 + f"/{'b' * 150}"
    files = [(f"{name}.jpg", picture(1)), *pairs(2)]
    index = quiet_index(write_tar(tmp_path / "t.tar", files, format))
    assert [index.image(i) for i in range(3)] == [picture(1), picture(0), picture(1)]
    assert index.key(0) == f"t/{name}"


# captions


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"txt": b"a cat\n"}, ["a cat"]),
        ({"txt": b"  \n"}, []),
        ({"txt": b""}, []),
        ({"txt": b"\xef\xbb\xbfa cat"}, ["a cat"]),
        ({"json": b'{"caption": "a cat"}'}, ["a cat"]),
        ({"json": b'{"caption": ""}'}, []),
        ({"json": b'{"caption": null, "url": "x", "status": "success"}'}, []),
        ({"json": b'{"captions": ["a", " ", "b", "a"]}'}, ["a", "b", "a"]),
        ({"json": b'{"captions": [], "caption": "c"}'}, ["c"]),
        ({"json": b'{"captions": ["a", "b"], "caption": "c"}'}, ["a", "b", "c"]),
        ({"txt": b"a", "json": b'{"captions": ["a", "b"]}'}, ["a", "b"]),
        ({"txt": b"a", "json": b'{"captions": ["b", "a"]}'}, ["b", "a"]),
        ({"txt": b"a", "json": b'{"captions": ["a", "a"], "caption": "a"}'}, ["a", "a"]),
        ({"txt": b"z", "json": b'{"captions": ["a", "b"]}'}, ["z", "a", "b"]),
        ({"txt": b"a", "json": b'{"caption": "a", "width": 3}'}, ["a"]),
        ({"json": b'{"caption": "half \\ud83d"}'}, ["half ?"]),
        ({"json": b'{"caption": "whole \\ud83d\\ude00"}'}, ["whole 😀"]),
        ({}, []),
    ],
)
def test_captions(tmp_path: Path, files: dict[str, bytes], expected: list[str]) -> None:
    tar = write_tar(
        tmp_path / "c.tar", [("k.jpg", b"x"), *((f"k.{kind}", data) for kind, data in files.items())]
    )
    index = quiet_index(tar)
    assert index.captions(0) == expected
    assert index.captioned.tolist() == [bool(expected)]


def test_only_the_files_that_add_captions_are_read_again(tmp_path: Path) -> None:
    members = [("k.jpg", b"x"), ("k.txt", b"a"), ("k.json", b'{"caption": "a", "exif": "long"}')]
    index = quiet_index(write_tar(tmp_path / "c.tar", members))
    read: list[int] = []
    index._handles.read = lambda shard, offset, size: read.append(size) or b"a"  # type: ignore[method-assign]
    assert index.captions(0) == ["a"] and read == [1]
    assert index.files(0) == [("jpg", 512, 1), ("txt", 1536, 1), ("json", 2560, 32)]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("k.json", b"{broken", "json is not used: not JSON"),
        ("k.json", b"[1]", "a JSON list, not an object"),
        ("k.json", b'{"captions": "a"}', '"captions" is not a list of strings'),
        ("k.json", b'{"caption": 3}', '"caption" is not a string'),
        ("k.json", b"[" * 100_000, "not JSON"),
        ("k.txt", b"caf\xe9", "not UTF-8"),
        ("k.png", b"y", "a second image file"),
        ("other.txt", b"a", "left out: no picture"),
    ],
)
def test_what_is_left_out_is_said(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    tar = write_tar(tmp_path / "p.tar", [("k.jpg", b"x"), (name, data)])
    for _ in range(2):  # scanned, then from the cache
        with pytest.warns(ShardWarning, match="1 problems in the shards"):
            index = shards.index([tar])
        assert len(index) == 1 and index.image(0) == b"x"
        [(where, key, said)] = index.problems
        assert (where, key) == (str(tar), name.split(".")[0]) and reason in said


def test_links_are_left_out_and_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "l.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in [*pairs(1), ("0.cls", b"3"), ("README", b"x")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with pytest.warns(ShardWarning, match="neither a plain file"):
        index = shards.index([path])
    assert index.shards[0].ignored == {"cls": 1, "(no key)": 1}
    assert set(contents(index)) == {"l/00000"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["l.tar", "l.tar.index"]


# damage


def test_a_truncated_tar_keeps_whole_samples_and_says_so(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", pairs(10))
    with tarfile.open(path) as tar:
        member = tar.getmember("00007.txt")
    whole = path.read_bytes()
    # in the caption, in its header, and one byte into its header
    for cut in (member.offset_data + 3, member.offset + 100, member.offset + 1):
        path.write_bytes(whole[:cut])
        with pytest.warns(ShardWarning, match=r"t\.tar: 00007: left out, the tar is damaged"):
            index = shards.index([path])
        assert contents(index) == {f"t/{i:05d}": (picture(i), [f"caption {i}"]) for i in range(7)}
        assert index.captioned.all()


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", pairs(10))
    with tarfile.open(path) as tar:
        offset = tar.getmember("00004.jpg").offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = b"\xff" * 200
    path.write_bytes(data)
    with pytest.warns(ShardWarning, match=f"no readable tar header at byte {offset}"):
        index = shards.index([path])
    assert len(index) == 3  # 0 to 2; 3 is next to the damage


def test_a_tar_cut_between_two_files_does_not_turn_a_pair_into_a_picture(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", pairs(3))
    with tarfile.open(path) as tar:
        caption = tar.getmember("00002.txt")
    path.write_bytes(path.read_bytes()[: caption.offset])
    with pytest.warns(ShardWarning, match="00002: left out, .* without the end mark"):
        index = shards.index([path])
    assert len(index) == 2 and index.captioned.all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>404</html>" * 100, "no readable tar header"),
        (b"\x1f\x8b\x08" + bytes(600), r"compressed \(gzip\)"),
        (bytes(10240), "holds no picture.*Its files: none"),
    ],
)
def test_no_tar_at_all(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(data)
    with pytest.raises(BrokenShard, match=f"bad.tar.*{reason}"):
        shards.index([path])


def test_a_tar_without_pictures_says_what_it_holds(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.json", b"{}"), ("1.txt", b"a")])
    with pytest.raises(BrokenShard, match="1: left out: no picture, sound or video"):
        shards.index([path])


def test_a_tar_that_shrinks_later_is_an_error_and_not_a_short_picture(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", pairs(3))
    index = quiet_index(path)
    with open(path, "r+b") as file:
        file.truncate(600)
    with pytest.raises(OSError, match="shorter than when it was indexed"):
        index.image(2)


# the index


def test_manifest_knows_content_and_order_but_not_place_and_time(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    first, second = write_tar(tmp_path / "x.tar", pairs(3)), write_tar(tmp_path / "y.tar", pairs(2, first=3))
    manifest = quiet_index(first, second).manifest
    assert {**manifest, "hash": ""} == {
        "hash": "", "shards": 2, "captioned": 5, "uncaptioned": 0, "excluded": 0,
        "bytes": first.stat().st_size + second.stat().st_size,
    }  # fmt: skip
    moved = [tmp_path / "b" / "x.tar", tmp_path / "b" / "y.tar"]
    for path, target in zip((first, second), moved, strict=True):
        target.write_bytes(path.read_bytes())
    assert quiet_index(*moved).manifest == manifest
    assert quiet_index(second, first).manifest["hash"] != manifest["hash"]
    write_tar(moved[1], [(name.replace("3", "7"), data) for name, data in pairs(2, first=3)])
    assert quiet_index(*moved).manifest["hash"] != manifest["hash"]


def test_sources_split_captioned_and_uncaptioned(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "x.tar", [*pairs(2), ("u.jpg", b"u")])
    second = write_tar(tmp_path / "y.tar", [("v.jpg", b"v"), *pairs(1)])
    index = quiet_index(first, second)
    captioned, uncaptioned = index.source(captioned=True), index.source(captioned=False)
    assert [samples.tolist() for samples in captioned] == [[0, 1], [4]]
    assert [samples.tolist() for samples in uncaptioned] == [[2], [3]]
    assert index.key(3) == "y/v" and index.where(4) == (str(second), "00000")


def test_reading_from_threads_and_after_pickling(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{n:03d}.tar", pairs(4, first=4 * n)) for n in range(40)]
    index = quiet_index(*paths)  # more shards than a thread keeps open
    expected = [hashlib.sha256(picture(i)).digest() for i in range(160)]
    wrong: list[int] = []

    def read(seed: int) -> None:
        copy = pickle.loads(pickle.dumps(index)) if seed % 2 else index  # noqa: S301
        for i in np.random.default_rng(seed).permutation(160).tolist() * 3:
            if hashlib.sha256(copy.image(i)).digest() != expected[i] or copy.captions(i) != [f"caption {i}"]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_tar_that_changes_later_is_an_error_and_not_another_picture(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", pairs(3))
    index = quiet_index(path)
    assert index.image(1) == picture(1)
    status = path.stat()
    write_tar(path, [(name, data.swapcase()) for name, data in pairs(3)])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert path.stat().st_size == status.st_size
    for reader in (index, pickle.loads(pickle.dumps(index))):  # noqa: S301  # with the tar open, and not
        with pytest.raises(OSError, match=r"t\.tar has changed since it was indexed"):
            reader.image(1)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickle.dumps(index)).image(1)  # noqa: S301


# every kind of file


MEDIA_FILES = [
    ("a.flac", b"sound"), ("a.json", b'{"label": 3, "caption": "c"}'), ("b.mp4", b"video"), ("b.wav", b"its track"),
    ("c.JPG", b"picture"), ("c.npy", b"array"), ("c.seg.png", b"segments"), ("d.txt", b"only text"),
]  # fmt: skip


def test_every_file_of_a_sample_is_found(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "m.tar", MEDIA_FILES)
    for _ in range(2):  # scanned, then from the index file
        with pytest.warns(ShardWarning, match="d: left out: no picture, sound or video"):
            index = shards.index([path])
        assert [index.key(i) for i in range(3)] == ["m/a", "m/b", "m/c"]
        assert index.has("image").tolist() == [False, False, True]
        assert index.has("audio").tolist() == [True, True, False]
        assert index.has("audio", "video").tolist() == [False, True, False]
        assert index.has("json").tolist() == index.captioned.tolist() == [True, False, False]
        assert (index.media(0, "audio"), index.media(1, "video"), index.media(2, "image")) == (
            b"sound", b"video", b"picture",
        )  # fmt: skip
        assert index.record(0) == {"label": 3, "caption": "c"} and index.record(1) == {}
        assert [name for name, _, _ in index.files(2)] == ["JPG", "npy", "seg.png"]
        assert index.read(2, "seg.png") == b"segments"
        with pytest.raises(BrokenSample, match="it has no video"):
            index.media(0, "video")
        with pytest.raises(KeyError, match="no 'cls'"):
            index.read(0, "cls")
        data = path.read_bytes()
        for i, start in enumerate((b"sound", b"video", b"picture")):
            assert data[index.offset(i) :].startswith(start)


def test_a_source_takes_only_what_has_all_it_needs(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "m.tar", MEDIA_FILES[:-1])
    index = quiet_index(path, write_tar(tmp_path / "n.tar", pairs(2)))
    with pytest.warns(ShardWarning, match="2 of 5 samples are left out: they lack image"):
        assert [part.tolist() for part in index.source(captioned=True)] == [[], [3, 4]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert [part.tolist() for part in index.source(captioned=False)] == [[2], []]
    with pytest.warns(ShardWarning, match="4 of 5 samples are left out: they lack audio and video"):
        assert [part.tolist() for part in index.source(False, needs=("audio", "video"))] == [[1], []]
    with pytest.raises(BrokenShard, match="none of the 5 samples has image and video"):
        index.source(True, needs=("image", "video"))


def test_a_json_that_is_none_is_a_broken_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "j.tar", [("a.jpg", b"x"), ("a.json", b"[1]")])
    with pytest.warns(ShardWarning):
        index = shards.index([path])
    with pytest.raises(BrokenSample, match="a JSON list, not an object"):
        index.record(0)
