"""Lists of samples to leave out."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from dataload import shards
from dataload.shards import ShardWarning, expand
from tests.tars import pairs, picture, quiet_index, write_tar


def test_exclude_lists(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    first, second = write_tar(tmp_path / "x.tar", pairs(4)), write_tar(tmp_path / "y.tar", pairs(4))
    plain = quiet_index(first, second)
    listed = tmp_path / "list.txt"
    moved = json.dumps({"shard": "/gone/y.tar", "offset": 512, "key": "00001", "reason": "cut"})
    here = json.dumps({"shard": str(first), "key": "00003"})
    listed.write_text(f"# a comment\n\n00000\nx/00002\n{moved}\n{here}\n")
    index = shards.index([first, second], exclude=[listed])
    assert [index.key(i) for i in range(len(index))] == ["x/00001", "y/00002", "y/00003"]
    assert index.image(1) == picture(2) and index.captions(2) == ["caption 3"]
    assert index.where(0) == (str(first), "00001") and index.offset(0) == plain.offset(1)
    assert [part.tolist() for part in index.source(captioned=True)] == [[0], [1, 2]]
    assert index.manifest["excluded"] == 5 and index.manifest["captioned"] == 3
    assert index.manifest["hash"] != plain.manifest["hash"]
    copy = pickle.loads(pickle.dumps(index))  # noqa: S301
    assert copy.manifest == index.manifest and copy.key(0) == "x/00001"


def test_an_exclude_list_beside_a_shard(tmp_path: Path) -> None:
    first, second = write_tar(tmp_path / "x.tar", pairs(3)), write_tar(tmp_path / "y.tar", pairs(3))
    (tmp_path / "x.tar.exclude").write_text("00001\nnothing\n")
    with pytest.warns(ShardWarning, match="nothing: excluded, but there is no such sample"):
        index = shards.index([first, second])
    assert [index.key(i) for i in range(len(index))] == [
        "x/00000",
        "x/00002",
        "y/00000",
        "y/00001",
        "y/00002",
    ]
    assert expand([str(tmp_path)]) == [first, second]


@pytest.mark.parametrize("line", ['{"key": "a"}', '{"shard": 3, "key": "a"}', "{broken"])
def test_an_exclude_list_that_names_nothing(tmp_path: Path, line: str) -> None:
    path = write_tar(tmp_path / "x.tar", pairs(1))
    (tmp_path / "list").write_text(f"00005\n{line}\n")
    with pytest.raises(ValueError, match=r"list, line 2: .*\"shard\" and \"key\""):
        shards.index([path], exclude=[tmp_path / "list"])
