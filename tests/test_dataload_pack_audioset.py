"""AudioSet's segments and classes with their sounds, packed and read back; and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

from packing import opened, packed, run, write

from dataload.annotations import read_classes

SEGMENTS = """\
# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=4, num_segs=4, num_unique_labels=3, num_positive_labels=5
# YTID, start_seconds, end_seconds, positive_labels
--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/0bt9lr"
-0RWZT-miFs, 420.000, 430.000, "/m/0bt9lr"
-0xzrMun0Rs, 30.000, 40.000, "/m/09x0r"
0123456789A, 30.500, 40.500, "/m/09x0r"
"""
CLASSES = (
    'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/068hy,"Domestic animals, pets"\n2,/m/0bt9lr,"Dog"\n'
)


def audioset(folder: Path, real: Path) -> list[object]:
    """Real clips under AudioSet's names, and its three files."""
    clips = sorted((real / "audio_events" / "audio").rglob("*.ogg"))[:4]
    (folder / "clips" / "deeper").mkdir(parents=True)
    for name, clip in zip(
        ("--4gqARaEJE_0", "deeper/Y-0RWZT-miFs", "-0xzrMun0Rs_30000_40000", "other"), clips, strict=True
    ):
        (folder / "clips" / f"{name}.ogg").write_bytes(clip.read_bytes())
    names = (("/m/09x0r", "Speech"), ("/m/068hy", "Domestic animals, pets"), ("/m/0bt9lr", "Dog"))
    tree = [
        {"id": mid, "name": name, "description": "", "child_ids": [], "restrictions": []}
        for mid, name in names
    ]
    tree.append(
        {"id": "/m/0dgw9r", "name": "Human sounds", "child_ids": ["/m/09x0r"], "restrictions": ["abstract"]}
    )
    return [
        "audioset", "--segments", write(folder / "eval_segments.csv", SEGMENTS), "--clips", folder / "clips",
        "--ontology", write(folder / "ontology.json", tree),
    ]  # fmt: skip


def test_audioset(real_data: Path, tmp_path: Path) -> None:
    words = audioset(tmp_path, real_data)
    classes = write(tmp_path / "class_labels_indices.csv", CLASSES)
    found, said = packed(tmp_path / "out", *words, "--class-labels", classes, "--split", "eval", split="eval")
    assert "1 of 4 samples are missing" in said and "0123456789A_30.500" in said
    assert "1 other clips" in said and "3 with a label" in said
    assert found[0].labels == ("Domestic animals, pets", "Dog") and found[0].label_ids == (
        "/m/068hy",
        "/m/0bt9lr",
    )
    assert [one.labels[-1] for one in found] == ["Dog", "Dog", "Speech"]
    assert list(read_classes(tmp_path / "out").labels.items())[1] == ("/m/068hy", "Domestic animals, pets")
    assert opened(tmp_path / "out", "eval").has("audio").all()
    by_tree, _ = packed(tmp_path / "tree", *words)
    assert [one.labels for one in by_tree] == [one.labels for one in found]
    assert len(read_classes(tmp_path / "tree").labels) == 3, "abstract classes are none"


def test_audioset_that_does_not_fit(real_data: Path, tmp_path: Path) -> None:
    words = audioset(tmp_path, real_data)
    output = ("--output", tmp_path / "out")
    classes = write(tmp_path / "class_labels_indices.csv", CLASSES.replace("/m/0bt9lr", "/m/other"))
    error = run(*words, *output, "--class-labels", classes)[2]
    assert "1 of 3 classes" in error and "/m/other" in error, "not in the ontology"
    error = run(*words[:5], *output, "--class-labels", classes)[2]
    assert "has 1 labels that" in error and "/m/0bt9lr" in error
    assert "names them" in run(*words[:5], *output)[2]
    segments = Path(str(words[2]))
    segments.write_text(SEGMENTS.replace('"/m/068hy,/m/0bt9lr"', "/m/068hy,/m/0bt9lr"))
    assert "line 4: a segment is YTID" in run(*words, *output)[2]
    segments.write_text(SEGMENTS.rsplit("\n", 2)[0] + "\n")
    assert "says that it has 4 segments, and has 3" in run(*words, *output)[1]
    (tmp_path / "clips" / "-0xzrMun0Rs_30000_40000.ogg").rename(tmp_path / "clips" / "-0xzrMun0Rs.ogg")
    segments.write_text(SEGMENTS + '-0xzrMun0Rs, 50.000, 60.000, "/m/09x0r"\n')
    assert "names need the segment's start" in run(*words, *output, "--overwrite")[2]
