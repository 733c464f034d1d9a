"""MP3s by the headers of their frames (ISO/IEC 11172-3 and 13818-3, layer III).

libsndfile reads as many frames as the first one declares, and where it declares nothing, as many as there would be if all were
as large as the first: of a varying bit rate that may be a third of them, and it does not say so.
"""

from __future__ import annotations

import functools
import re
from array import array

DELAY = 529
"""samples by which a decoder of layer III is late. mpg123, libsndfile's decoder, takes them away where a first frame declares
how many follow, and only there"""
_KBITS = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}  # of MPEG 1, and of MPEG 2 and 2.5; 0 is a size that is declared nowhere
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_SAME = 0xFE0C
"""of a header's second and third byte: what all frames of a stream have in common (version, layer, rate)"""
_CANDIDATE = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xef]", re.DOTALL)
"""what may be a header's beginning: layer III, a bit rate"""
_OTHERS = (b"RIFF", b"FORM", b"fLaC", b"OggS")
"""what may stand behind tags instead"""
_ROW = 4
"""frames in a row that are none by chance"""
_TRIES = 50_000
"""candidates that turn out to be none, until nothing is counted: a tenth of a second"""
_MISSED = 4
"""frames by which a declared number may be too small: encoders count in different ways, and a tenth of a second is little"""
_TAGS = 16
"""tags in front that are skipped"""


def counted(data: bytes) -> tuple[bytes, int]:
    """(an MP3 whose first frame declares all that follow, samples that libsndfile loses at its beginning by that): the same
    bytes and 0 where it does already, and where no frames are found."""
    start = _behind_tags(data)
    if data[start : start + 4] in _OTHERS:
        return data, 0
    survey = _Survey(data, start)
    first = survey.first
    if first >= len(data):
        return data, 0
    mark = re.search(rb"Xing|Info", data[first : first + 64])
    if mark is None:
        count = survey.count(first)
        if count <= 0 or not survey.varies:  # where all are as large, libsndfile is right
            return data, 0
        return _declaration(data[first : first + 4], count) + data[first:], DELAY
    place = first + mark.start()
    if len(data) < place + 12 or not data[place + 7] & 1:  # it does not say how many
        return data, 0
    count = survey.count(first + survey.sizes[data[first + 1] << 8 | data[first + 2]])
    if count <= int.from_bytes(data[place + 8 : place + 12], "big") + _MISSED:
        return data, 0
    out = bytearray(data)
    out[place + 8 : place + 12] = count.to_bytes(4, "big")
    # LAME's part: what is to be cut off at the end is not at the end of all this.
    fields = data[place + 7]
    lame = place + 12 + 4 * (fields >> 1 & 1) + 100 * (fields >> 2 & 1) + 4 * (fields >> 3 & 1)
    if lame + 24 <= len(out):
        out[lame + 22] &= 0xF0
        out[lame + 23] = 0
    return bytes(out), 0


class _Survey:
    """The frames in some bytes. `first` is where the first one begins; the end without one. `varies` is whether those that were
    counted last differ in bit rate."""

    def __init__(self, data: bytes, start: int) -> None:
        self.data, self.sizes, self._tries = data, _sizes(), _TRIES
        self.varies = False
        self.first = start if self._row(start, None) > 1 else self._next(start)

    def count(self, place: int) -> int:
        """Frames from one on; -1 for bytes that look like frames too often."""
        data, sizes, end = self.data, self.sizes, len(self.data) - 3
        count, kind, bits = 0, None, set()
        while place < end:
            header = data[place + 1] << 8 | data[place + 2]
            if data[place] == 0xFF and sizes[header] and (kind is None or header & _SAME == kind):
                count, kind = count + 1, header & _SAME
                bits.add(header & 0xF0)
                place += sizes[header]
            else:
                # Perhaps of another rate: libsndfile stops there, and the count tells.
                place, kind = self._next(place), None
        self.varies = len(bits) > 1
        return count if self._tries else -1

    def _next(self, place: int) -> int:
        """The next place with some frames in a row, or with frames up to the end; the end without one."""
        for candidate in _CANDIDATE.finditer(self.data, place):
            if not self._tries:
                break
            if self._row(candidate.start(), 1) >= _ROW:
                return candidate.start()
            self._tries -= 1
        return len(self.data)

    def _row(self, place: int, least: int | None) -> int:
        """Frames in a row, up to _ROW; as many where more than `least` of them reach the end."""
        row, kind = 0, None
        while row < _ROW and place + 3 < len(self.data) and self.data[place] == 0xFF:
            header = self.data[place + 1] << 8 | self.data[place + 2]
            if not self.sizes[header] or (kind is not None and header & _SAME != kind):
                return row
            row, kind, place = row + 1, header & _SAME, place + self.sizes[header]
        return _ROW if least is not None and row > least and place + 3 >= len(self.data) else row


def _behind_tags(data: bytes) -> int:
    """Where the ID3v2 tags in front end."""
    place = 0
    for _ in range(_TAGS):
        if data[place : place + 3] != b"ID3" or len(data) < place + 10:
            break
        size = sum(
            byte << shift for byte, shift in zip(data[place + 6 : place + 10], (21, 14, 7, 0), strict=True)
        )
        place += 10 + size + (10 if data[place + 5] & 0x10 else 0)  # a footer
    return min(place, len(data))


def _declaration(header: bytes, count: int) -> bytes:
    """A frame of the same kind with Xing's header, which is not played: so many frames follow."""
    version, mono = header[1] >> 3 & 3, header[3] >> 6 == 3
    side = (17 if mono else 32) if version == 3 else (9 if mono else 17)
    bits = 5 if version == 3 else 8  # 64 kbit/s: room enough in each version
    start = bytes((0xFF, header[1] | 1, bits << 4 | header[2] & 0x0C, header[3]))
    xing = b"Xing" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    return (start + bytes(side) + xing).ljust(_sizes()[start[1] << 8 | start[2]], b"\0")


@functools.cache
def _sizes() -> array[int]:
    """Of the frame behind a header, by its second and third byte; 0 for what is no header of layer III, or does not tell."""
    sizes = array("H", bytes(2 << 16))
    for version, rates in _RATES.items():
        for checked in (0, 1):
            second = 0xE0 | version << 3 | 1 << 1 | checked
            for index, kbits in enumerate(_KBITS[3 if version == 3 else 2]):
                for place, rate in enumerate(rates):
                    for last in range(4):
                        size = (144_000 if version == 3 else 72_000) * kbits // rate
                        sizes[second << 8 | index << 4 | place << 2 | last] = (
                            size + (last >> 1) if size else 0
                        )
    return sizes
