"""Text generation with a key-value cache: greedy, beam search, sampling; for any model with `start` and
`step`.

Shapes: B images, W beams, V vocabulary, t tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from models.tokens import BOS, EOS, MASK, PAD, UNK


class DecodingState(Protocol):
    """What a model keeps between tokens."""

    def select(self, rows: Tensor) -> None:
        """Keep the hypotheses `rows` int64 [N'], repeats allowed."""


class Generator(Protocol):
    """A model that can generate: `start` takes memory [B, M, D], `step` tokens int64 [N] and gives logits
    [N, V]."""

    def start(self, memory: Tensor) -> DecodingState: ...

    def step(self, tokens: Tensor, state: DecodingState) -> Tensor: ...


@torch.no_grad()
def generate(
    model: Generator,
    memory: Tensor,
    *,
    method: Literal["greedy", "beam", "sample"] = "greedy",
    max_length: int = 24,
    beams: int = 4,
    length_penalty: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    prompt: Tensor | None = None,
) -> list[list[int]]:
    """Token ids per row of memory [B, M, D], without begin, end and padding.

    Args:
        max_length: tokens at most, the begin token or the prompt included.
        prompt: int64 [B, P], what comes first, begin token included; it is not part of the answer. None: the begin token.
        beams, length_penalty: for "beam": hypotheses kept; finished ones are ranked by log-probability /
        length**length_penalty.
        temperature, top_k, top_p, generator: for "sample": logits are divided by temperature, then cut to
        the k likeliest tokens
            (0 = all) and to the smallest set that holds top_p of the probability (nucleus sampling,
            arXiv:1904.09751).
    """
    if method == "beam":
        if beams < 1:
            raise ValueError(f"beams = {beams}; at least 1")
        return beam_search(model, memory, max_length, beams, length_penalty, prompt)
    if method not in ("greedy", "sample"):
        raise ValueError(f"method {method!r}; supported: 'greedy', 'beam', 'sample'")
    if method == "sample" and (temperature <= 0 or not 0 < top_p <= 1 or top_k < 0):
        raise ValueError(
            f"temperature {temperature} must be > 0, top_p {top_p} in (0, 1], top_k {top_k} >= 0"
        )
    state = model.start(memory)
    tokens, length = read_prompt(model, memory, state, prompt)
    finished = torch.zeros(len(memory), dtype=torch.bool, device=memory.device)
    steps = []
    for _ in range(max_length - length):
        logits = without_specials(model.step(tokens, state).float())
        if method == "greedy":
            tokens = logits.argmax(dim=-1)
        else:
            probabilities = nucleus(logits / temperature, top_k, top_p)
            tokens = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        tokens = tokens.masked_fill(finished, PAD)
        steps.append(tokens)
        finished |= tokens == EOS
        if finished.all():
            break
    return (
        [clean(row) for row in torch.stack(steps, dim=1).tolist()]
        if steps
        else [[] for _ in range(len(memory))]
    )


def beam_search(
    model: Generator, memory: Tensor, max_length: int, beams: int, length_penalty: float,
    prompt: Tensor | None = None,
) -> list[list[int]]:  # fmt: skip
    """Beam search over all rows at once, each as if it were alone: it is done when `beams` hypotheses have ended. The best
    of those that ended; at max_length, where none has, the best unfinished one. A hypothesis' length counts its end
    token, not the prompt."""
    batch, device = len(memory), memory.device
    state = model.start(memory)
    first, begun = read_prompt(model, memory, state, prompt)
    state.select(torch.arange(batch, device=device).repeat_interleave(beams))
    history = first[:, None, None].expand(-1, beams, -1)
    scores = torch.full((batch, beams), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all beams start alike: only the first may grow
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(batch)]
    first_row = torch.arange(batch, device=device)[:, None] * beams
    for length in range(1, max_length - begun + 1):
        logits = without_specials(model.step(history[..., -1].flatten(), state).float())
        vocabulary = logits.shape[-1]
        total = scores[..., None] + logits.log_softmax(dim=-1).view(batch, beams, vocabulary)
        # of 2W candidates at most W end a sentence, so W always go on
        best, index = total.flatten(1).topk(min(2 * beams, beams * vocabulary), dim=1)
        beam, token = index // vocabulary, index % vocabulary
        ends = token == EOS
        for row, column in ends[:, :beams].nonzero().tolist():
            # A row that has enough takes no more, however long the others go on: it is the same alone.
            if best[row, column] > -torch.inf and len(finished[row]) < beams:
                ids = history[row, beam[row, column], 1:].tolist()
                finished[row].append((best[row, column].item() / length**length_penalty, ids))
        keep = best.masked_fill(ends, -torch.inf).topk(beams, dim=1)
        scores = keep.values
        beam, token = beam.gather(1, keep.indices), token.gather(1, keep.indices)
        history = torch.cat(
            (history.gather(1, beam[..., None].expand(-1, -1, length)), token[..., None]), dim=2
        )
        state.select((first_row + beam).flatten())
        if all(len(hypotheses) >= beams for hypotheses in finished):
            break
    for row in range(batch):
        if not finished[row]:
            ids = history[row, 0, 1:].tolist()
            finished[row].append((scores[row, 0].item() / max(len(ids), 1) ** length_penalty, ids))
    return [clean(max(hypotheses, key=lambda scored: scored[0])[1]) for hypotheses in finished]


def read_prompt(
    model: Generator, memory: Tensor, state: DecodingState, prompt: Tensor | None
) -> tuple[Tensor, int]:
    """Feed all but the last token of a prompt [B, P]: (the last tokens [B], P). Without one: the begin token."""
    if prompt is None:
        return torch.full((len(memory),), BOS, device=memory.device), 1
    for place in range(prompt.shape[1] - 1):
        model.step(prompt[:, place], state)
    return prompt[:, -1], prompt.shape[1]


def without_specials(logits: Tensor) -> Tensor:
    """Forbid padding, unknown, begin and mask tokens [N, V]: a caption never holds them."""
    logits[:, [PAD, UNK, BOS, MASK]] = -torch.inf
    return logits


def nucleus(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities [N, V] of the k likeliest tokens and of the smallest set that holds top_p."""
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p  # the token that crosses top_p stays
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered.masked_fill(outside, 0.0))
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def clean(ids: Sequence[int]) -> list[int]:
    """Cut at the end token and drop padding."""
    ids = list(ids)
    if EOS in ids:
        ids = ids[: ids.index(EOS)]
    return [token for token in ids if token != PAD]
