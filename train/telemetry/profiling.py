"""`--profile FIRST LAST`: a trace of some steps, by torch.profiler, to be opened in ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class StepProfiler:
    """Records steps `first` to `last` (1-based, inclusive) of one rank, with shapes and memory, into
    FOLDER/steps-FIRST-LAST.rank-N.json.gz."""

    def __init__(self, folder: Path, first: int, last: int, rank: int, device: torch.device) -> None:
        self.path = folder / f"steps-{first}-{last}.rank-{rank}.json.gz"
        self.first, self.last, self.device = first, last, device
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Step `step` begins; a run that goes on in the middle records what is left."""
        if self._profile is None and self.first <= step <= self.last:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()

    def after(self, step: int) -> Path | None:
        """Step `step` is done. Returns the file when it has been written."""
        return self.close() if self._profile is not None and step >= self.last else None

    def close(self) -> Path | None:
        """Write what has been recorded, if anything."""
        if self._profile is None:
            return None
        recorded, self._profile = self._profile, None
        recorded.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self.path))
        self.last = 0  # once
        return self.path
