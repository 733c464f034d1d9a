"""Clips: the frames that a player shows at a time, upright, with their sound; bad files cost one sample. The truth is the
ffmpeg command, another build of FFmpeg, which decodes everything in order."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataload import images, video
from dataload.broken import BrokenSample
from dataload.decode import crops
from dataload.sandbox import Sandbox
from dataload.video import BrokenVideo, Clip
from tests.test_dataload_audio import mutated

pytest.importorskip("av", reason="needs av: pip install 'auroraio[data]'")
X264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", "veryfast")


@functools.cache
def made(
    name: str, *options: str, seconds: float = 2.0, size: str = "160x120", rate: int = 25, sound: bool = True
) -> bytes:
    """A moving test picture and a rising tone, encoded by the ffmpeg command in a file called `name`."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs the ffmpeg command to make the file")
    picture = f"testsrc2=size={size}:rate={rate}:duration={seconds}"
    tone = f"aevalsrc='0.4*sin(2*PI*(300*t+200*t*t))':s=44100:d={seconds}"
    inputs = ["-f", "lavfi", "-i", picture, *(["-f", "lavfi", "-i", tone] if sound else [])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        subprocess.run(["ffmpeg", "-v", "error", *inputs, *options, str(path)], check=True, timeout=120)
        return path.read_bytes()


def raw(data: bytes, *options: str) -> bytes:
    """What the ffmpeg command writes of it to a pipe."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = ["ffmpeg", "-v", "quiet", "-i", file.name, *options, "-"]
        return subprocess.run(command, stdout=subprocess.PIPE, timeout=60).stdout


@functools.cache
def all_frames(data: bytes, height: int, width: int) -> np.ndarray:
    """uint8 [frames, H, W, 3]: each frame once, in order, upright."""
    found = np.frombuffer(raw(data, "-vsync", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24"), np.uint8)
    return found[: len(found) // (height * width * 3) * (height * width * 3)].reshape(-1, height, width, 3)


@functools.cache
def shown_at(data: bytes, stream: str = "v:0") -> np.ndarray:
    """float64 [frames]: the times of all frames, ascending, from the first on, by ffprobe; at 25 per second where it is
    silent."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = ["ffprobe", "-v", "quiet", "-select_streams", stream, "-of", "json"]
        said = subprocess.run(
            [*command, "-show_entries", "frame=best_effort_timestamp_time", file.name],
            stdout=subprocess.PIPE,
            check=True,
        )
    frames = json.loads(said.stdout)["frames"]
    if not all("best_effort_timestamp_time" in frame for frame in frames):
        return np.arange(len(frames)) / 25
    times = sorted(float(frame["best_effort_timestamp_time"]) for frame in frames)
    return np.array(times) - times[0]


CODECS: dict[str, tuple[str, ...]] = {
    "h264.mp4": X264, "bframes.mp4": (*X264, "-bf", "3", "-g", "25"), "h264.mkv": (*X264, "-g", "10"),
    "opengop.mp4": ("-c:v", "libx265", "-x265-params", "log-level=0:keyint=20:open-gop=1", "-pix_fmt", "yuv420p"),
    "mpeg4.avi": ("-c:v", "mpeg4", "-bf", "2"), "vp9.webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"),
    "vp8.webm": ("-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", "8"), "mpeg2.ts": ("-c:v", "mpeg2video", "-bf", "2"),
    "h264.ts": (*X264, "-bf", "2"),
    "mjpeg.mov": ("-c:v", "mjpeg", "-pix_fmt", "yuvj420p"), "mpeg1.mpg": ("-c:v", "mpeg1video", "-bf", "2"),
    "theora.ogv": ("-c:v", "libtheora", "-c:a", "libvorbis"), "h264.flv": X264,
    "fragmented.mp4": (*X264, "-movflags", "frag_keyframe+empty_moov"),
    "variable.mkv": (*X264, "-vf", "select='not(mod(n,3))+lt(n,20)'", "-vsync", "vfr"),
}  # fmt: skip


@pytest.mark.parametrize("name", CODECS)
def test_the_frames_are_those_shown_at_their_times(name: str) -> None:
    """Every frame equals the command's at the place that its time has among all times."""
    data = made(name, *CODECS[name])
    clip = video.decode(data, frames=7)
    truth, times = all_frames(data, 120, 160), shown_at(data)
    assert clip.problem == "" and len(truth) == len(times)
    middles = clip.start + clip.seconds * (np.arange(7) + 0.5) / 7
    wanted = np.searchsorted(times, middles + 1e-6, side="right") - 1
    assert np.allclose(clip.times, times[wanted], atol=2e-3)
    assert np.array_equal(clip.frames, truth[wanted])
    assert clip.sound is not None and abs(len(clip.sound) / 16000 - clip.seconds) < 0.1


@pytest.mark.parametrize(
    "name", ["bframes.mp4", "opengop.mp4", "mpeg4.avi", "vp9.webm", "mpeg2.ts", "mpeg1.mpg", "variable.mkv"]
)
def test_a_stretch_in_the_middle_is_the_same_frames(name: str) -> None:
    data = made(name, *CODECS[name])
    truth, times = all_frames(data, 120, 160), shown_at(data)
    for start in (0.3, 0.77, 1.2):
        clip = video.decode(data, frames=4, start=start, seconds=0.7)
        middles = start + 0.7 * (np.arange(4) + 0.5) / 4
        wanted = np.searchsorted(times, middles + 1e-6, side="right") - 1
        assert clip.start == start and clip.seconds == pytest.approx(0.7)
        assert np.array_equal(clip.frames, truth[wanted]), (name, start)


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "mpeg2.ts", "mpeg1.mpg", "mpeg4.avi"])
def test_the_sound_is_that_of_the_same_time(name: str) -> None:
    """The tone rises, so that its pitch tells the time: 300 + 400 t Hz."""
    clip = video.decode(made(name, *CODECS[name]), frames=1, start=0.7, seconds=1.0)
    assert clip.sound is not None and abs(len(clip.sound) - 16000) <= 1
    for place in (0.1, 0.5, 0.8):
        piece = clip.sound[int(place * 16000) :][:1600] * np.hanning(1600)
        pitch = np.abs(np.fft.rfft(piece, 1 << 16)).argmax() * 16000 / (1 << 16)
        assert (pitch - 300) / 400 == pytest.approx(0.7 + place + 0.05, abs=0.03)


def test_sound_that_begins_later_begins_with_silence() -> None:
    data = made(
        "late.mkv", *X264, "-filter_complex", "[1:a]asetpts=PTS+1/TB[a]", "-map", "0:v", "-map", "[a]"
    )
    clip = video.decode(data, frames=1, start=0.5, seconds=1.0)
    assert clip.sound is not None and len(clip.sound) == 16000
    assert np.abs(clip.sound[:7500]).max() < 1e-3 < 0.1 < np.abs(clip.sound[9000:]).max()


def test_jitter_is_a_random_time_in_each_part_and_the_generator_alone_decides() -> None:
    data = made("h264.mp4", *X264)
    seen = []
    for seed in range(12):
        clip = video.decode(data, frames=5, rng=np.random.default_rng(seed), sound=False)
        parts = np.arange(6) * clip.seconds / 5
        assert (clip.times >= parts[:-1] - 0.04 - 1e-6).all() and (clip.times < parts[1:]).all()
        seen.append(clip.times)
    assert len({tuple(times) for times in seen}) == 12
    again = video.decode(data, frames=5, rng=np.random.default_rng(3), sound=False)
    assert np.array_equal(again.times, seen[3])
    starts = [
        video.decode(data, frames=1, seconds=0.5, rng=np.random.default_rng(s), sound=False).start
        for s in range(20)
    ]
    assert min(starts) < 0.4 and 1.1 < max(starts) <= 1.5
    after = []
    for options in ({}, {"size": 32}, {"size": 32, "box": (0, 0, 9, 9)}, {"seconds": 1.0, "frames": 2}):
        rng = np.random.default_rng(0)
        video.decode(data, **{"frames": 5, **options}, rng=rng, sound=False)
        after.append(rng.random())
    assert len(set(after)) == 1, "the same number of draws"


def test_one_crop_and_one_flip_for_the_clip() -> None:
    """Equal to Pillow's resize of the same box of the whole frames."""
    data = made("h264.mp4", *X264)
    whole = video.decode(data, frames=4, sound=False)
    flips = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        clip = video.decode(data, frames=4, start=0.0, rng=rng, size=48, sound=False, scale=(0.3, 0.8))
        # The same draws by hand: place, flip, crop, jitter.
        draws = np.random.default_rng(seed).random(2 + video.CROP_DRAWS + 4)

        class Given:
            def __init__(self, values: np.ndarray) -> None:
                self.values = list(values)

            def random(self) -> float:
                return self.values.pop(0)

        given: Any = Given(draws[2:24])
        left, top, wide, high = crops.crop_box(160, 120, given, (0.3, 0.8), (3 / 4, 4 / 3))
        full = video.decode(data, frames=4, start=0.0, rng=np.random.default_rng(seed), sound=False)
        for got, frame in zip(clip.frames, full.frames, strict=True):
            cut = Image.fromarray(frame).crop((left, top, left + wide, top + high))
            expected = np.asarray(cut.resize((48, 48), Image.Resampling.BILINEAR))
            expected = expected[:, ::-1] if draws[1] < 0.5 else expected
            assert np.array_equal(got, expected)
        flips += draws[1] < 0.5
    assert 0 < flips < 8
    for mine, frame in zip(
        video.decode(data, frames=4, size=64, sound=False).frames, whole.frames, strict=True
    ):
        assert np.array_equal(mine, images.resize_center_crop(Image.fromarray(frame), 64))
    boxed = video.decode(data, frames=4, size=20, box=(30, 40, 20, 20), sound=False)
    assert np.array_equal(boxed.frames, whole.frames[:, 40:60, 30:50])
    assert video.decode(data, frames=2, short_side=60, sound=False).frames.shape == (2, 60, 80, 3)
    with pytest.raises(BrokenVideo, match="not within 160x120"):
        video.decode(data, size=20, box=(150, 0, 20, 20))


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotation_metadata_is_applied(turn: int, tmp_path: Path) -> None:
    plain = made("h264.mp4", *X264)
    (tmp_path / "in.mp4").write_bytes(plain)
    command = ["ffmpeg", "-v", "error", "-i", str(tmp_path / "in.mp4"), "-c", "copy"]
    subprocess.run([*command, "-metadata:s:v:0", f"rotate={turn}", str(tmp_path / "out.mp4")], check=True)
    data = (tmp_path / "out.mp4").read_bytes()
    clip = video.decode(data, frames=3, sound=False)
    height, width = (160, 120) if turn % 180 else (120, 160)
    truth = all_frames(data, height, width)  # the command turns them too
    assert clip.frames.shape == (3, height, width, 3)
    assert np.array_equal(clip.frames, truth[[round(t * 25) for t in clip.times]])


def test_short_videos_and_silent_ones() -> None:
    one = video.decode(made("one.mp4", *X264, "-frames:v", "1", sound=False), frames=4, seconds=2.0)
    assert one.distinct == 1 and one.frames.shape == (4, 120, 160, 3) and (one.frames == one.frames[0]).all()
    assert one.sound is None and one.problem == "" and one.seconds < 0.1
    two = video.decode(made("h264.mp4", *X264), frames=8, start=0.0, seconds=0.08)
    assert two.distinct == 2
    long = video.decode(made("h264.mp4", *X264), frames=4, seconds=60.0)
    assert long.seconds == pytest.approx(2.0, abs=0.05) and long.start == 0
    assert long.sound is not None and abs(len(long.sound) - 32000) < 1000
    assert video.decode(made("h264.mp4", *X264), frames=1, sound=False).sound is None
    raw_stream = video.decode(made("raw.h264", *X264, "-an", sound=False), frames=3)  # no times, no duration
    assert raw_stream.frames.shape == (3, 120, 160, 3)


def test_ten_bits_are_within_two_steps_of_exact_arithmetic() -> None:
    data = made(
        "ten.mp4", "-c:v", "libx265", "-x265-params", "log-level=0", "-pix_fmt", "yuv420p10le", sound=False
    )
    clip = video.decode(data, frames=3)
    planes = np.frombuffer(raw(data, "-f", "rawvideo", "-pix_fmt", "yuv420p10le"), np.uint16).reshape(
        -1, 180, 160
    )
    for frame, time in zip(clip.frames, clip.times, strict=True):
        plane = planes[round(time * 25)].astype(np.float64)
        y = (plane[:120] - 64) / 876
        u, v = (
            (p.reshape(60, 80).repeat(2, 0).repeat(2, 1) - 512) / 896 for p in (plane[120:150], plane[150:])
        )
        red, blue = y + 1.402 * v, y + 1.772 * u  # BT.601, which FFmpeg assumes where nothing is said
        green = (y - 0.299 * red - 0.114 * blue) / 0.587
        exact = np.clip(np.stack([red, green, blue], axis=-1) * 255, 0, 255)
        assert np.abs(frame - exact).max() <= 5 and np.abs(frame - exact).mean() < 1.2


def test_less_is_decoded_than_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two frames of twelve seconds: two groups of frames are touched, and in them not the frames that nobody refers to."""
    from dataload.decode.video_packets import Video

    data = made("long.mp4", *X264, "-g", "25", "-bf", "3", seconds=12.0, sound=False)
    came = []
    plain = Video._decoded

    def counting(self: Video, wanted: Any, hurry: bool) -> Iterator[Any]:
        def decode(packet: Any) -> Any:
            found = codec.decode(packet)
            came.extend(found)
            return found

        codec = self.stream.codec_context

        class Counted:
            def __getattr__(self, name: str) -> Any:
                return decode if name == "decode" else getattr(codec, name)

            def __setattr__(self, name: str, value: Any) -> None:
                setattr(codec, name, value)

        class Stream:
            codec_context = Counted()

        real, self.stream = self.stream, Stream()
        try:
            yield from plain(self, wanted, hurry)
        finally:
            self.stream = real

    monkeypatch.setattr(Video, "_decoded", counting)
    clip = video.decode(data, frames=2)
    assert clip.distinct == 2 and len(came) < 2 * 25 * 0.7


# Bad files


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no bytes"),
        (b"nothing that anybody reads" * 9, "Invalid data"),
        (b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n", "FFmpeg"),
        (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "FFmpeg"),
    ],
)
def test_what_is_no_video_says_why(data: bytes, says: str) -> None:
    with pytest.raises(BrokenVideo, match=says):
        video.decode(data)


def test_sound_without_frames_and_limits() -> None:
    with pytest.raises(BrokenVideo, match="no video track, sound alone"):
        video.decode(made("sound.m4a", "-map", "1:a"))
    data = made("h264.mp4", *X264)
    with pytest.raises(BrokenVideo, match="160x120 pixels, over the limit of 10000"):
        video.decode(data, max_pixels=10_000)
    with pytest.raises(BrokenVideo, match="2 seconds declared, over the limit of 1.5"):
        video.decode(data, max_seconds=1.5)
    with pytest.raises(BrokenVideo, match="no frames at 9.00 s"):
        video.decode(data, start=9.0, seconds=1.0)
    for wrong in (
        {"frames": 0},
        {"place": 2.0},
        {"seconds": -1.0},
        {"size": 8, "short_side": 8},
        {"interpolation": "x"},
    ):
        with pytest.raises(ValueError, match="frames=|place=|seconds=|not both|interpolation="):
            video.decode(data, **wrong)


def test_a_playlist_opens_nothing_else(tmp_path: Path) -> None:
    """A concat script that names a real video beside it: were it followed, there would be frames."""
    (tmp_path / "there.mp4").write_bytes(made("h264.mp4", *X264))
    for script in (
        f"ffconcat version 1.0\nfile '{tmp_path}/there.mp4'\n",
        f"#EXTM3U\n#EXTINF:3,\n{tmp_path}/there.mp4\n",
    ):
        with pytest.raises(BrokenVideo, match="FFmpeg"):
            video.decode(script.encode())


@pytest.mark.parametrize("name", ["h264.mkv", "mpeg4.avi", "mpeg2.ts", "fragmented.mp4"])
def test_what_is_cut_short_is_used_up_to_there(name: str) -> None:
    data = made(name, *CODECS[name])
    clip = video.decode(data[: len(data) * 6 // 10], frames=4)
    truth = all_frames(data, 120, 160)
    assert 0.5 < clip.seconds < 1.8 and clip.distinct == 4
    # A stream of packets (ts) and fragments declare no length: nobody can tell.
    assert clip.problem or name in ("mpeg2.ts", "fragmented.mp4")
    assert np.array_equal(clip.frames[:3], truth[[round(t * 25) for t in clip.times]][:3])


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as made:
        yield made


def test_a_sandbox_gives_the_same(sandbox: Sandbox) -> None:
    data = made("h264.mp4", *X264)
    both: list[Clip] = [
        video.decode(data, frames=4, size=32, seconds=1.0, rng=np.random.default_rng(1), sandbox=box)
        for box in (None, sandbox)
    ]
    for field in ("frames", "times", "sound"):
        assert np.array_equal(getattr(both[0], field), getattr(both[1], field))
    assert both[0].start == both[1].start
    with pytest.raises(BrokenVideo, match="^no bytes$"):
        video.decode(b"", sandbox=sandbox)


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "mpeg4.avi", "vp9.webm", "mpeg2.ts", "mpeg1.mpg"])
def test_fuzzed_files_cannot_take_the_process_down(name: str, sandbox: Sandbox) -> None:
    data, rng = made(name, *CODECS[name]), np.random.default_rng(len(name))
    whole = 0
    for _ in range(20):
        try:
            clip = video.decode(
                mutated(data, rng), frames=2, size=16, seconds=0.5, rng=rng, sandbox=sandbox, timeout=20.0
            )
            assert clip.frames.shape == (2, 16, 16, 3)
            whole += 1
        except BrokenSample as error:
            assert str(error)
    assert whole
    assert video.decode(data, frames=2, sandbox=sandbox).distinct == 2


@pytest.mark.parametrize("answer", [lambda: None, dict, lambda: {"frames": np.zeros(3)}])
def test_an_answer_of_another_type_is_refused(
    answer: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = Sandbox()
    monkeypatch.setattr(sandbox, "call", lambda *_, **__: answer())
    with pytest.raises(BrokenVideo, match="something else than a clip"):
        video.decode(b"x", sandbox=sandbox)


# Real files


def test_real_videos(real_data: Path, sandbox: Sandbox) -> None:
    """All of them, some against the command: the same pixels. The corrupt one is used up to the damage, and says so."""
    files = sorted(f for f in (real_data / "video_small/videos").iterdir() if f.suffix != ".align")
    assert len(files) == 18
    compared = ("bbaf2n.mpg", "corrupted.mp4", "video_180.mov", "nasa_13013.mp4", "h265_video.mp4")
    for file in files:
        data = file.read_bytes()
        clip = video.decode(data, frames=3, sandbox=sandbox)
        if file.name in compared:
            truth = all_frames(data, *clip.frames.shape[1:3])
            times = shown_at(data, "v:1" if file.name.startswith("nasa") else "v:0")  # the larger of two
            assert np.array_equal(clip.frames, truth[np.searchsorted(times, clip.times + 2e-3) - 1]), (
                file.name
            )
        assert bool(clip.problem) == (file.name == "corrupted.mp4"), (file.name, clip.problem)
        silent = file.suffix == ".mov" or file.name.startswith(("av1", "bt709", "h265", "corrupted"))
        assert (clip.sound is None) == silent
    assert sandbox.restarts == 0


def test_torchcodecs_reference_frames(real_data: Path) -> None:
    folder = real_data / "video_small"
    rates = {"nasa_13013.mp4.stream3": 29.97, "av1_video.mkv.stream0": 25.0, "h265_video.mp4.stream0": 10.0}
    found = 0
    for file in sorted((folder / "torchcodec_reference_frames").glob("*.pt")):
        stream, number = file.name.removesuffix(".pt").rsplit(".frame", 1)
        theirs = torch.load(file, weights_only=True).numpy()
        start = int(number) / rates[stream]
        clip = video.decode(
            (folder / "videos" / stream.rsplit(".stream", 1)[0]).read_bytes(),
            frames=1,
            start=start,
            seconds=0.02,
            sound=False,
        )
        assert np.array_equal(clip.frames[0], theirs), file.name
        found += 1
    assert found == 7


def test_torchcodec_shows_the_same(real_data: Path) -> None:
    decoders = pytest.importorskip(
        "torchcodec.decoders", reason="needs torchcodec: pip install 'auroraio[test]'"
    )
    for name in ("flipping_a_pancake.mkv", "av1_video.mkv", "video_90.mov", "bt709_full_range.mp4"):
        data = (real_data / "video_small/videos" / name).read_bytes()
        clip = video.decode(data, frames=5, sound=False)
        theirs = (
            decoders.VideoDecoder(data, seek_mode="exact")
            .get_frames_played_at((clip.times + 1e-3).tolist())
            .data
        )
        assert np.array_equal(clip.frames, theirs.permute(0, 2, 3, 1).numpy()), name


# Tubelets


def test_tubelets_by_hand_and_back() -> None:
    frames = torch.arange(2 * 4 * 6 * 8 * 3).reshape(2, 4, 6, 8, 3)
    boxes = video.tubelets(frames, (2, 3, 4))
    assert boxes.shape == (2, 2 * 2 * 2, 2 * 3 * 4 * 3)
    number = 0
    for t in range(0, 4, 2):
        for h in range(0, 6, 3):
            for w in range(0, 8, 4):
                assert torch.equal(boxes[:, number], frames[:, t : t + 2, h : h + 3, w : w + 4].flatten(1))
                number += 1
    assert torch.equal(video.untubelets(boxes, (2, 3, 4), (4, 6, 8)), frames)
    assert torch.equal(
        video.untubelets(video.tubelets(frames[0], (4, 6, 8)), (4, 6, 8), (4, 6, 8)), frames[0]
    )
    with pytest.raises(ValueError, match="do not divide"):
        video.tubelets(frames, (3, 3, 4))
    with pytest.raises(ValueError, match="do not divide"):
        video.untubelets(boxes, (3, 3, 4), (4, 6, 8))
    with pytest.raises(ValueError, match="are not"):
        video.untubelets(boxes[:, :5], (2, 3, 4), (4, 6, 8))
