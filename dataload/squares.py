"""The squares of a picture that an evaluation looks at. Needs nothing: configurations are checked with it."""

from __future__ import annotations

VIEWS = {1: ((1.0, 1),), 5: ((1.0, 1), (0.75, 2)), 14: ((1.0, 1), (0.75, 2), (0.5, 3))}
"""By the number of views: share of the middle square's side, and how many such squares stand in a row."""
SUPPORTED = f"supported: {', '.join(map(str, VIEWS))}"


def check_views(views: int) -> None:
    """Raises ValueError for a number of views that there is not."""
    if views not in VIEWS:
        raise ValueError(f"{views} views of a picture; {SUPPORTED}")


def boxes(width: int, height: int, views: int) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) of each view, in pixels: of the largest centred square the whole; with 5 views, four of 3/4 of
    its side too; with 14, nine of 1/2 of its side as well; evenly spread, row by row. Raises ValueError for another number."""
    check_views(views)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    found = []
    for share, row in VIEWS[views]:
        step = (1 - share) * side / max(row - 1, 1)
        for y in range(row):
            for x in range(row):
                at = (left + x * step, top + y * step)
                found.append((*at, at[0] + share * side, at[1] + share * side))
    return found
