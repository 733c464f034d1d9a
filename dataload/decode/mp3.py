"""MP3s by the headers of their frames (ISO/IEC 11172-3 and 13818-3, layer III).

libsndfile reads as many frames as the first one declares, and where it declares nothing, as many as there would be if all were
as large as the first: of a varying bit rate that may be a third of them, and it does not say so.
"""

from __future__ import annotations

import functools
import re
from array import array
from dataclasses import dataclass

_KBITS = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}  # of MPEG 1, and of MPEG 2 and 2.5; 0 is a size that is declared nowhere
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_SAME = 0xFE0C
"""of a header's second and third byte: what all frames of a stream have in common (version, layer, rate)"""
_CANDIDATE = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xef]", re.DOTALL)
"""what may be a header's beginning: layer III, a bit rate"""
_ROW = 4
"""frames in a row that are none by chance"""
_MISSED = 4
"""frames by which a declared number may be too small: encoders count in different ways, and a tenth of a second is little"""
_DELAY = 529
"""samples by which a decoder of layer III is late"""
_TAGS = 16
"""tags in front that are skipped"""


@dataclass(frozen=True)
class _Frames:
    first: int  # where in the bytes the first one with sound begins
    count: int
    declared: int | None  # by one in front of it


def counted(data: bytes) -> bytes:
    """An MP3 as one whose first frame declares all that follow: the same bytes where it does, and where no frames are found."""
    found = _survey(data)
    if found is None or (found.declared is not None and found.count <= found.declared + _MISSED):
        return data
    return _declaration(data[found.first : found.first + 4], found.count) + data[found.first :]


def _survey(data: bytes) -> _Frames | None:
    """None without frames whose sizes their headers tell."""
    sizes, first = _sizes(), _resynced(data, _behind_tags(data), None)
    if first >= len(data):
        return None
    kind = (data[first + 1] << 8 | data[first + 2]) & _SAME
    declared = _declared(data[first : first + 256])
    place = first = first if declared is None else first + sizes[data[first + 1] << 8 | data[first + 2]]
    count, end = 0, len(data) - 3
    while place < end:
        header = data[place + 1] << 8 | data[place + 2]
        if data[place] == 0xFF and header & _SAME == kind and sizes[header]:
            count += 1
            place += sizes[header]
        else:
            place = _resynced(data, place, kind)
    return _Frames(first, count, declared) if count else None


def _resynced(data: bytes, place: int, kind: int | None) -> int:
    """The next place with some frames in a row, of one `kind`, or with frames up to the end; the end without one."""
    sizes = _sizes()
    for candidate in _CANDIDATE.finditer(data, place):
        at, same, row = candidate.start(), kind, 0
        while row < _ROW and at + 3 < len(data) and data[at] == 0xFF:
            header = data[at + 1] << 8 | data[at + 2]
            if not sizes[header] or (same is not None and header & _SAME != same):
                break
            same, row, at = header & _SAME, row + 1, at + sizes[header]
        if row == _ROW or (row > 1 and at + 3 >= len(data)):
            return candidate.start()
    return len(data)


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


def _declared(frame: bytes) -> int | None:
    """What a first frame says: of Xing's header, LAME's ("Info") or Fraunhofer's."""
    for mark, behind in ((b"Xing", 8), (b"Info", 8), (b"VBRI", 14)):
        at = frame.find(mark)
        if at >= 0:
            said = mark == b"VBRI" or frame[at + 4 : at + 8][-1:] and frame[at + 7] & 1
            return int.from_bytes(frame[at + behind : at + behind + 4], "big") if said else None
    return None


def _declaration(header: bytes, count: int) -> bytes:
    """Two silent frames of the same kind. The first says, in Xing's and LAME's headers, that one and so many others follow, and
    how much of the beginning is none of it. mpg123, libsndfile's decoder, takes a decoder's delay away as well where there
    is such a header: the second makes up for it, so that no sample is lost or moved."""
    version, mono = header[1] >> 3 & 3, header[3] >> 6 == 3
    side = (17 if mono else 32) if version == 3 else (9 if mono else 17)
    bits = 5 if version == 3 else 8  # 64 kbit/s: room enough in each version
    start = bytes((0xFF, header[1] | 1, bits << 4 | header[2] & 0x0C, header[3]))
    size = _sizes()[start[1] << 8 | start[2]]
    xing = b"Xing" + (1).to_bytes(4, "big") + (count + 1).to_bytes(4, "big")
    delay = (1152 if version == 3 else 576) - _DELAY
    lame = b"LAME3.100" + bytes(12) + (delay << 12).to_bytes(3, "big")
    return (start + bytes(side) + xing + lame).ljust(size, b"\0") + start.ljust(size, b"\0")


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
