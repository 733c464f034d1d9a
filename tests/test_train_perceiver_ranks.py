"""PerceiverIO on several ranks and in micro-steps, which have different numbers of pairs of each kind: losses and gradients are
those of one process with the whole batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ranks import Launch
from test_models_perceiver import batch as pieces_of_six
from test_models_perceiver import packed

from dataload.multimodal import MultimodalBatch
from dataload.packed import Packed
from models import PERCEIVER_SIZES, PerceiverIO
from models.perceiver import PerceiverObjectives, Piece
from train.config import OptimConfig
from train.engine import Ranks, TorchEngine, join, leave
from train.engines.choice import build_engine
from train.machine import Precision
from train.multimodal.config import PerceiverPretrainConfig

ALONE = Ranks(0, 0, 1)
LOSSES = PerceiverObjectives(mvm=0.0, mam=0.0, agreement=0.3, contrastive_kind="softmax")
SMALL = dataclasses.replace(PERCEIVER_SIZES["tiny"], latent_layers=1, encoder_layers=1, decoder_layers=1)
CONFIG = PerceiverPretrainConfig(
    model=SMALL, objectives=LOSSES, optim=OptimConfig(lr=1e-3, warmup=0, clip=1.0), ema_decay=0.0
)
# Samples 0..11 of each rank and micro-step. Pictures: 0 1 4 6 7 10, sounds: 2 4 8 10, clips: 3 4 9 10, 5 and 11: text alone.
ONE = [[list(range(12))]]
TWO = [[[0, 1, 2, 3, 4, 5, 6, 7, 8]], [[9, 10, 11]]]
THREE = [[[0, 1, 2, 3]], [[5, 11]], [[4, 6, 7, 8, 9, 10]]]  # the second has no pair of any kind
STEPS = [[[0, 1, 6, 7], [2, 3, 4], [5, 11], [8, 9, 10]]]
BOTH = [
    [[0, 1, 2], [3, 4, 5, 6]],
    [[7], [8, 9, 10, 11]],
]  # clips are with one rank, and in one micro-step of it


def take(samples: list[int], texts: int = 1) -> MultimodalBatch:
    """These of twelve samples, with as many texts each."""
    both = [pieces_of_six(seed) for seed in (0, 1)]

    def chosen(name: str, repeat: int = 1) -> tuple[list[torch.Tensor], list[int], list[torch.Tensor]]:
        data, owners, masks = [], [], []
        for i, six in enumerate(both):
            piece: Piece = six["pieces"][name]
            for j, sample in enumerate(piece.sample.tolist()):
                if sample + 6 * i not in samples:
                    continue
                bounds = None if piece.offsets is None else piece.offsets.tolist()
                one = piece.data[j] if bounds is None else piece.data[bounds[j] : bounds[j + 1]]
                targets = six["mlm_targets"][bounds[j] : bounds[j + 1]] if name == "text" and bounds else None
                for copy in range(repeat):
                    data.append(one.roll(copy, 0))
                    owners.append(samples.index(sample + 6 * i))
                    if targets is not None:
                        masks.append(targets.roll(copy, 0))
                    elif piece.mask is not None:
                        masks.append(piece.mask[j])
        return data, owners, masks

    def pack(data: list[torch.Tensor], like: torch.Tensor) -> Packed:
        full = packed(data or [like[:0]], list(range(max(len(data), 1))))
        assert full.offsets is not None
        return Packed(full.data, full.offsets if data else full.offsets[:1], max(map(len, data), default=0))

    images, of_images, masks = chosen("image")
    sounds, of_sounds, _ = chosen("audio")
    clips, of_clips, _ = chosen("video")
    words, of_words, targets = chosen("text", texts)
    first = both[0]["pieces"]
    text, asked = pack(words, first["text"].data), torch.cat(targets)
    # Pictures come as bytes from the loader; the model's own scale does for this.
    return MultimodalBatch(
        torch.stack(images) if images else first["image"].data[:0],
        torch.tensor(of_images, dtype=torch.long),
        torch.stack(masks) if masks else first["image"].mask[:0],
        pack(sounds, first["audio"].data), torch.tensor(of_sounds, dtype=torch.long),
        pack(clips, first["video"].data), torch.zeros(0), torch.tensor(of_clips, dtype=torch.long),
        text, torch.where(asked == -100, text.values, 3), asked, torch.tensor(of_words, dtype=torch.long),
        torch.zeros(len(samples), dtype=torch.long), tuple(map(str, samples)),
    )  # fmt: skip


def built(engine: str, ranks: Ranks, micro_steps: int, **changes: Any) -> TorchEngine:
    config = dataclasses.replace(
        CONFIG,
        engine=engine,
        batch_size=12,
        accumulation=micro_steps,
        itc_negatives="global" if micro_steps > 1 else "microstep",
        **changes,
    )
    torch.manual_seed(0)
    model = PerceiverIO(SMALL)
    if not config.objectives.mam:
        for name in ("audio", "video"):
            model.adapters[name].hidden = hide_nothing
    return build_engine(model, config, torch.device("cpu"), Precision("fp32", ""), ranks)


def hide_nothing(piece: Piece, patches: torch.Tensor, lengths: torch.Tensor, share: float) -> torch.Tensor:
    """In place of masks that are drawn from torch's generators, for each micro-batch."""
    return torch.zeros(patches.shape[:2], dtype=torch.bool)


def train(one: TorchEngine, batches: list[MultimodalBatch]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Losses and gradient norms of two steps on the same samples, and the gradients of the first where the engine has them."""
    found, gradients = [], {}
    for step in range(2):
        normalizers, _ = one.agree(batches, False)
        for i, micro in enumerate(one.micro_batches(batches)):
            with one.micro_step(last=i == len(batches) - 1):
                one.backward(one.losses(micro, one.config.objectives, normalizers))
        if step == 0 and type(one) is TorchEngine:
            gradients = {
                name: p.grad.clone() for name, p in one.model.named_parameters() if p.grad is not None
            }
        result = one.step(1e-5)
        assert not result.skipped
        found.append((result.losses, result.grad_norm))
    return found, gradients


def on_ranks(engine: str, split: list[list[list[int]]], texts: int) -> Any:
    ranks = Ranks.from_environment()
    join(ranks, "cpu")
    mine = split[ranks.rank]
    one = built(engine, ranks, len(mine))
    found, gradients = train(one, [take(samples, texts) for samples in mine])
    leave(ranks)
    return found, {name: gradient.numpy() for name, gradient in gradients.items()}


def alone(texts: int) -> tuple[list[Any], dict[str, torch.Tensor]]:
    return train(built("single", ALONE, 1), [take(ONE[0][0], texts)])


def distance(some: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference, over the largest gradient."""
    assert some.keys() == other.keys() and len(some) > 10
    largest = max(g.abs().max().item() for g in other.values())
    return max((some[name] - other[name]).abs().max().item() for name in some) / largest


def close(some: list[Any], other: list[Any]) -> bool:
    return all(
        losses == pytest.approx(wanted, rel=1e-5) and norm == pytest.approx(length, rel=1e-5)
        for (losses, norm), (wanted, length) in zip(some, other, strict=True)
    )


@pytest.mark.parametrize(
    ("engine", "split", "texts"),
    [("ddp", THREE, 2), ("ddp", BOTH, 2), ("fsdp2", TWO, 1), ("deepspeed", TWO, 2)],
    ids=["ddp", "ddp-micro-steps", "fsdp2", "deepspeed"],
)
def test_ranks_are_one_large_batch(engine: str, split: list[list[list[int]]], texts: int) -> None:
    wanted, exact = alone(texts)
    assert {"itc", "vtc", "atc", "caption", "mlm", "mim"} == set(wanted[0][0])
    for found, gradients in Launch(len(split), on_ranks, engine, split, texts).results():
        assert close(found, wanted)
        if gradients:
            assert distance({name: torch.from_numpy(g) for name, g in gradients.items()}, exact) < 1e-5


@pytest.mark.parametrize("texts", [1, 2])
def test_micro_steps_are_one_large_batch(texts: int) -> None:
    wanted, exact = alone(texts)
    batches = [take(samples, texts) for samples in STEPS[0]]
    found, gradients = train(built("single", ALONE, 4), batches)
    assert close(found, wanted) and distance(gradients, exact) < 1e-5
    # The comparison can fail: with its own micro-batch alone, each has too few negatives.
    few = built("single", ALONE, 4)
    few.config = dataclasses.replace(few.config, itc_negatives="microstep")
    assert distance(train(few, batches)[1], exact) > 0.01


def test_random_numbers_are_those_of_the_first_pass() -> None:
    """Word dropout and drawn masks: a step of one micro-batch is the same with and without the first pass."""
    objectives = dataclasses.replace(LOSSES, word_dropout=0.4, mvm=1.0, mam=1.0, parallel_caption=0.5)
    whole, found = [take(ONE[0][0], 2)], []
    for negatives in ("microstep", "global"):
        one = built("single", ALONE, 1, objectives=objectives)
        one.config = dataclasses.replace(one.config, itc_negatives=negatives)
        torch.manual_seed(3)
        if negatives == "microstep":  # the seed that the first pass gives its only micro-batch
            torch.manual_seed(torch.randint(2**62, (1,)).item())
        normalizers, _ = one.agree(whole, False)
        for micro in one.micro_batches(whole):
            one.backward(one.losses(micro, objectives, normalizers))
        found.append(
            ({n: p.grad.clone() for n, p in one.model.named_parameters() if p.grad is not None}, one.totals())
        )
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-5)
    assert distance(found[1][0], found[0][0]) < 1e-5
