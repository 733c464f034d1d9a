"""Which files are pictures, sounds and videos, by their names."""

from __future__ import annotations

from pathlib import PurePath

from dataload.tarindex import IMAGE_EXTENSIONS

AUDIO_EXTENSIONS = frozenset("wav flac mp3 ogg oga opus m4a aac aif aiff wma".split())
VIDEO_EXTENSIONS = frozenset("mp4 m4v mov mkv webm avi mpg mpeg ts wmv flv ogv 3gp".split())
KINDS = {"image": IMAGE_EXTENSIONS, "audio": AUDIO_EXTENSIONS, "video": VIDEO_EXTENSIONS}


def suffix_of(path: PurePath) -> str:
    """The suffix in small letters, without its dot."""
    return path.suffix.lower().lstrip(".")


def kind_of(path: PurePath) -> str:
    """ "image", "audio", "video", or "" for any other file."""
    suffix = suffix_of(path)
    return next((kind for kind, suffixes in KINDS.items() if suffix in suffixes), "")
