"""Videos: tubelets of a few frames, three-dimensional rotary positions.

Letters: P clips, N frames of all of them, T frames of the longest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.perceiver.adapters.base import Adapter
from models.perceiver.adapters.image import normalized, normalized_size, patchify
from models.perceiver.config import PerceiverConfig
from models.perceiver.pieces import Piece, no_offsets, no_samples, padded, visible


class VideoAdapter(Adapter):
    """Frames packed, float [N, 3, side, side] normalised or uint8 [N, side, side, 3] -> a token per tubelet
    (arXiv:2103.15691). A clip whose frames do not fill its last tubelet repeats its last frame."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__(config, config.patch_widths["video"], config.video_grid)
        self.tubelet, self.side = config.video_tubelet, config.video_size

    def empty(self, device: torch.device) -> Piece:
        frames = torch.empty(0, 3, self.side, self.side, device=device)
        return Piece(frames, no_samples(device), no_offsets(device))

    def patches(self, piece: Piece) -> tuple[Tensor, Tensor]:
        if normalized_size(piece.data) != (self.side, self.side):
            raise ValueError(
                f"frames of {normalized_size(piece.data)} pixels; supported: ({self.side}, {self.side})"
            )
        depth = self.tubelet[0]
        lengths = -(-piece.lengths // depth)  # tubelets in time
        longest = depth * max(int(lengths.max()) if len(lengths) else 0, 1)
        frames = padded(normalized(piece.data), piece.lengths, longest)  # [P, T, 3, side, side]
        at = torch.arange(longest, device=frames.device)[None]
        last = torch.minimum(at, (piece.lengths[:, None] - 1).clamp(min=0))
        last = torch.where(visible(depth * lengths, longest), last, at)
        frames = frames[torch.arange(len(frames), device=frames.device)[:, None], last]
        x = patchify(frames.transpose(1, 2), self.tubelet)
        return x, lengths * (self.grid[1] * self.grid[2])
