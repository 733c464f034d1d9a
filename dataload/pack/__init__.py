"""Packs data sets as tar shards (img2dataset's layout, which WebDataset and this project read).

    python -m dataload.pack coco|karpathy|flickr|vqa|visual-genome|audioset|masks|csv|folder ... --output DIR
    python -m dataload.pack img2dataset --shards DIR

or from Python: `pack(read_coco(captions, images), output)`. One reader per source format makes a `Source`;
`pack` writes it.
"""

from __future__ import annotations

from dataload.pack.audioset import read_audioset
from dataload.pack.coco import CocoFiles, read_coco
from dataload.pack.csv_table import read_csv
from dataload.pack.flickr import read_flickr
from dataload.pack.folder import read_folder
from dataload.pack.img2dataset import examine
from dataload.pack.journal import PackError
from dataload.pack.karpathy import read_karpathy
from dataload.pack.masks import read_masks
from dataload.pack.packing import pack
from dataload.pack.source import Picture, Source, SourceError
from dataload.pack.summary import Summary
from dataload.pack.visual_genome import GenomeFiles, read_visual_genome
from dataload.pack.vqa import read_vqa
from dataload.pack.writer import ShardWriter

__all__ = [
    "CocoFiles",
    "GenomeFiles",
    "PackError",
    "Picture",
    "ShardWriter",
    "Source",
    "SourceError",
    "Summary",
    "examine",
    "pack",
    "read_audioset",
    "read_coco",
    "read_csv",
    "read_flickr",
    "read_folder",
    "read_karpathy",
    "read_masks",
    "read_visual_genome",
    "read_vqa",
]
