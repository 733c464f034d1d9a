"""Object detection on Aurora's feature pyramid, without anchors (FCOS, arXiv:1904.01355).

    images -> SwinEncoder -> FeaturePyramid -> per place of each level: classes, distances to the four sides, centerness

Every place of a level answers for the object in whose middle it lies, if the object's size suits the level.
Shapes: B batch, H W height and width of a level, K places of all levels, C classes, F pyramid width, N boxes.
Boxes are (left, top, right, bottom) in pixels of the images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.aurora.config import AuroraConfig
from models.aurora.model import Aurora, init_layers
from models.boxes import giou, nms_by_class

STRIDES = (4, 8, 16, 32)
LARGEST = (32.0, 64.0, 128.0, math.inf)
"""Pixels from a place to the farthest side of its object, at most, on each level."""
RADIUS = 1.5  # strides around an object's middle within which places answer for it
NOTHING = -1  # class of a place without an object
PRIOR = 0.01  # what the head first believes in
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss


@dataclass(frozen=True)
class Found:
    """Detections of one image, best first: boxes [N, 4], scores [N], classes int64 [N]."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor


class Detector(nn.Module):
    """Aurora (`base`) with a detection head. `forward` gives the losses, `detect` boxes."""

    def __init__(self, config: AuroraConfig, classes: int) -> None:
        super().__init__()
        self.base = Aurora(config)
        self.head = DetectionHead(config.pyramid_width, classes)
        init_head(self.head)

    def forward(
        self, images: Tensor, classes: Tensor, boxes: Tensor, places: float | None = None
    ) -> dict[str, Tensor]:
        """Losses "class", "box" and "center", fp32 scalars: sums over `places` (None: those of this batch).

        images: normalised [B, 3, height, width]. classes int64 [B, K], boxes [B, K, 4]: what `assign` gives per image.
        """
        asked = classes != NOTHING
        divisor = max(float(asked.sum()) if places is None else places, 1e-6)
        levels = self.levels(images)
        logits, distances, centers = self.head(levels)
        points, strides = grid(sizes(levels), images.device)
        target = F.one_hot(classes.clamp(min=0), logits.shape[-1]) * asked[..., None]
        losses = {"class": focal(logits, target.to(logits.dtype)).sum() / divisor}
        found = around(points, distances * strides[:, None])[asked]
        true = boxes[asked]
        weight = centerness(points.expand(len(images), -1, -1)[asked], true)
        losses["box"] = ((1 - giou(found, true)) * weight).sum() / divisor * BOX
        losses["center"] = (
            F.binary_cross_entropy_with_logits(centers[asked], weight, reduction="sum") / divisor
        )
        return losses

    def levels(self, images: Tensor) -> list[Tensor]:
        """Normalised images -> the pyramid's four maps [B, F, H, W]."""
        return self.base.pyramid(self.base.encode_image(images))

    @torch.no_grad()
    def detect(
        self, images: Tensor, *, most: int = 100, least: float = 0.02, overlap: float = 0.6
    ) -> list[Found]:
        """Boxes of each normalised image, at most `most`, of a score of `least` or more; of boxes of one class that overlap by
        more than `overlap` the best stays."""
        levels = self.levels(images)
        logits, distances, centers = self.head(levels)
        points, strides = grid(sizes(levels), images.device)
        scores = (logits.sigmoid() * centers.sigmoid()[..., None]).sqrt()
        boxes = around(points, distances * strides[:, None])
        edge = boxes.new_tensor([images.shape[3], images.shape[2]]).repeat(2)
        return [
            choose(score, box.clamp(min=0).minimum(edge), most, least, overlap)
            for score, box in zip(scores, boxes, strict=True)
        ]


BOX = 2.0  # weight of the box loss within its own figure


class DetectionHead(nn.Module):
    """The same convolutions on every level: two towers, then what each place says."""

    def __init__(self, width: int, classes: int, depth: int = 2) -> None:
        super().__init__()

        def tower() -> nn.Sequential:
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [
                    nn.Conv2d(width, width, 3, padding=1),
                    nn.GroupNorm(groups(width), width),
                    nn.SiLU(),
                ]
            return nn.Sequential(*layers)

        self.class_tower, self.box_tower = tower(), tower()
        self.classes = nn.Conv2d(width, classes, 3, padding=1)
        self.sides = nn.Conv2d(width, 4, 3, padding=1)
        self.center = nn.Conv2d(width, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Four maps -> fp32 class logits [B, K, C], distances in strides [B, K, 4], centerness logits [B, K]."""
        logits, distances, centers = [], [], []
        for level, scale in zip(levels, self.scales, strict=True):
            seen, placed = self.class_tower(level), self.box_tower(level)
            logits.append(self.classes(seen).float().flatten(2).transpose(1, 2))
            sides = F.softplus(self.sides(placed).float() * scale + SOFTPLUS_1) * 2
            distances.append(sides.flatten(2).transpose(1, 2))
            centers.append(self.center(placed).float().flatten(1))
        return torch.cat(logits, 1), torch.cat(distances, 1), torch.cat(centers, 1)


SOFTPLUS_1 = math.log(math.e - 1)


def init_head(head: nn.Module) -> None:
    """Convolutions and linear layers as `init_weights` has them, what says the classes small and with a
    bias of little faith."""
    init_layers(head)
    for name, module in head.named_modules():
        if name in ("classes", "sides", "center"):
            assert isinstance(module, nn.Conv2d) and module.bias is not None
            nn.init.normal_(module.weight, std=0.01)
            if name == "classes":
                nn.init.constant_(module.bias, -math.log((1 - PRIOR) / PRIOR))


def groups(width: int) -> int:
    """Groups of the group norm: of at least 4 channels, at most 16 groups."""
    return next(n for n in (16, 8, 4, 2, 1) if width % n == 0 and width // n >= min(4, width))


def sizes(levels: list[Tensor]) -> list[tuple[int, int]]:
    """Height and width of each map."""
    return [(level.shape[-2], level.shape[-1]) for level in levels]


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of each level's map for images of this size (odd maps are padded at each merging)."""
    found = [(-(-height // 4), -(-width // 4))]
    for _ in STRIDES[1:]:
        found.append((-(-found[-1][0] // 2), -(-found[-1][1] // 2)))
    return found


def grid(maps: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Middles [K, 2] (x, y) of all places in pixels, and their strides [K]."""
    points, strides = [], []
    for (height, width), stride in zip(maps, STRIDES, strict=True):
        y = (torch.arange(height, device=device) + 0.5) * stride
        x = (torch.arange(width, device=device) + 0.5) * stride
        points.append(torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).flatten(0, 1))
        strides.append(torch.full((height * width,), float(stride), device=device))
    return torch.cat(points), torch.cat(strides)


def assign(boxes: Tensor, classes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Which object each place of an image answers for: (its class int64 [K], NOTHING where there is none; its box [K, 4]).

    A place answers for boxes [N, 4] in which it lies, near the middle, on the level that suits the distance to the farthest
    side; of several for the smallest. A box that is too small to hold a place takes the one nearest to its middle.
    """
    points, strides = grid(level_sizes(height, width), boxes.device)
    if len(boxes) == 0:
        return classes.new_full((len(points),), NOTHING), boxes.new_zeros(len(points), 4)
    sides = torch.cat((points[:, None] - boxes[None, :, :2], boxes[None, :, 2:] - points[:, None]), dim=-1)
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    near = (points[:, None] - middles[None]).abs().amax(-1) <= RADIUS * strides[:, None]  # [K, N]
    largest = sides.amax(-1)
    upper = boxes.new_tensor(LARGEST)[(strides.log2() - 2).long()][:, None]
    lower = torch.where(strides[:, None] == STRIDES[0], 0.0, upper / 2)
    lower = torch.where(strides[:, None] == STRIDES[-1], LARGEST[-2], lower)
    fits = near & (sides.amin(-1) > 0) & (largest > lower) & (largest <= upper)
    lonely = ~fits.any(0)
    if lonely.any():
        distance = (points[:, None] - middles[None, lonely]).norm(dim=-1) + 1e3 * (strides != STRIDES[0])[
            :, None
        ]
        fits[distance.argmin(0), lonely.nonzero()[:, 0]] = True
    size = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    smallest = torch.where(fits, size[None], math.inf)
    best = smallest.argmin(1)
    return torch.where(fits.any(1), classes[best], NOTHING), boxes[best]


def around(points: Tensor, distances: Tensor) -> Tensor:
    """Boxes [..., K, 4] from points [K, 2] and distances [..., K, 4] to left, top, right, bottom."""
    return torch.cat((points - distances[..., :2], points + distances[..., 2:]), dim=-1)


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """[N] in 0..1: how near to the middle of its box each point lies (1904.01355, eq. 3)."""
    sides = torch.cat((points - boxes[:, :2], boxes[:, 2:] - points), dim=-1).clamp(min=0)
    low = torch.minimum(sides[:, :2], sides[:, 2:])
    high = torch.maximum(sides[:, :2], sides[:, 2:]).clamp(min=1e-6)
    return (low / high).prod(-1).sqrt().clamp(min=0.05)


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss (arXiv:1708.02002) of each logit."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p = logits.sigmoid()
    right = p * target + (1 - p) * (1 - target)
    return (ALPHA * target + (1 - ALPHA) * (1 - target)) * (1 - right) ** GAMMA * loss


def choose(scores: Tensor, boxes: Tensor, most: int, least: float, overlap: float) -> Found:
    """The detections among scores [K, C] and boxes [K, 4]."""
    flat = scores.flatten()
    best, index = flat.topk(min(1000, len(flat)))
    index = index[best >= least]
    place, classes = index // scores.shape[1], index % scores.shape[1]
    kept = nms_by_class(boxes[place], flat[index], classes, overlap)[:most]
    return Found(boxes[place[kept]], flat[index[kept]], classes[kept])
