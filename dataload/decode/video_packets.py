"""The frames of a video by time, decoded with as little work as they need.

All packets of the wanted stretch are read first (they are not decoded by that): their times say which frames there are.
Groups of frames without a wanted one are skipped, and inside a group those that no other frame refers to.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from statistics import median
from typing import Any

from dataload.broken import BrokenVideo
from dataload.decode.audio_av import open_container, words

MAX_PACKETS = 1 << 20
"""of one stretch; an hour at 120 frames per second has 432,000"""
_EARLIER = (0.0, 2.0, 10.0)
"""seconds before a time at which a keyframe is looked for, one after the other; then the file is read from its beginning"""
_DEEPEST = 17
"""packets of which one is the first frame that is shown: codecs reorder up to 16"""
_LATER = 1.0
"""seconds by which packets are read beyond the end: they come in the order of decoding"""


class Video:
    """An open video stream, and the packets of a stretch of it.

    `origin` is the time of its first frame and `duration` its declared length (0: unknown), in seconds. `problem` is set
    when something is damaged.
    """

    def __init__(self, data: bytes, max_pixels: int) -> None:
        self._data = data
        self._max_pixels = max_pixels
        self.problem = ""
        self.container: Any
        self._fresh = False
        self._open()
        base = self.stream.time_base or Fraction(1, 90_000)
        self.base = float(base)
        self._rest = self._demuxed()
        self._head = list(itertools.islice(self._rest, _DEEPEST))
        shown = [packet.pts for packet in self._head if packet.pts is not None and not packet.is_discard]
        # Not the stream's start: in AVI that is the time of decoding.
        self.origin = float(min(shown, default=self.stream.start_time or 0) * base)
        self.duration = float((self.stream.duration or 0) * base) or (self.container.duration or 0) / 1e6
        self.declared = self.duration if self.stream.duration or not self.container.streams.audio else 0.0
        """`duration`, where it is the pictures' own and not the sound's"""
        self.timeless = False
        """whether frames are counted: their times are numbers then, and `base` is the time from one to the next"""
        self.packets: list[Any] = []
        self.times: list[int] = []
        """presentation times of the frames in `packets`, in units of `base`, ascending"""

    def _open(self) -> None:
        if hasattr(self, "container"):
            self.container.close()
        self.container = open_container(self._data, BrokenVideo)
        # Pictures of a cover are streams too.
        streams = [s for s in self.container.streams.video if not _is_cover(s)]
        if not streams:
            raise BrokenVideo(
                "no video track, sound alone" if self.container.streams.audio else "no video track"
            )
        self.stream = max(
            streams, key=_area
        )  # of several the first of the largest, as the ffmpeg command does
        codec = self.stream.codec_context
        if codec is None:
            raise BrokenVideo("FFmpeg: no decoder for it")
        self.width, self.height = int(codec.width or 0), int(codec.height or 0)
        if self.width * self.height > self._max_pixels:
            raise BrokenVideo(f"{self.width}x{self.height} pixels, over the limit of {self._max_pixels}")
        codec.thread_count = 1
        codec.options = {"max_pixels": str(self._max_pixels)}
        self._fresh = True  # nothing has been read from it

    def close(self) -> None:
        """Frees what is open."""
        self.packets.clear()
        self.container.close()

    def read(self, start: float, end: float | None) -> None:
        """Reads the packets that frames from `start` to `end` need (seconds from `origin`; None: to the end of the file)."""
        first = (self.origin + start) / self.base
        last = None if end is None else (self.origin + end + _LATER) / self.base
        if start <= 0 or self.timeless or not self._read_from(first, last):
            self._read_from(None, last)
        if not self.timeless and any(packet.pts is None for packet in self.packets):
            self._number()
            self.read(start, end)
            return
        if self.timeless:
            self.times = list(range(len(self.packets)))
        else:  # of an edit list, some packets are for decoding alone
            self.times = sorted({p.pts for p in self.packets if not p.is_discard})

    def _number(self) -> None:
        """From now on frames are counted: raw streams, and AVI with B-frames, do not say when each is shown."""
        rate = self.stream.average_rate or self.stream.base_rate or 25
        self.timeless, self.base, self.origin = True, float(1 / rate), 0.0

    def _read_from(self, first: float | None, last: float | None) -> bool:
        """Reads packets up to the time `last`, in units of `base`, from a keyframe that is shown no later than `first` (None:
        from the file's beginning). False where none was found."""
        if first is None:
            if not self._fresh:
                self._open()
                self._head, self._rest = [], self._demuxed()
            self._fresh = False
            self._take(itertools.chain(self._head, self._rest), last)
            return True
        for earlier in _EARLIER:
            if not self._seek(first - earlier / self.base):
                return False
            packets = self._demuxed()
            for packet in packets:
                if packet.is_keyframe and packet.pts is not None:
                    if packet.pts <= first:
                        self._take(itertools.chain([packet], packets), last)
                        return True
                    break
        return False

    def _take(self, packets: Iterator[Any], last: float | None) -> None:
        self.packets = []
        for packet in packets:
            self.packets.append(packet)
            shown = len(self.packets) if self.timeless else packet.dts
            if last is not None and shown is not None and shown > last:
                break
            if len(self.packets) > MAX_PACKETS:
                raise BrokenVideo(f"more than {MAX_PACKETS} frames in the stretch")

    def _seek(self, time: float) -> bool:
        import av

        self._fresh = False
        try:
            self.container.seek(round(time), stream=self.stream, backward=True, any_frame=False)
        except (av.FFmpegError, OverflowError, ValueError):
            return False
        return True

    def _demuxed(self) -> Iterator[Any]:
        import av

        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except (av.FFmpegError, ValueError, OverflowError) as error:
                self.problem = f"FFmpeg: {words(error)}"
                return
            if packet.size:
                yield packet

    def seconds(self, time: int) -> float:
        """Seconds from `origin`."""
        return time * self.base - self.origin

    def end(self) -> float:
        """Seconds from `origin` at which the last frame that was read ends."""
        steps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        rate = self.stream.average_rate
        last = median(steps) * self.base if steps else float(1 / rate) if rate else 0.0
        return self.seconds(self.times[-1]) + last

    def at(self, second: float) -> int:
        """Time, in units, of the frame that is shown at a second from `origin`."""
        place = bisect_right(self.times, (self.origin + second) / self.base + 1e-6)
        return self.times[max(0, place - 1)]

    def frames(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """(time, decoded frame) of these times, ascending. Those that do not come are then no longer in `times`; after damage
        `problem` is set, and `times` ends before it."""
        left = sorted(set(wanted))
        for hurry in (
            (False,) if self.timeless else (True, False)
        ):  # a decoder that drops more than it should is asked again
            for time, frame in self._decoded(left, hurry):
                left.remove(time)
                yield time, frame
            if not left or self.problem:
                return
        self.times = [time for time in self.times if time < left[0] or not self.timeless and time not in left]

    def _decoded(self, wanted: Sequence[int], hurry: bool) -> Iterator[tuple[int, Any]]:
        """The frames of `wanted` that come. With `hurry` frames that nobody refers to are dropped undecoded."""
        import av

        todo, codec = set(wanted), self.stream.codec_context
        keys = [i for i, packet in enumerate(self.packets) if packet.is_keyframe and not self.timeless]
        at, came, counter = 0, None, itertools.count()
        codec.flush_buffers()
        while todo and at <= len(self.packets):
            # Decoding starts at the last keyframe that is shown no later than the frame, if it is not beyond that already.
            key = max((i for i in keys if self.packets[i].pts <= min(todo)), default=0)
            if key > at:
                at, came = key, None
                codec.flush_buffers()
            packet = self.packets[at] if at < len(self.packets) else None
            needed = packet is None or packet.pts in todo or not hurry
            codec.skip_frame = "DEFAULT" if needed else "NONREF"
            try:
                found = codec.decode(packet)
            except (av.FFmpegError, ValueError, OverflowError) as error:
                self._cut(came, key, words(error))
                return
            at += 1
            for frame in found:
                if frame.is_corrupt:
                    self._cut(came, key, "damaged frames")
                    return
                came = next(counter) if self.timeless else frame.pts if frame.pts is not None else came
                if came in todo:
                    todo.remove(came)
                    yield came, frame
            # What was passed will not come any more.
            todo -= {time for time in todo if came is not None and time < came}

    def _cut(self, came: int | None, key: int, reason: str) -> None:
        """Ends the stretch after the last frame that came of the group of the packet `key`, or before that group."""
        first = (self.packets[key].pts or 0) if self.packets and not self.timeless else 0
        self.times = [time for time in self.times if (time < first if came is None else time <= came)]
        end = f"{self.seconds(self.times[-1]):.2f} s" if self.times else "its beginning"
        self.problem = f"FFmpeg: {reason}, after {end}"


def _area(stream: Any) -> int:
    codec = stream.codec_context
    return int((codec.width or 0) * (codec.height or 0)) if codec else 0


def _is_cover(stream: Any) -> bool:
    import av

    return bool(stream.disposition & av.stream.Disposition.attached_pic)
