"""Sound through FFmpeg's libraries, by PyAV: what libsndfile does not read, or reads more slowly."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from dataload.broken import BrokenAudio, BrokenSample, CannotSeek

BLOCK = 1 << 16
"""samples per block"""
PACKETS, STEP = 4, 1 << 14
"""Packets demuxed, decoded and gathered at a time, so that each step finds its code and data in the caches; the samples that
they may have together."""
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,ogg,flac,mp3,wav,w64,aiff,au,caf,asf,avi,flv,mpeg,mpegts,mpegvideo,"
    "aac,ac3,eac3,dts,amr,ape,wv,tta,tak,mpc,mpc8,dsf,gif,ivf,h264,hevc,m4v,mxf,nut,rm,voc,y4m,yuv4mpegpipe"
)
"""FFmpeg's demuxers that may open a file. Not those of playlists (HLS, DASH, concat, SDP), which would open other files and
addresses that are named in it."""
_BARE = ("mp3", "aac", "ac3", "eac3", "dts", "amr", "h264", "hevc", "m4v", "mpegvideo")
"""FFmpeg's demuxers of streams without a container: nothing in them says how long they are, and FFmpeg reckons"""
_MOST = 1 << 14
"""samples per byte of a file; what declares more (FFmpeg of ADPCM in W64: millions of years) declares nothing"""
_TOLD = {"ogg": ("vorbis", "opus"), "flac": ("flac",), "mov": ("aac",)}
"""FFmpeg's codecs by its containers, where headers of the sound itself tell all that must be known before decoding. MP4's own
header says as much of others, but players ignore it: it is wrong in some files, and has no room for 96,000 samples a second."""
LATE = 0.1
"""seconds that may be missing at the beginning, and become silence"""
_SCALE = {"u8": 1 / 128, "s16": 1 / 32768, "s32": 1 / 2**31, "s64": 1 / 2**63, "flt": 1.0, "dbl": 1.0}
_TYPES = {
    "u8": np.uint8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "flt": np.float32,
    "dbl": np.float64,
}


def container_of(data: bytes) -> str | None:
    """FFmpeg's name of the container, where the first bytes tell at once."""
    starts = {b"OggS": "ogg", b"fLaC": "flac"}
    return "mov" if data[4:8] == b"ftyp" else starts.get(data[:4])


def open_container(data: bytes, broken: type[BrokenSample], *, trusting: bool = False) -> Any:
    """An av.container.InputContainer of bytes, of the kinds above alone. FFmpeg decodes a little of each stream to see what is
    in it; not where it is `trusting`, and refuses what the headers do not tell all about. Raises `broken`, or ImportError."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"sound and video need PyAV ({error}): pip install 'auroraio[data]'") from error
    av.logging.set_level(None)
    # PyAV 19 escapes what is no UTF-8 of its own accord, and does not take this any more
    text: dict[str, Any] = (
        {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
    )
    likely = container_of(data)
    kinds = (likely,) if trusting else dict.fromkeys((likely, None))  # None: all demuxers look at it
    options = {"format_whitelist": CONTAINERS} | ({"codec_whitelist": "none"} if trusting else {})
    reason = ""
    for kind in kinds:
        try:
            container = av.open(io.BytesIO(data), format=kind, options=options, **text)
        except (av.FFmpegError, ValueError, TypeError, OverflowError, UnicodeError) as error:
            reason = words(error)
            continue
        if not trusting or _told(container):
            return container
        container.close()
        reason = "its headers do not tell all"
    raise broken(f"FFmpeg: {reason}")


def _told(container: Any) -> bool:
    """Whether the headers tell all about the first sound track of a container that was opened without decoders."""
    if not container.streams.audio:
        return False
    codec = container.streams.audio[0].codec_context
    kinds = _TOLD.get(str(container.format.name).split(",")[0], ())
    if codec is None or codec.name not in kinds or not codec.sample_rate or not codec.channels:
        return False
    if codec.name != "aac":
        return True
    # ISO/IEC 14496-3, 1.6.2: five bits for the kind, 2 for the plain one; four for the rate, 5 for 32,000 and less for more. A
    # stream of fewer may be the lower half of another (SBR), and a mono one then stereo (PS), which headers need not mention.
    first = int.from_bytes((codec.extradata or b"")[:2].ljust(2, b"\xff"), "big")
    return first >> 11 == 2 and first >> 7 & 15 <= 5


def words(error: Exception) -> str:
    """What FFmpeg says, without file names and numbers."""
    return str(getattr(error, "strerror", "") or f"{type(error).__name__}: {error}")


class AvReader:
    """A sound stream of a container; see audio.Reader. `trusting`: as in `open_container`; where the headers lied, reading
    raises BrokenAudio."""

    def __init__(self, data: bytes, *, trusting: bool = False) -> None:
        self.problem = ""
        self._data, self._trusting = data, trusting
        self._container: Any = None
        self._open()
        self.frames = self._declared()
        self.exact = self._kind not in _BARE
        if data.startswith(b"OggS") and not _ends(data):
            self.problem = "cut short: its last page is missing"

    def _open(self) -> None:
        """From the beginning. (Seeking to it loses frames in some containers.)"""
        if self._container is not None:
            self._container.close()
        self._container = open_container(self._data, BrokenAudio, trusting=self._trusting)
        self._used = False
        self._kind = str(self._container.format.name)
        try:
            if not self._container.streams.audio:
                raise BrokenAudio("no sound track")
            self._stream = self._container.streams.audio[0]
            codec = self._stream.codec_context
            if codec is None:
                raise BrokenAudio("FFmpeg: no decoder for its sound")
            codec.thread_count = 1
            self.rate, self.channels = int(codec.sample_rate or 0), int(codec.channels or 0)
        except BaseException:
            self._container.close()
            raise

    @property
    def start(self) -> float:
        """Seconds, of the container's time, at which the sound begins."""
        return float((self._stream.start_time or 0) * (self._stream.time_base or 0))

    def _declared(self) -> int:
        if self._stream.duration and self._stream.time_base:
            frames = round(float(self._stream.duration * self._stream.time_base) * self.rate)
        else:
            frames = round((self._container.duration or 0) / 1e6 * self.rate)
        return frames if 0 < frames <= _MOST * len(self._data) else 0

    def __enter__(self) -> AvReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the container."""
        self._container.close()

    def blocks(self, first: int, count: int | None) -> Iterator[np.ndarray]:
        """See Reader."""
        import av

        if not first and self._used:
            self._open()
        origin = self._stream.start_time or 0
        base, skip = self._stream.time_base or Fraction(1, self.rate), 0
        self._used = True
        if first:
            try:
                target = origin + int(first / self.rate / base)
                self._container.seek(target, stream=self._stream, backward=True, any_frame=False)
            except (av.FFmpegError, OverflowError, ValueError):
                raise CannotSeek("FFmpeg: cannot seek in it") from None
        decoded = self._decoded()
        frames = next(decoded, [])
        head = frames[0] if frames else None
        if head is not None and head.sample_rate != self.rate:
            raise BrokenAudio(f"FFmpeg: {self.rate} samples per second declared, {head.sample_rate} decoded")
        if head is None and first and self.problem:  # it landed in the middle of something
            self.problem = ""
            raise CannotSeek("FFmpeg: seeking in it is not exact")
        if head is None:
            return
        if head.pts is not None:
            skip = first - round(float((head.pts - origin) * base) * self.rate)
        elif first:
            raise CannotSeek("FFmpeg: its frames have no times")
        if skip < 0:
            if first:
                raise CannotSeek("FFmpeg: seeking in it is not exact")
            if -skip > LATE * self.rate:
                raise BrokenAudio(f"FFmpeg: its sound begins {-skip} samples late")
            yield np.zeros(-skip, np.float32)  # FFmpeg's Vorbis decoder drops the first 128
        wanted = None if count is None else max(0, skip) + count
        for block in self._gathered(itertools.chain([frames], decoded), wanted):
            if skip < len(block):
                yield block[skip:] if skip > 0 else block
            skip = max(0, skip - len(block))

    def _decoded(self) -> Iterator[list[Any]]:
        """The frames of some packets at a time, up to the first damage, which `problem` then names."""
        import av

        damage = (av.FFmpegError, ValueError, OverflowError)
        demuxed, decode = self._container.demux(self._stream), self._stream.codec_context.decode
        size, problem = 1, ""
        while not problem:
            packets: list[Any] = []
            frames: list[Any] = []
            try:
                for packet in itertools.islice(demuxed, size):
                    packets.append(packet)
            except damage as error:
                problem = f"FFmpeg: {words(error)}"
            ended = len(packets) < size
            try:
                for packet in packets:
                    frames += decode(packet)
            except damage as error:
                problem = f"FFmpeg: {words(error)}"
            if frames:
                size = max(1, min(PACKETS, STEP // max(1, frames[-1].samples)))
                yield frames
            if ended:
                break
        if problem:  # now that somebody wants what lies behind
            self.problem = problem

    def _gathered(self, decoded: Iterable[list[Any]], wanted: int | None) -> Iterator[np.ndarray]:
        """Mono blocks of many frames each: a frame is 20 ms, and Python is slow. The last of `wanted` samples are not
        kept until a block is full. Ends where the rate changes."""
        import av

        fifo, channels = av.AudioFifo(), 0
        left = sys.maxsize if wanted is None else wanted
        for frames in decoded:
            for frame in frames:
                frame.pts = None  # gaps are closed
                # It holds frames of one kind, and does not look at their channels itself.
                taken = frame.layout.nb_channels == channels
                if taken:
                    try:
                        fifo.write(frame)
                    except ValueError:
                        taken = False
                if not taken:
                    if fifo.samples:
                        left -= fifo.samples
                        yield mono(fifo.read())
                    if frame.sample_rate != self.rate:
                        self.problem = f"its rate changes from {self.rate} to {frame.sample_rate}"
                        return
                    fifo, channels = av.AudioFifo(), frame.layout.nb_channels
                    fifo.write(frame)
            if fifo.samples >= min(BLOCK, left):
                left -= fifo.samples
                yield mono(fifo.read())
        if fifo.samples:
            yield mono(fifo.read())


def mono(frame: Any) -> np.ndarray:
    """float32 [n]: the mean of a frame's channels, in the frame's own memory where it can be."""
    from av.audio.plane import AudioPlane

    plane_of: Any = AudioPlane
    kind, channels = frame.format.name.removesuffix("p"), frame.layout.nb_channels
    weight = np.float32(_SCALE[kind] / channels)
    # From the planes themselves: PyAV's to_ndarray copies them together first. One by one: where there are eight and more, its
    # tuple of them has some that are none.
    if frame.format.is_planar or channels == 1:
        planes = [np.frombuffer(plane_of(frame, i), _TYPES[kind], frame.samples) for i in range(channels)]
        if kind in ("u8", "s16"):  # of which float32 holds the sums exactly
            out = planes[0].astype(np.float32)
            for plane in planes[1:]:
                out += plane
            out *= weight
        else:
            scaled = [np.multiply(plane, weight, out=plane if kind == "flt" else None) for plane in planes]
            out = scaled[0]
            for plane in scaled[1:]:
                out += plane
    else:
        values = np.frombuffer(plane_of(frame, 0), _TYPES[kind], frame.samples * channels).reshape(
            -1, channels
        )
        out = values.astype(np.float32, copy=False) @ np.full(channels, weight)
    out = out.astype(np.float32, copy=False)
    return out - np.float32(1) if kind == "u8" else out


def _ends(data: bytes) -> bool:
    """Whether the last page of an Ogg file is marked as the last of its stream (RFC 3533)."""
    last = data.rfind(b"OggS")
    return len(data) > last + 5 and bool(data[last + 5] & 4)
