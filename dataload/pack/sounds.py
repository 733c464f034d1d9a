"""Sound and video files on their way into a shard: kept byte for byte, looked at only where that is asked for."""

from __future__ import annotations

from importlib.util import find_spec

from dataload import sandbox
from dataload.broken import BrokenSample

MODULES = {"audio": ("av", "soundfile", "soxr"), "video": ("av", "soundfile", "soxr", "PIL.Image")}
TIMEOUT = 120.0
"""seconds to decode a file"""
MAX_PIXELS = 4096 * 2304


def fault(data: bytes, kind: str, *, verify: bool, workers: int = 1) -> str:
    """Why a file of this kind ("audio" or "video") cannot be packed; empty = it can.

    `verify` decodes it, in a child process: a sound whole, of a video 32 frames and its sound. Raises ImportError where the
    packages for it are not here.
    """
    if not data:
        return "an empty file"
    if not verify:
        return ""
    missing = [name for name in MODULES[kind] if "." not in name and find_spec(name) is None]
    if missing:
        raise ImportError(
            f"--verify decodes sounds and videos: pip install 'auroraio[data]' ({', '.join(missing)} missing)"
        )
    try:
        problem: str = sandbox.shared(workers).call(
            f"dataload.verify_checks:{kind}", data, MAX_PIXELS, timeout=TIMEOUT, needs=MODULES[kind]
        )
    except BrokenSample as error:
        return str(error)
    return problem
