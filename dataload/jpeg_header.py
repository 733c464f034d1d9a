"""The size of an everyday JPEG, in a fiftieth of the time that Pillow takes to open it."""

from __future__ import annotations

_SOI, _SOS = 0xD8, 0xDA
_FRAMES = (0xC0, 0xC1)
"""baseline and extended, Huffman-coded"""
_HARMLESS = (0xC4, 0xDB, 0xDD, 0xE0, 0xE2, 0xED, 0xEE, 0xFE)
"""tables, restart interval; JFIF, colour profile, Photoshop, Adobe, comment"""


def everyday_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG (ITU-T T.81, B.2) of 8-bit grey or three components, all in one scan, whose header is whole and
    holds no APP1: nothing can say then that the picture is to be turned. None for every other file: let Pillow see what it
    is."""
    size, scanned, at = None, 0, 2
    try:
        if data[0] != 0xFF or data[1] != _SOI:
            return None
        while True:
            if data[at] != 0xFF:
                return None
            marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
            if length < 2 or at + 2 + length > len(data):
                return None
            if marker == _SOS:
                return size if data[at + 4] == scanned else None
            if marker in _FRAMES:
                precision, height, width, components = (
                    data[at + 4],
                    int.from_bytes(data[at + 5 : at + 7], "big"),
                    int.from_bytes(data[at + 7 : at + 9], "big"),
                    data[at + 9],
                )
                if size or precision != 8 or components not in (1, 3) or length != 8 + 3 * components:
                    return None
                if not (width and height):
                    return None
                size, scanned = (width, height), components
            elif marker not in _HARMLESS:
                return None
            at += 2 + length
    except IndexError:
        return None
