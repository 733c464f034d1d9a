"""Tars that someone made to do harm, or that are odd: every refusal is said, and nothing is unpacked."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataload import shards
from dataload.shards import BrokenShard, ShardIndex, ShardWarning, tarheaders
from tests.tars import contents, pairs, picture, write_tar

END = bytes(1024)


def header(name: bytes, size: int | bytes, kind: bytes = b"0", prefix: bytes = b"") -> bytes:
    """A USTAR header, made by hand: tarfile would not write most of what is wanted here."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" * 3 + field + b"00000000000\0" + b" " * 8 + kind)
    block += bytes(100) + b"ustar\x0000" + bytes(80) + prefix.ljust(155, b"\0") + bytes(12)
    assert len(block) == 512
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def file(name: bytes, data: bytes = b"x", kind: bytes = b"0") -> bytes:
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


def pax(records: dict[bytes, bytes], kind: bytes = b"x") -> bytes:
    body = b""
    for key, value in records.items():
        length = len(key) + len(value) + 3
        length += len(str(length))
        length += len(str(length)) - len(str(length - len(str(length)) + len(str(length))))
        record = b" %s=%s\n" % (key, value)
        size = len(record) + len(str(len(record)))
        size += len(str(size)) != len(str(len(record)))
        body += b"%d%s" % (size, record)
    return file(b"PaxHeaders/x", body, kind)


GOOD = file(b"good.jpg", b"good") + file(b"good.txt", b"a caption")


def index_of(path: Path, data: bytes) -> ShardIndex:
    path.write_bytes(data)
    return shards.index([path])


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (file(b"/etc/evil.jpg"), "absolute path"),
        (file(b"\\evil.jpg"), "absolute path"),
        (file(b"C:/evil.jpg"), "absolute path"),
        (file(b"../../evil.jpg"), 'climbs out with ".."'),
        (file(b"a/../../evil.jpg"), 'climbs out with ".."'),
        (file(b"a\\..\\evil.jpg"), 'climbs out with ".."'),
        (pax({b"path": b"/etc/evil.jpg"}) + file(b"fine.jpg"), "absolute path"),
        (pax({b"path": b"x/../../evil.jpg"}) + file(b"fine.jpg"), 'climbs out with ".."'),
        (
            file(b"././@LongLink", b"../" * 50 + b"evil.jpg\0", b"L") + file(b"fine.jpg"),
            'climbs out with ".."',
        ),
        (file(b"ev\x1b[31mil.jpg"), "control characters"),
        (file(b"ev\nil.jpg"), "control characters"),
        (file(b"evil.jpg", b"", b"1"), "a hard link"),
        (file(b"evil.jpg", b"", b"2"), "a symbolic link"),
        (file(b"evil.jpg", b"", b"3"), "a device"),
        (file(b"evil.jpg", b"", b"4"), "a device"),
        (file(b"evil.jpg", b"", b"6"), "a pipe"),
        (file(b"evil.jpg", b"", b"S"), "a sparse file"),
        (file(b"evil.jpg", b"data", b"M"), "a part of a file in another tar"),
        (file(b"evil.jpg", b"data", b"q"), "type b'q'"),
        (
            pax({b"GNU.sparse.major": b"1", b"GNU.sparse.realsize": b"9" * 15}) + file(b"evil.jpg"),
            "a sparse file",
        ),
        (pax({b"size": b"-512"}) + file(b"evil.jpg"), "is no size"),
        (pax({b"size": b"9" * 5000}) + file(b"evil.jpg"), "is no size"),
        (file(b"PaxHeader", b"99999999999 path=x\n", b"x") + file(b"evil.jpg"), "PAX header is malformed"),
        (file(b"PaxHeader", b"0 path=x\n", b"x") + file(b"evil.jpg"), "PAX header is malformed"),
        (file(b"PaxHeader", b"path" * 100, b"x") + file(b"evil.jpg"), "PAX header is malformed"),
        (pax({b"path": b"a" * 5000 + b".jpg"}) + file(b"fine.jpg"), "5,004 bytes; up to 4,096 are allowed"),
        (file(b"PaxHeader", b"x" * (2 << 20), b"x") + file(b"evil.jpg"), "a header of 2,097,152 bytes"),
        (file(b"././@LongLink", b"n" * (2 << 20), b"L") + file(b"evil.jpg"), "a header of 2,097,152 bytes"),
    ],
)
def test_what_is_refused_is_said(tmp_path: Path, member: bytes, reason: str) -> None:
    with pytest.warns(ShardWarning, match="left out"):
        index = index_of(tmp_path / "t.tar", GOOD + member + file(b"last.png", b"last") + END)
    assert contents(index) == {"t/good": (b"good", ["a caption"]), "t/last": (b"last", [])}
    [(_, name, said)] = index.problems
    assert reason in said and name.isprintable() and len(name) < 250
    assert sorted(os.listdir(tmp_path)) == ["t.tar", "t.tar.index"], "nothing is unpacked"


@pytest.mark.parametrize("records", [{b"path": b"x.jpg"}, {b"size": b"0"}, {b"GNU.sparse.major": b"1"}])
def test_a_global_header_about_names_or_sizes_refuses_what_follows(
    tmp_path: Path, records: dict[bytes, bytes]
) -> None:
    with pytest.warns(ShardWarning, match="a global PAX header speaks of names or sizes"):
        index = index_of(
            tmp_path / "t.tar", GOOD + pax(records, b"g") + file(b"a.jpg") + file(b"b.jpg") + END
        )
    assert set(contents(index)) == {"t/good"} and len(index.problems) == 2


def test_a_harmless_global_header(tmp_path: Path) -> None:
    """`git archive` writes its commit so."""
    index = index_of(tmp_path / "t.tar", pax({b"comment": b"0123abcd"}, b"g") + GOOD + END)
    assert not index.problems and len(index) == 1


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (header(b"evil.jpg", b"\xff" * 11 + b"\x00"), "a negative number"),
        (header(b"evil.jpg", b"-0000000012\0"), "is no number"),
        (header(b"evil.jpg", b"0o7_7\0______"), "is no number"),
        (header(b"evil.jpg", b"\x80" + b"\x7f" * 11), "cut short by the end of the file"),
        (header(b"evil.jpg", 1 << 32), "cut short by the end of the file"),
        (pax({b"size": b"9" * 18}) + file(b"evil.jpg"), "cut short by the end of the file"),
        (header(b"PaxHeader", 1 << 32, b"x") + file(b"evil.jpg"), "cut short by the end of the file"),
        (header(b"evil.jpg", b"\xff" * 12, b"x") + file(b"evil.jpg"), "a negative number"),
        (b"\xff" * 512, "no readable tar header at byte 2048"),
    ],
)
def test_sizes_that_lead_astray_end_the_tar(tmp_path: Path, member: bytes, reason: str) -> None:
    data = file(b"first.jpg", b"first") + file(b"good.jpg", b"good") + member + file(b"last.jpg") + END
    with pytest.warns(ShardWarning, match="the tar is damaged here"):
        index = index_of(tmp_path / "t.tar", data)
    assert contents(index)["t/first"] == (b"first", [])
    assert reason in index.problems[0][2] and not any("last" in key for key in contents(index))


def test_names_that_come_twice(tmp_path: Path) -> None:
    data = file(b"a.jpg", b"1") + file(b"a.jpg", b"2") + file(b"a.txt", b"t") + file(b"a.txt", b"u") + END
    with pytest.warns(ShardWarning):
        index = index_of(tmp_path / "t.tar", data)
    assert contents(index) == {"t/a": (b"1", ["t"])}
    assert [said for _, _, said in index.problems] == [
        "a second image file of the same name (a.jpg) is left out",
        "a second txt file of the same name (a.txt) is left out",
    ]


def test_many_members_cost_little_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and time go with the bytes of the tar, problems are kept up to a limit, and so are headers."""
    count = 6_000
    data = b"".join(file(b"%d.jpg" % n, b"", b"2") for n in range(count)) + GOOD + END
    (tmp_path / "t.tar").write_bytes(data)
    tracemalloc.start()
    started = time.process_time()
    with pytest.warns(ShardWarning, match="1001 problems"):
        index = shards.index([tmp_path / "t.tar"])
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert index.problems[-1][2] == f"{count - 1000:,} more problems are not listed"
    assert peak < 2 << 20 and seconds < 10
    monkeypatch.setattr(tarheaders, "MAX_HEADERS", 1000)
    (tmp_path / "t.tar.index").unlink()
    with pytest.raises(BrokenShard, match="more than 1,000 headers in one tar"):
        shards.index([tmp_path / "t.tar"])
    many = b"".join(file(b"%d.jpg" % n, b"") for n in range(2000))
    with pytest.warns(ShardWarning, match="more than 1,000 headers in one tar"):
        assert len(index_of(tmp_path / "u.tar", many + END)) == 999


def test_long_chains_of_headers_end(tmp_path: Path) -> None:
    """A header about a header about a header ... is a loop, not a recursion."""
    index = index_of(tmp_path / "t.tar", pax({b"comment": b"x"}) * 5000 + GOOD + END)
    assert len(index) == 1


@pytest.mark.parametrize("form", ["v7", "ustar", "oldgnu", "gnu", "posix"])
def test_what_gnu_tar_writes(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "in" / ("d" * 60)
    folder.mkdir(parents=True)
    names = ["a.jpg", "a.txt", "b.flac", "b.json"] + ([] if form == "v7" else ["long" * 20 + ".jpg"])
    for name in names:
        (folder / name).write_bytes(name.encode() * 100 if not name.endswith("json") else b'{"caption": "c"}')
    done = subprocess.run(
        ["tar", f"--format={form}", "-C", str(tmp_path / "in"), "-cf", str(tmp_path / "t.tar"), "."],
        capture_output=True,
    )
    if done.returncode:
        pytest.skip(f"needs GNU tar: {done.stderr.decode()}")
    index = shards.index([tmp_path / "t.tar"])
    assert not index.problems
    found = {
        f"{index.key(i)}.{name}": index.read(i, name)
        for i in range(len(index))
        for name, _, _ in index.files(i)
    }
    assert found == {f"t/./{folder.name}/{name}": (folder / name).read_bytes() for name in names}


def test_a_sparse_file_of_gnu_tar_is_skipped_in_full(tmp_path: Path) -> None:
    """Its map may take more blocks than the header: what follows must be found all the same."""
    with open(tmp_path / "a.jpg", "wb") as out:
        for n in range(40):
            out.seek(n * 200_000)
            out.write(b"data")
    (tmp_path / "b.jpg").write_bytes(b"plain")
    command = [
        "tar",
        "--format=gnu",
        "--sparse",
        "-C",
        str(tmp_path),
        "-cf",
        str(tmp_path / "t.tar"),
        "a.jpg",
        "b.jpg",
    ]
    if (
        subprocess.run(command, capture_output=True).returncode
        or (tmp_path / "t.tar").stat().st_size > 4_000_000
    ):
        pytest.skip("needs GNU tar and a file system with sparse files")
    with pytest.warns(ShardWarning, match="a sparse file"):
        index = shards.index([tmp_path / "t.tar"])
    assert contents(index) == {"t/b": (b"plain", [])}


def test_files_beyond_the_octal_size(tmp_path: Path) -> None:
    """Sizes in base 256 and in PAX, as for files of 8 GiB and more (here: small ones, written that way)."""
    base256 = header(b"a.jpg", b"\x80" + (5).to_bytes(11, "big")) + b"first" + bytes(507)
    with_pax = pax({b"size": b"6"}) + header(b"b.jpg", 0) + b"second" + bytes(506)
    index = index_of(tmp_path / "t.tar", base256 + with_pax + GOOD + END)
    assert [index.image(i) for i in range(3)] == [b"first", b"second", b"good"]
    with tarfile.open(tmp_path / "t.tar") as tar:  # Python's reader sees the same
        assert [(m.name, m.size) for m in tar][:2] == [("a.jpg", 5), ("b.jpg", 6)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_anywhere_is_reported_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever is done to the bytes: an index, or BrokenShard; and what the index gives lies in the file."""
    whole = bytearray(
        write_tar(tmp_path / "t.tar", pairs(6), data.draw(st.sampled_from([0, 1, 2]))).read_bytes()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=16))
        whole[place : place + len(patch)] = patch
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        found = tarheaders_of(cut)
    except tarheaders.DamagedTar:
        found = []
    for member in found:
        assert 0 <= member.offset <= member.offset + member.size <= len(cut)


def tarheaders_of(data: bytes) -> list[tarheaders.Member]:
    return list(tarheaders.members(io.BytesIO(data), len(data)))


def test_the_same_members_as_tarfile(tmp_path: Path) -> None:
    names = [f"{'é' * n}{n}.jpg" for n in (1, 40, 60, 130)] + ["plain.jpg", "dir/sub/plain.txt"]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        usable = (
            names if form != tarfile.USTAR_FORMAT else [name for name in names if len(name.encode()) < 100]
        )
        path = write_tar(tmp_path / "t.tar", [(name, picture(n)) for n, name in enumerate(usable)], form)
        with tarfile.open(path) as tar:
            theirs = [(m.name, m.offset_data, m.size) for m in tar]
        assert [(m.name, m.offset, m.size) for m in tarheaders_of(path.read_bytes())] == theirs
