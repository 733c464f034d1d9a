"""Packs picture-caption data as tar shards (img2dataset's layout, which WebDataset and this project read).

    python -m dataload.pack coco|karpathy|csv|folder ... --output DIR

or from Python: `pack(read_coco(captions, images), output)`. One reader per source format makes a `Source`;
`pack` writes it.
"""

from __future__ import annotations

from dataload.pack.coco import read_coco
from dataload.pack.csv_table import read_csv
from dataload.pack.folder import read_folder
from dataload.pack.journal import PackError
from dataload.pack.karpathy import read_karpathy
from dataload.pack.packing import pack
from dataload.pack.source import Picture, Source, SourceError
from dataload.pack.summary import Summary
from dataload.pack.writer import ShardWriter

__all__ = [
    "PackError",
    "Picture",
    "ShardWriter",
    "Source",
    "SourceError",
    "Summary",
    "pack",
    "read_coco",
    "read_csv",
    "read_folder",
    "read_karpathy",
]
