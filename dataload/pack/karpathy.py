"""Karpathy's splits: dataset_coco.json, dataset_flickr8k.json, dataset_flickr30k.json."""

from __future__ import annotations

from pathlib import Path

from dataload.pack.source import Picture, Source, check_folder, inside, load_json, need, tidy


def read_karpathy(file: Path, images: Path, *, restval_into_train: bool = True) -> Source:
    """Reads Karpathy's JSON; a picture's split is the one that the file gives it.

    COCO's file has a fourth split, "restval" (validation pictures that are in neither val nor test); it is
    customary to train on it, so it becomes part of "train" unless `restval_into_train` is false. Pictures are
    looked up as images/filepath/filename, then as images/filename. Raises SourceError for other files.
    """
    check_folder(images)
    source = Source("karpathy", [])
    restval = blank = 0
    for entry in load_json(file, "karpathy")["images"]:
        name, split = need(entry, "filename", file), need(entry, "split", file)
        if split == "restval" and restval_into_train:
            split = "train"
            restval += 1
        raw = [need(sentence, "raw", file) for sentence in entry.get("sentences", ())]
        captions = tidy(raw, f"{file}, {name}")
        blank += len(raw) - len(captions)
        path = inside(images, name, str(file))
        if folder := entry.get("filepath"):
            nested = inside(images, f"{folder}/{name}", str(file))
            path = nested if nested.exists() else path
        facts = {key: entry[key] for key in ("imgid", "cocoid") if key in entry}
        source.pictures.append(Picture(path, name, split, captions, {**facts, "file_name": name}))
    if restval:
        source.notes.append(
            f"{restval:,} pictures of the split restval became part of train (--no-restval-into-train)"
        )
    if blank:
        source.notes.append(f"{blank:,} blank captions were left out")
    return source
