from __future__ import annotations

import dataclasses

import torch

from dataload.batch import IGNORE, Batch, EvalBatch


def make_batch() -> Batch:
    return Batch(
        pair_images=torch.full((2, 32, 32, 3), 7, dtype=torch.uint8),
        tokens=torch.tensor([[2, 9, 3], [2, 8, 3]]),
        mlm_tokens=torch.tensor([[2, 4, 3], [2, 4, 3]]),
        mlm_targets=torch.tensor([[-100, 9, -100], [-100, 8, -100]]),
        mim_images=torch.zeros(1, 32, 32, 3, dtype=torch.uint8),
        mim_mask=torch.ones(1, 1, 1, dtype=torch.bool),
        keys=("a/0", "a/1", "a/2"),
    )


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    moved = make_batch().to("meta")
    tensors = [getattr(moved, field.name) for field in dataclasses.fields(moved) if field.name != "keys"]
    assert len(tensors) == 6 and all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.pair_images.dtype == torch.uint8 and moved.mim_mask.dtype == torch.bool
    assert moved.keys == ("a/0", "a/1", "a/2")


def test_to_of_an_eval_batch_keeps_captions() -> None:
    batch = EvalBatch(
        torch.zeros(1, 32, 32, 3, dtype=torch.uint8), [["a", "b"]], torch.ones(2, 3), torch.zeros(2), ("k",)
    )
    moved = batch.to("meta")
    assert moved.images.device.type == moved.image_of_caption.device.type == "meta"
    assert moved.captions == [["a", "b"]]


def test_ignore_is_what_cross_entropy_ignores() -> None:
    logits, targets = torch.randn(4, 10), torch.tensor([1, IGNORE, IGNORE, 3])
    whole = torch.nn.functional.cross_entropy(logits, targets)
    asked = torch.nn.functional.cross_entropy(logits[[0, 3]], targets[[0, 3]])
    torch.testing.assert_close(whole, asked)
