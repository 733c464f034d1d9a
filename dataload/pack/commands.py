"""The sources by name: what each command takes, and how its source is read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from dataload.pack.audioset import read_audioset
from dataload.pack.coco import CocoFiles, read_coco
from dataload.pack.csv_table import read_csv
from dataload.pack.flickr import read_flickr
from dataload.pack.folder import read_folder
from dataload.pack.karpathy import read_karpathy
from dataload.pack.masks import read_masks
from dataload.pack.source import Source, SourceError
from dataload.pack.visual_genome import GenomeFiles, read_visual_genome
from dataload.pack.vqa import read_vqa

COCO = """\
COCO's files of one split: captions, instances (boxes and masks), and one of stuff, stuff maps, panoptic segments. A picture
without a caption is packed as an uncaptioned one.

  python -m dataload.pack coco --captions captions_train2017.json --images train2017 --output shards
  python -m dataload.pack coco --instances instances_val2017.json --images val2017 --split val --output shards
  python -m dataload.pack coco --panoptic panoptic_val2017.json --panoptic-maps panoptic_val2017 --images val2017 \\
      --split val --output shards"""
KARPATHY = """\
Karpathy's file says which split each picture belongs to; every split gets shards of its own.

  python -m dataload.pack karpathy --json dataset_flickr8k.json --images Flicker8k_Dataset --output shards"""
FLICKR = """\
Flickr30k's and Flickr8k's token files: five lines NAME.jpg#0<tab>caption per picture. For Karpathy's splits of the same
pictures take `karpathy`.

  python -m dataload.pack flickr --tokens results_20130124.token --images flickr30k-images \\
      --lists train.txt val.txt test.txt --output shards"""
VQA = """\
VQA v2 and OK-VQA: a picture with all its questions and their ten answers is one sample. A test split has no annotations.

  python -m dataload.pack vqa --questions v2_OpenEnded_mscoco_val2014_questions.json \\
      --annotations v2_mscoco_val2014_annotations.json --images val2014 --split val --output shards"""
GENOME = """\
Visual Genome: regions with their descriptions, objects, questions. Pictures are <id>.jpg in DIR, DIR/VG_100K, DIR/VG_100K_2.

  python -m dataload.pack visual-genome --regions region_descriptions.json --objects objects.json \\
      --image-data image_data.json --images vg --output shards"""
AUDIOSET = """\
AudioSet: a clip's labels are display names, its label_ids machine ids. Clips are named YTID_START, YTID_START_END or YTID.

  python -m dataload.pack audioset --segments eval_segments.csv --class-labels class_labels_indices.csv \\
      --ontology ontology.json --clips audio --split eval --output shards"""
MASKS = """\
Pictures and label maps in two folders, NAME.jpg and NAME.png, a class number per pixel (ADE20K, VOC, Cityscapes).

  python -m dataload.pack masks --images images/training --maps annotations/training --classes names.txt \\
      --reduce-zero --output shards"""
CSV = """\
A table with a header and one caption per row; rows of the same file are its several captions. The files may be
pictures, sounds or videos. Held-out shards: --split-column, or --holdout 0.1.

  python -m dataload.pack csv --csv captions.csv --images pictures --image-column file --output shards
  python -m dataload.pack csv --csv labels.csv --media audio --media-column file --label-column class --output shards"""
FOLDER = """\
All pictures, sounds and videos below a folder; NAME.mp4 and NAME.wav are one sample. The captions of NAME.jpg are
the lines of NAME.txt, and in NAME.json "caption" (a text), "captions" (a list) or a list alone; "label" there is
its label. Pictures without such a file are packed as uncaptioned ones. --holdout 0.1 puts a tenth into val shards.

  python -m dataload.pack folder --images holiday --output shards
  python -m dataload.pack folder --media sounds --label-from-folder --output shards"""

Parser = argparse.ArgumentParser
Reader = Callable[[argparse.Namespace], Source]


def _file(parser: Parser, name: str, text: str, required: bool = False) -> None:
    parser.add_argument(name, type=Path, required=required, metavar="FILE", help=text)


def _folder(parser: Parser, name: str, text: str, required: bool = False) -> None:
    parser.add_argument(name, type=Path, required=required, metavar="DIR", help=text)


def _media(parser: Parser) -> None:
    parser.add_argument(
        "--images", "--media", "--clips", type=Path, required=True, metavar="DIR", help="folder of the files"
    )


def _split(parser: Parser) -> None:
    parser.add_argument("--split", help="name of the split, starts the shards' names (default: train)")
    add_holdout(parser)


def add_holdout(parser: Parser, supported: bool = True) -> None:
    """--holdout; a source that cannot have it takes it to refuse it in words."""
    text = "put this share of the samples, such as 0.1, into val shards instead of train, by a hash of their names"
    parser.add_argument(
        "--holdout", type=float, metavar="SHARE", help=text if supported else argparse.SUPPRESS
    )


def check_holdout(options: argparse.Namespace) -> None:
    """Raises SourceError for a --holdout of no share, and beside what divides the samples already."""
    share: float | None = options.holdout
    if share is None:
        return
    if not 0 < share < 1:
        raise SourceError(
            f"--holdout must be more than 0 and less than 1 (0.1 holds out a tenth), not {share:g}"
        )
    if why := _DIVIDED.get(options.command):
        names = ", ".join(name for name in COMMANDS if name not in _DIVIDED)
        raise SourceError(
            f"--holdout {share:g} is not for {options.command}: {why}. It is for {names}, without --split"
        )
    for name in ("split_column", "lists", "split"):
        if given := getattr(options, name, None):
            words = " ".join(map(str, given)) if isinstance(given, list) else given
            raise SourceError(
                f"--holdout {share:g} makes the splits train and val by itself, so it does not go with "
                f"--{name.replace('_', '-')} {words}: give one of the two"
            )


_DIVIDED = {
    "karpathy": "its file says which split each picture belongs to",
    "img2dataset": "its shards are taken as they are",
}
"""commands whose samples have a split, or stay where they are"""


def coco(parser: Parser) -> Reader:
    """COCO."""
    _file(parser, "--captions", "captions_train2017.json or one like it")
    _file(parser, "--instances", "instances_train2017.json: boxes and masks")
    _file(parser, "--stuff", "stuff_train2017.json: its masks become a label map")
    _folder(parser, "--stuff-maps", "stuffthingmaps/train2017: label maps of 0 to 181")
    _file(parser, "--stuff-labels", "COCO-Stuff's labels.txt, which names them")
    _file(parser, "--panoptic", "panoptic_train2017.json")
    _folder(parser, "--panoptic-maps", "its folder of PNGs")
    parser.add_argument("--captioned-only", action="store_true", help="leave out pictures without captions")
    _split(parser)

    def read(options: argparse.Namespace) -> Source:
        names = ("captions", "instances", "stuff", "stuff_maps", "stuff_labels", "panoptic", "panoptic_maps")
        files = CocoFiles(**{name: getattr(options, name) for name in names})
        return read_coco(files, options.images, split=options.split, captioned_only=options.captioned_only)

    return read


def karpathy(parser: Parser) -> Reader:
    """Karpathy's splits."""
    _file(parser, "--json", "dataset_flickr8k.json or one like it", required=True)
    parser.add_argument(
        "--restval-into-train", action=argparse.BooleanOptionalAction, default=True,
        help="put COCO's restval pictures into train (default: yes); if not, they are a split of their own",
    )  # fmt: skip
    add_holdout(parser, supported=False)
    return lambda options: read_karpathy(
        options.json, options.images, restval_into_train=options.restval_into_train
    )


def flickr(parser: Parser) -> Reader:
    """Flickr30k's token file."""
    _file(parser, "--tokens", "results_20130124.token or Flickr8k.token.txt", required=True)
    parser.add_argument(
        "--lists", type=Path, nargs="+", default=[], metavar="FILE",
        help="train.txt val.txt test.txt: the pictures of each split (default: all belong to --split)",
    )  # fmt: skip
    _split(parser)
    return lambda options: read_flickr(
        options.tokens, options.images, lists=options.lists, split=options.split
    )


def vqa(parser: Parser) -> Reader:
    """VQA v2 and OK-VQA."""
    _file(parser, "--questions", "v2_OpenEnded_mscoco_train2014_questions.json or OK-VQA's", required=True)
    _file(parser, "--annotations", "v2_mscoco_train2014_annotations.json or OK-VQA's; a test split has none")
    parser.add_argument(
        "--image-pattern", metavar="NAME",
        help="names of the pictures, such as 'COCO_{subtype}_{id:012d}.jpg' (default: found by trying)",
    )  # fmt: skip
    _split(parser)
    return lambda options: read_vqa(
        options.questions, options.images, annotations=options.annotations, split=options.split, pattern=options.image_pattern
    )  # fmt: skip


def visual_genome(parser: Parser) -> Reader:
    """Visual Genome."""
    _file(parser, "--regions", "region_descriptions.json")
    _file(parser, "--objects", "objects.json")
    _file(parser, "--questions", "question_answers.json")
    _file(parser, "--image-data", "image_data.json: the sizes that boxes are for")
    parser.add_argument(
        "--regions-as-captions", action="store_true", help="the descriptions are the picture's captions, too"
    )
    _split(parser)

    def read(options: argparse.Namespace) -> Source:
        files = GenomeFiles(options.regions, options.objects, options.questions, options.image_data)
        return read_visual_genome(
            files, options.images, split=options.split, regions_as_captions=options.regions_as_captions
        )

    return read


def audioset(parser: Parser) -> Reader:
    """AudioSet."""
    _file(parser, "--segments", "balanced_train_segments.csv, eval_segments.csv ...", required=True)
    _file(parser, "--class-labels", "class_labels_indices.csv: the classes and their order")
    _file(parser, "--ontology", "ontology.json: names the labels, where there is no --class-labels")
    _split(parser)
    return lambda options: read_audioset(
        options.segments, options.images, class_labels=options.class_labels, ontology=options.ontology, split=options.split
    )  # fmt: skip


def masks(parser: Parser) -> Reader:
    """Folders of label maps."""
    _folder(parser, "--maps", "folder of label maps, NAME.png", required=True)
    _file(parser, "--classes", "names of the classes: a line each, or JSON", required=True)
    parser.add_argument(
        "--ignore", type=int, nargs="+", default=[], metavar="N", help="values that are no class, beside 255"
    )
    parser.add_argument(
        "--reduce-zero", action="store_true", help="0 is no class, 1 is class 0, and so on (ADE20K)"
    )
    parser.add_argument(
        "--image-end", default="", metavar="TEXT", help="end of the pictures' names (_leftImg8bit)"
    )
    parser.add_argument(
        "--map-end", default="", metavar="TEXT", help="end of the maps' names (_gtFine_labelTrainIds)"
    )
    _split(parser)
    return lambda options: read_masks(
        options.images, options.maps, options.classes, split=options.split, ignore=options.ignore,
        reduce_zero=options.reduce_zero, image_end=options.image_end, map_end=options.map_end,
    )  # fmt: skip


def csv(parser: Parser) -> Reader:
    """A table."""
    _file(parser, "--csv", "one row per caption", required=True)
    parser.add_argument(
        "--image-column", "--media-column", default="image",
        help="column with the path of the picture, sound or video (default: image)",
    )  # fmt: skip
    parser.add_argument(
        "--caption-column", default="caption", help="column with the caption (default: caption)"
    )
    parser.add_argument("--label-column", help="column with the label; captions are then not needed")
    parser.add_argument(
        "--split-column", help="column with the split's name (default: all pictures belong to --split)"
    )
    parser.add_argument("--delimiter", help="(default: a comma; a tab for .tsv files)")
    _split(parser)
    names = ("image_column", "caption_column", "label_column", "split_column", "split", "delimiter")
    return lambda options: read_csv(
        options.csv, options.images, **{name: getattr(options, name) for name in names}
    )


def folder(parser: Parser) -> Reader:
    """A folder."""
    parser.add_argument(
        "--label-from-folder", action="store_true", help="a file's label is the name of its folder"
    )
    _split(parser)
    return lambda options: read_folder(
        options.images, split=options.split, label_from_folder=options.label_from_folder
    )


COMMANDS: dict[str, tuple[str, str, Callable[[Parser], Reader]]] = {
    "coco": ("COCO: captions, objects, stuff, panoptic segments", COCO, coco),
    "karpathy": ("Karpathy's JSON (Flickr8k, Flickr30k, COCO)", KARPATHY, karpathy),
    "flickr": ("Flickr30k's token file", FLICKR, flickr),
    "vqa": ("VQA v2, OK-VQA", VQA, vqa),
    "visual-genome": ("Visual Genome: regions, objects, questions", GENOME, visual_genome),
    "audioset": ("AudioSet: segments, class labels, ontology", AUDIOSET, audioset),
    "masks": ("pictures and label maps in two folders", MASKS, masks),
    "csv": ("a table with a header", CSV, csv),
    "folder": ("a folder of pictures, sounds, videos, with or without captions", FOLDER, folder),
}


def add_all(commands: argparse._SubParsersAction[Parser]) -> dict[str, Parser]:
    """Adds a subcommand per source; each knows its reader as `options.read`."""
    found = {}
    for name, (text, description, options) in COMMANDS.items():
        parser = commands.add_parser(
            name, help=text, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        _media(parser)
        parser.set_defaults(read=options(parser))
        found[name] = parser
    return found
