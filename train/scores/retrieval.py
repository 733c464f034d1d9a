"""Image-text retrieval: recall at K both ways, median rank, and what chance gives.

    text_to_image  a caption asks for its picture among all pictures of the pool
    image_to_text  a picture asks for its captions among all captions of the pool; any of its own in the top K
                   counts

Legend: I images, C captions, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

KS = (1, 5, 10)
_ROWS = 1024  # queries scored at once: bounds memory at 1024 x pool


def text_to_image_ranks(image_emb: Tensor, text_emb: Tensor, image_of_text: Tensor) -> Tensor:
    """Rank (1 = first) of each caption's picture: int64 [C]. Ties count against the model.

    image_emb [I, E], text_emb [C, E] (unit length for cosine), image_of_text int64 [C].
    """
    ranks = []
    for start in range(0, len(text_emb), _ROWS):
        own = image_of_text[start : start + _ROWS, None]
        scores = text_emb[start : start + _ROWS].float() @ image_emb.float().T  # [c, I]
        right = scores.gather(1, own)
        # "not lower" instead of "higher": a tie or a NaN is a rank lost. The right picture counts itself.
        ranks.append((~(scores < right)).sum(1))
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)


def image_to_text_ranks(image_emb: Tensor, text_emb: Tensor, image_of_text: Tensor) -> Tensor:
    """Rank (1 = first) of the best-placed own caption of each picture that has captions: int64 [<= I].

    Pictures without captions ask nothing here (they still distract in text_to_image). Ties count against the
    model.
    """
    asking = torch.unique(image_of_text)
    ranks = []
    for start in range(0, len(asking), _ROWS):
        which = asking[start : start + _ROWS]
        scores = image_emb[which].float() @ text_emb.float().T  # [i, C]
        own = which[:, None] == image_of_text[None, :]
        best = scores.masked_fill(~own, -math.inf).amax(1, keepdim=True)
        ranks.append((~(scores < best) & ~own).sum(1) + 1)
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)


def retrieval_scores(
    image_emb: Tensor, text_emb: Tensor, image_of_text: Tensor, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Recall at K (shares of 1) and median rank, both ways.

    Returns {"text_to_image/R@1": .., "image_to_text/R@1": .., ..., "text_to_image/median_rank": .., ...}.
    Raises ValueError for an empty pool or for lengths that do not fit.
    """
    if len(image_emb) == 0 or len(text_emb) == 0:
        raise ValueError(
            f"retrieval needs images and captions; got {len(image_emb)} images, {len(text_emb)} captions"
        )
    if len(text_emb) != len(image_of_text):
        raise ValueError(f"{len(text_emb)} text embeddings, but image_of_text names {len(image_of_text)}")
    ranks = {
        "text_to_image": text_to_image_ranks(image_emb, text_emb, image_of_text),
        "image_to_text": image_to_text_ranks(image_emb, text_emb, image_of_text),
    }
    scores = {f"{way}/R@{k}": (rank <= k).double().mean().item() for way, rank in ranks.items() for k in ks}
    return scores | {f"{way}/median_rank": rank.double().quantile(0.5).item() for way, rank in ranks.items()}


def retrieval_chance(image_of_text: Tensor, images: int, ks: Sequence[int] = KS) -> dict[str, float]:
    """Exact recall at K of a random order of the same pool.

    text_to_image: K of I.
    image_to_text: a picture with m of the C captions misses only if all K drawn are foreign (hypergeometric):
    1 - binom(C - m, K) / binom(C, K), averaged over the pictures with captions.
    """
    captions = len(image_of_text)
    owned = torch.unique(image_of_text, return_counts=True)[1].tolist()
    chance: dict[str, float] = {}
    for k in ks:
        drawn = min(k, captions)
        misses = [math.comb(captions - m, drawn) / math.comb(captions, drawn) for m in owned]
        chance[f"text_to_image/R@{k}"] = min(k, images) / images
        chance[f"image_to_text/R@{k}"] = 1 - sum(misses) / len(misses)
    return chance
