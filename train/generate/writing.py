"""How captions are written and printed, of any kind of model."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from dataload.tokenizer import Tokenizer
from models import Aurora
from models.aurora.decoder import DecodingState
from models.generation import generate
from models.perceiver import PerceiverIO
from train.checkpoint import LoadedModel

BEAM_SEARCH = {
    "beams": 4,
    "length_penalty": 1.0,
}  # options of one method, and what they are where nothing is said
SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}


class KnownPieces:
    """`model` as models.generation wants it, kept from saying ids that the tokenizer lacks.

    The embedding may have more rows than there are pieces; training never reaches them, but a sample can.
    """

    def __init__(self, model: Aurora | PerceiverIO, tokenizer: Tokenizer) -> None:
        self.model, self.pieces = model, tokenizer.vocab_size

    def start(self, memory: Tensor) -> DecodingState:
        """Begin captions for memory [B, M, D]."""
        return self.model.start(memory)

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        """Logits [N, V] after tokens int64 [N]."""
        logits = self.model.step(tokens, state)
        logits[:, self.pieces :] = -torch.inf
        return logits


@torch.no_grad()
def write(
    loaded: LoadedModel, memory: Tensor, args: argparse.Namespace, generator: torch.Generator
) -> list[list[str]]:
    """`num` captions for each row of memory [B, M, D], as the options say."""
    ids = generate(
        KnownPieces(loaded.model, loaded.tokenizer),
        memory.repeat_interleave(args.num, 0),
        method=args.method,
        max_length=args.max_length or loaded.config.model.text_length,
        beams=args.beams,
        length_penalty=args.length_penalty,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        generator=generator,
    )
    texts = [loaded.tokenizer.decode(tokens) for tokens in ids]
    return [texts[i : i + args.num] for i in range(0, len(texts), args.num)]


def typed(args: argparse.Namespace, name: str) -> str:
    """An option as it stands in the command."""
    return f"--{name.replace('_', '-')} {str(getattr(args, name)).removesuffix('.0')}"


def one_line(caption: str) -> str:
    """A model can write any byte: line breaks and terminal codes become spaces; a line stays a caption. Nothing is said to be
    nothing."""
    return (
        " ".join("".join(c if c.isprintable() else " " for c in caption).split())
        or "(the model wrote nothing)"
    )
