"""Text about an image, of either model: learned word by word, or by what a critic says of samples.

    written   the text goes on after a prompt: BOS prompt answer EOS; the loss is that of the answer
    judged    K captions are sampled of each image, and what a critic likes better than the others becomes likelier

Shapes: B batch, K captions of an image, M places of the memory, T tokens, D widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import kernels
from models import objectives
from models.base import Base
from models.generation import Generator, generate
from models.objectives import ObjectiveConfig
from models.tokens import BOS, EOS, IGNORE, PAD


class Critic(Protocol):
    """Judges captions that a model has sampled (train/tasks/reward.py)."""

    samples: int
    """captions of each image, at least 2"""
    prompt: Sequence[int]
    """what comes before a caption, without the begin token"""

    def speaker(self, model: Base) -> Generator:
        """The model as it may speak: without ids that no piece has."""

    def rewards(self, captions: Sequence[Sequence[int]]) -> Tensor:
        """fp32 [B*K]: what each caption is worth; B*K captions, those of image i at i*K to i*K+K-1. Of each its tokens, and the
        end token where it came to an end."""


class Writer(nn.Module):
    """A model (`base`) that writes text about images."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base

    def forward(
        self,
        images: Tensor,
        tokens: Tensor | None,
        targets: Tensor | None,
        words: float | None = None,
        label_smoothing: float = 0.0,
        critic: Critic | None = None,
    ) -> dict[str, Tensor]:
        """Loss "text", an fp32 scalar: the sum over `words` (None: those of this batch) of next-token cross-entropies. With a
        critic: that of `judged`, over `words` sampled captions; tokens and targets are not read.

        images: normalised [B, 3, height, width]. tokens int64 [B*K, T]: rows i*K to i*K+K-1 belong to image i. targets int64
        [B*K, T]: the same where a token is to be predicted, -100 elsewhere.
        """
        base = self.base
        memory = base.image_memory(images)
        if critic is not None:
            return self.judged(memory, critic, words)
        assert tokens is not None and targets is not None, "only a critic does without them"
        if len(tokens) > len(images):
            memory = memory.repeat_interleave(len(tokens) // len(images), dim=0)
        x = base.next_words(tokens[:, :-1], memory)
        config = ObjectiveConfig(label_smoothing=label_smoothing)
        loss = objectives.token_loss(x, base.decoder.embedding.weight, targets[:, 1:], config)
        asked = float((targets[:, 1:] != IGNORE).sum())
        return {"text": loss / max(asked if words is None else words, 1e-6)}

    def judged(self, memory: Tensor, critic: Critic, captions: float | None = None) -> dict[str, Tensor]:
        """Loss "cider", an fp32 scalar: minus the sum of rewards over `captions` (None: those of this batch), with the
        policy gradient of self-critical training (arXiv:1612.00563). What a caption's reward is measured against is the
        mean of the other samples of its image (arXiv:2003.09971).

        memory [B, M, D]. Samples are drawn without dropout of the text stack, and learned from with it.
        """
        base, samples = self.base, critic.samples
        memory = memory.repeat_interleave(samples, dim=0)
        tokens, targets, said = sample(base, memory.detach(), critic)
        rewards = critic.rewards(said).to(memory.device, torch.float32)
        of_image = rewards.view(-1, samples)
        others = (of_image.sum(1, keepdim=True) - of_image) / (samples - 1)
        x = base.next_words(tokens[:, :-1], memory)
        wanted = targets[:, 1:] != IGNORE
        each = kernels.linear_cross_entropy(
            x[wanted], base.decoder.embedding.weight, targets[:, 1:][wanted], reduction="none"
        )
        advantage = (of_image - others).flatten()[:, None].expand_as(wanted)[wanted]
        loss = (advantage * each.float()).sum()
        loss = loss - loss.detach() - rewards.sum()  # the value to look at, with the policy's gradient
        return {"cider": loss / max(len(rewards) if captions is None else captions, 1e-6)}


@torch.no_grad()
def sample(base: Base, memory: Tensor, critic: Critic) -> tuple[Tensor, Tensor, list[list[int]]]:
    """One caption for each row of memory [N, M, D]: as tokens int64 [N, T], as targets int64 [N, T] (-100 where nothing was
    chosen: begin token, prompt, padding), and each caption's own tokens. One that came to no end has no end token.

    Of a model with a number that is not finite anything is drawn: the loss shows it, and the engine leaves the step out."""
    length, prompt = base.config.text_length, [BOS, *critic.prompt]
    learning = base.decoder.training
    base.decoder.eval()
    try:
        said = generate(
            Finite(critic.speaker(base)), memory, method="sample", max_length=length,
            prompt=torch.tensor([prompt], device=memory.device).expand(len(memory), -1),
        )  # fmt: skip
    finally:
        base.decoder.train(learning)
    room = length - len(prompt)
    said = [ids if len(ids) == room else [*ids, EOS] for ids in said]
    rows = [[*prompt, *ids] for ids in said]
    tokens = torch.full((len(rows), length), PAD, device=memory.device)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids, device=memory.device)
    targets = tokens.masked_fill(tokens == PAD, IGNORE)
    targets[:, : len(prompt)] = IGNORE
    return tokens, targets, said


class Finite:
    """A generator whose logits are 0 where the model's are no numbers."""

    def __init__(self, model: Generator) -> None:
        self.model = model
        self.start = model.start

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        """See `models.generation.Generator`."""
        logits = self.model.step(tokens, state)
        return logits.masked_fill(logits.isnan(), 0.0)
