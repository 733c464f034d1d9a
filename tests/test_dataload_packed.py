"""Sequences without padding: against torch's own packing, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataload.packed import Packed, concatenate, pack


def sequences(lengths: list[int], width: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(length, width) for length in lengths]


@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [0], [0, 0], [7]])
def test_pack_and_back(lengths: list[int]) -> None:
    parts = sequences(lengths)
    packed = pack(parts)
    assert packed.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.longest == max(lengths) and len(packed) == len(lengths)
    assert all(torch.equal(a, b) for a, b in zip(packed, parts, strict=True))
    padded, mine = packed.padded(fill=-1)
    assert torch.equal(padded, torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-1))
    assert mine.sum(1).tolist() == lengths
    assert torch.equal(padded[mine], packed.values)


def test_empty_packs_keep_their_kind() -> None:
    packed = pack([], like=torch.zeros(0, 8, 8, 3, dtype=torch.uint8))
    assert packed.values.shape == (0, 8, 8, 3) and packed.values.dtype == torch.uint8
    assert packed.cu_seqlens.tolist() == [0] and packed.longest == 0 and list(packed) == []


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="no sequence to pack"):
        pack([])
    with pytest.raises(
        ValueError, match=r"sequence 1 is torch.float32 \[n, 4\] on cpu, the first torch.float32 \[n, 3\]"
    ):
        pack([torch.zeros(2, 3), torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="sequence 1 is torch.float64"):
        pack([np.zeros((2, 3), np.float32), np.zeros((2, 3))])
    with pytest.raises(ValueError, match="sequence 0 is a scalar"):
        pack([torch.tensor(1.0)])


def test_modalities_are_joined_sample_by_sample() -> None:
    """Four samples: image and text; text alone; two sounds; nothing."""
    image, sounds, texts = sequences([4]), sequences([2, 3]), sequences([5, 1])
    parts = [
        (pack(image), torch.tensor([0])),
        (pack(sounds), torch.tensor([2, 2])),
        (pack(texts), torch.tensor([0, 1])),
    ]
    joined, kinds = concatenate(parts, samples=4)
    assert joined.lengths.tolist() == [9, 1, 5, 0] and joined.longest == 9
    expected = [torch.cat([image[0], texts[0]]), texts[1], torch.cat(sounds), torch.zeros(0, 3)]
    assert all(torch.equal(a, b) for a, b in zip(joined, expected, strict=True))
    assert kinds.tolist() == [0] * 4 + [2] * 5 + [2] + [1] * 5


def test_joining_has_gradients() -> None:
    values = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, 3, dtype=torch.float64)

    def joined(values: torch.Tensor) -> torch.Tensor:
        first = Packed(values[:4], torch.tensor([0, 1, 4], dtype=torch.int32), 3)
        second = Packed(values[4:], torch.tensor([0, 2], dtype=torch.int32), 2)
        packed, _ = concatenate([(first, torch.tensor([1, 0])), (second, torch.tensor([0]))], 2)
        return packed.values * weights

    assert torch.autograd.gradcheck(joined, (values,))


def test_wrong_owners_are_refused() -> None:
    packed = pack(sequences([2, 1]))
    with pytest.raises(ValueError, match="part 0 has 2 sequences"):
        concatenate([(packed, torch.tensor([0]))], 2)
    with pytest.raises(ValueError, match=r"outside of 0\.\.1"):
        concatenate([(packed, torch.tensor([0, 2]))], 2)
    with pytest.raises(ValueError, match="nothing"):
        concatenate([], 2)


def test_joined_sequences_feed_packed_attention() -> None:
    """What it is for: latents that read samples of several modalities without padding."""
    from kernels import latent_attention

    parts = [
        (pack(sequences([4, 2], 16)), torch.tensor([0, 1])),
        (pack(sequences([3], 16)), torch.tensor([1])),
    ]
    joined, _ = concatenate(parts, samples=2)
    latents = torch.randn(2, 5, 2, 8)
    keys = joined.values.view(-1, 2, 8)
    out = latent_attention(latents, keys, keys, cu_seqlens_k=joined.cu_seqlens)
    for i, one in enumerate(joined):
        q, k = latents[i].transpose(0, 1), one.view(-1, 2, 8).transpose(0, 1)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, k)
        torch.testing.assert_close(out[i], expected.transpose(0, 1))
