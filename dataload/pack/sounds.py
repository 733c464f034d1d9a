"""Sound and video files on their way into a shard: kept byte for byte, looked at only where that is asked for."""

from __future__ import annotations

import io


def fault(data: bytes, kind: str, *, verify: bool) -> str:
    """Why a file of this kind ("audio" or "video") cannot be packed; empty = it can.

    `verify` opens it: a sound by soundfile or PyAV, a video by PyAV. Raises ImportError where neither is here.
    """
    if not data:
        return "an empty file"
    if not verify:
        return ""
    try:
        return _fault(data, kind)
    except ImportError as error:
        raise ImportError(
            f"--verify opens sounds and videos: pip install 'auroraio[data]' ({error})"
        ) from error


def _fault(data: bytes, kind: str) -> str:
    if kind == "audio":
        import soundfile

        try:
            return "" if soundfile.info(io.BytesIO(data)).frames > 0 else "no samples"
        except soundfile.LibsndfileError:
            pass  # AAC and others, which PyAV may know
    import av

    try:
        with av.open(io.BytesIO(data), "r") as container:
            streams = container.streams.video if kind == "video" else container.streams.audio
            if not streams:
                return f"no {kind} in it"
            return "" if next(container.decode(streams[0]), None) is not None else f"no {kind} can be decoded"
    except (av.FFmpegError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
