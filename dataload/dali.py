"""Decoding by NVIDIA DALI: on a GPU (`mixed`), or on the CPU without one.

    prepare (threads)    fetch -> header -> crop and flip, from the sample's own random numbers; pictures that
                         DALI does not take are decoded here, as the cpu backend does it
    DaliDecoder          image_slice of all JPEGs of the batch at once
    finish (threads)     CPU: turn upright -> resize -> flip, by the code of the cpu backend: the same pixels, at a
                         quarter of the cost of DALI's resize. GPU: DALI's graph does it. Then text and masks

The order of samples is the loader's. DALI is given bytes and boxes, one batch at a time, so that its own readers,
prefetching and checkpoints play no part. An error costs a DALI pipeline its life. The batch is then decoded again, each
JPEG alone, and those that fail again are the cpu backend's to decode and to judge: so a sample comes out the same
whatever stands beside it.

DALI gets JPEGs of 8-bit grey or RGB that end in an end marker: all that it decodes exactly as Pillow does. (It stops
reading below the crop, and would not see that a file is cut short.)
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dataload.broken import BrokenSample
from dataload.images import turn_upright
from dataload.samples import Attempt, Drawn, Job, SampleMaker, View, Work
from dataload.scratch import Recycled
from dataload.threads import Threads

_END = b"\xff\xd9"
_LEFT_BEHIND: list[Any] = []
"""Of the process that this one was forked from: its threads are not here, so that nothing of it may be torn down."""


def takes(view: View) -> bool:
    """Whether DALI decodes this picture as Pillow does."""
    return view.picture.pixels is None and view.picture.data.endswith(_END)


class DaliDecoder:
    """Crops of JPEGs, decoded on a device. One thread at a time may use it.

    With `size` DALI's own graph resizes and mirrors, and `decode` gives uint8 tensors [size, size, 3] on the device.
    Without, it gives arrays [height, width, 3] of the crops, which live until the next call. Both are upright.
    """

    def __init__(
        self, batch_size: int, threads: int, device: torch.device, size: int | None, interpolation: str
    ) -> None:
        self.device, self.size = device, size
        self._options = (batch_size, threads, device, size, interpolation)
        self._pipeline: Any = None

    def decode(self, views: Sequence[View]) -> list[Any]:
        """A crop for each view, or None where DALI fails on it. Where a batch fails, each of it is tried alone."""
        try:
            return self._run(views)
        except RuntimeError:
            self._pipeline = None  # it is of no more use
        return [None] if len(views) == 1 else [self._alone(view) for view in views]

    def _alone(self, view: View) -> Any:
        try:
            (crop,) = self._run([view])
        except RuntimeError:
            self._pipeline = None
            return None
        return crop.copy() if isinstance(crop, np.ndarray) else crop

    def _run(self, views: Sequence[View]) -> list[Any]:
        if not views:
            return []
        if self._pipeline is None:
            self._pipeline = _pipeline(*self._options)
        boxes = np.array([view.picture.stored(view.box) for view in views], dtype=np.int32)
        self._pipeline.feed_input("data", [np.frombuffer(view.picture.data, np.uint8) for view in views])
        self._pipeline.feed_input("start", np.ascontiguousarray(boxes[:, :2]))
        self._pipeline.feed_input("shape", np.ascontiguousarray(boxes[:, 2:]))
        if self.size is not None:
            # What is to be turned is mirrored afterwards.
            mirror = [view.flipped and view.picture.orientation == 1 for view in views]
            self._pipeline.feed_input("mirror", np.array(mirror, dtype=np.int32))
        (out,) = self._pipeline.run()
        if self.size is None:
            return [turn_upright(np.asarray(out[i]), v.picture.orientation) for i, v in enumerate(views)]
        return [_turned(image, view) for image, view in zip(self._copied(out), views, strict=True)]

    def _copied(self, out: Any) -> torch.Tensor:
        """DALI's output, [N, size, size, 3], in memory of torch's."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        images = torch.empty(tuple(out.as_tensor().shape()), dtype=torch.uint8, device=self.device)
        if self.device.type == "cpu":
            return feed_ndarray(out.as_tensor(), images)
        stream = torch.cuda.current_stream(self.device)
        feed_ndarray(out.as_tensor(), images, cuda_stream=stream)
        stream.synchronize()  # DALI's buffer is used again by the next run
        return images


def _turned(image: torch.Tensor, view: View) -> torch.Tensor:
    """A resized picture [size, size, 3], turned upright, and mirrored if that is still to be done."""
    orientation = view.picture.orientation
    if orientation == 1:
        return image
    if orientation >= 5:
        image = image.transpose(0, 1)
    sides = [axis for axis, turns in ((0, (3, 4, 7, 8)), (1, (2, 3, 6, 7))) if orientation in turns]
    image = image.flip(sides)
    return image.flip(1) if view.flipped else image


def _pipeline(
    batch_size: int, threads: int, device: torch.device, size: int | None, interpolation: str
) -> Any:
    dali: Any = importlib.import_module("nvidia.dali")  # its types leave out half of it
    fn, types = dali.fn, dali.types
    gpu = device.type == "cuda"
    pipeline = dali.Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device.index if gpu else None, prefetch_queue_depth=1,
        exec_async=False, exec_pipelined=False,
    )  # fmt: skip
    with pipeline:
        data = fn.external_source(name="data", no_copy=True, ndim=1, dtype=types.UINT8)
        start = fn.external_source(name="start", ndim=1, dtype=types.INT32)
        shape = fn.external_source(name="shape", ndim=1, dtype=types.INT32)
        options = {"jpeg_fancy_upsampling": True} if gpu else {}
        out = fn.decoders.image_slice(
            data, start, shape, axes=(1, 0), normalized_anchor=False, normalized_shape=False,
            adjust_orientation=False, device="mixed" if gpu else "cpu", output_type=types.RGB, **options,
        )  # fmt: skip
        if size is not None:
            kinds = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
            out = fn.resize(out, size=(size, size), interp_type=kinds[interpolation], antialias=True)
            mirror = fn.external_source(name="mirror", ndim=0, dtype=types.INT32)
            out = fn.flip(out, horizontal=mirror)
        pipeline.set_outputs(out)
    pipeline.build()
    return pipeline


@dataclass
class _Row:
    """A sample of a batch on its way."""

    attempt: Attempt
    view: View
    drawn: Drawn | None = None


class DaliBackend:
    """See prefetch.Backend. Threads prepare and finish; one more owns DALI, which has as many again for decoding."""

    def __init__(self, maker: SampleMaker, device: torch.device) -> None:
        self._maker = maker
        self._device = device
        self.name = f"dali ({device})"
        config = maker.config
        self._pool = Threads(max(1, config.workers), "dataload")
        self._owner = Threads(1, "dataload-dali")
        self._memory = Recycled(config.prefetch + 2)  # as in the CPU's backend; torch itself does so on a GPU
        self._start()

    def _start(self) -> None:
        config, gpu = self._maker.config, self._device.type == "cuda"
        self._decoder = DaliDecoder(
            config.batch_size,
            self._pool.count,
            self._device,
            config.image_size if gpu else None,
            config.interpolation,
        )

    def submit(self, jobs: Sequence[Job]) -> Work:
        """See prefetch.Backend."""
        size = self._maker.config.image_size
        shape, free = (len(jobs), size, size, 3), None
        if self._device.type == "cpu":
            images = self._memory.empty(*shape)
        else:
            images = torch.empty(shape, dtype=torch.uint8, device=self._device)
            # What this memory held before may still be read on the caller's stream.
            free = torch.cuda.Event()
            free.record(torch.cuda.current_stream(self._device))
        prepared = self._pool.share(self._prepare, jobs)
        return Work(self._owner.share(lambda _: self._make(prepared, images, free), [None]), images)

    def _prepare(self, jobs: Sequence[Job]) -> list[_Row]:
        with self._maker.stages.idle():
            return [self._next(self._maker.attempt(job)) for job in jobs]

    def _next(self, attempt: Attempt) -> _Row:
        """The first of the attempt's samples whose header is whole."""
        while True:
            self._pool.check()
            try:
                return _Row(attempt, self._maker.view(attempt))
            except (BrokenSample, OSError) as error:
                attempt.fail(error)

    def _make(
        self, prepared: Sequence[Future[list[_Row]]], images: torch.Tensor, free: torch.cuda.Event | None
    ) -> list[Drawn]:
        """The whole batch; run by the thread that owns DALI."""
        rows = self._pool.results(prepared)
        if free is None:
            self._fill(rows, images)
        else:
            stream = torch.cuda.Stream(self._device)
            stream.wait_event(free)
            with torch.cuda.stream(stream):
                self._fill(rows, images)
            stream.synchronize()
        return [row.drawn for row in rows if row.drawn is not None]

    def _fill(self, rows: list[_Row], images: torch.Tensor) -> None:
        waiting = list(range(len(rows)))
        while waiting:
            taken = [i for i in waiting if takes(rows[i].view)]
            stages = self._maker.stages
            with stages.idle(), stages("decode"):
                stages.begin(self._maker.name(rows[i].attempt for i in taken))
                crops = dict(zip(taken, self._decoder.decode([rows[i].view for i in taken]), strict=True))

            def finish(places: Sequence[int], crops: dict[int, Any] = crops) -> list[int]:
                with self._maker.stages.idle():
                    return [i for i in places if not self._finish(rows, i, crops.get(i), images)]

            waiting = self._pool.results(self._pool.share(finish, waiting))

    def _finish(self, rows: list[_Row], i: int, crop: Any, images: torch.Tensor) -> bool:
        """Puts row `i` of the batch into its place; False where it was broken, and another stands there now."""
        row, maker = rows[i], self._maker
        try:
            if isinstance(crop, torch.Tensor):
                images[i] = crop
                if maker.config.color_jitter:
                    out = images[i].cpu().numpy()
                    maker.jitter(row.view, out)
                    images[i] = torch.from_numpy(out).to(images.device)
            else:
                if crop is None:  # the cpu backend's way, and its verdict
                    crop = row.view.picture.cut(row.view.box, lend=True)
                out = (
                    images[i].numpy() if images.device.type == "cpu" else np.empty(images.shape[1:], np.uint8)
                )
                maker.show(row.view, crop, out)
                if images.device.type != "cpu":
                    images[i] = torch.from_numpy(out).to(images.device)
            row.drawn = maker.finish(row.attempt, row.view)
        except (BrokenSample, OSError) as error:
            row.attempt.fail(error)
            rows[i] = self._next(row.attempt)
            return False
        return True

    def dead(self) -> list[str]:
        """See prefetch.Backend."""
        return self._owner.dead() + self._pool.dead()

    def close(self) -> None:
        """See prefetch.Backend."""
        self._pool.close()
        self._owner.close()  # its last batch ends when the pool is closed
        self._memory.close()

    def abandon(self) -> None:
        """See prefetch.Backend."""
        _LEFT_BEHIND.append(self._decoder)
        self._owner.abandon()
        self._pool.abandon()
        self._start()
