"""The checksum of weights against sums of plain integers, and that nothing which could go wrong leaves it unchanged."""

import hashlib
import struct

import numpy as np
import pytest
import torch

from tstar_ray.weights import checksum, checksum_parts


def plain_checksum(data: bytes) -> str:
    padded = data + bytes(-len(data) % 8)
    words = struct.unpack(f"<{len(padded) // 8}q", padded)
    sums = sum(words), sum(i * word for i, word in enumerate(words)), len(data)
    return hashlib.blake2b(b"".join((s % 2**64).to_bytes(8, "little") for s in sums), digest_size=8).hexdigest()


def bytes_of(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 4, 2047, 2048, 4096, 12345])
def test_it_equals_sums_of_plain_integers_however_the_buffer_is_cut(dtype, size):
    torch.manual_seed(size)
    flat = torch.randn(size).to(dtype)
    expected = plain_checksum(bytes_of(flat))
    assert checksum(flat) == expected
    for seed in range(5):
        cuts = np.sort(np.random.default_rng(seed).integers(0, size + 1, 4))
        views = [flat[start:end] for start, end in zip([0, *cuts], [*cuts, size])]
        assert checksum_parts(views) == checksum_parts([v.clone() for v in views]) == expected


def test_parameters_of_any_shape_count_in_their_own_order():
    matrix = torch.randn(64, 48)
    assert checksum_parts([matrix]) == checksum(matrix.reshape(-1))
    assert checksum_parts([matrix.T]) == checksum(matrix.T.reshape(-1)) != checksum_parts([matrix])


@pytest.mark.parametrize("size", [1500, 40_000])
def test_every_damage_shows(size):
    flat = torch.randn(size)
    words = flat.view(torch.int64)
    found = {checksum(flat)}

    def differs(damaged):
        found.add(checksum(damaged))
        return len(found)

    flipped = flat.clone()
    flipped.view(torch.int32)[size // 3] ^= 1
    assert differs(flipped) == 2
    for i, j in [(0, 1), (5, 5 + 1024 if size > 2100 else 300), (0, size // 2 - 1)]:  # within a row, a column, across
        swapped = words.clone()
        swapped[i], swapped[j] = words[j], words[i]
        differs(swapped.view(torch.float32))
    assert len(found) == 5
    assert differs(torch.cat([flat, torch.zeros(1)])) == 6
    assert differs(torch.cat([torch.zeros(2), flat])) == 7
    assert differs(flat[:-1]) == 8
    torn = torch.cat([flat[: size // 2], torch.randn(size - size // 2)])
    assert differs(torn) == 9
