"""The blocks of llama.cpp: bytes as in a GGUF file, weights bit for bit as its decoder has them."""

import numpy as np
import pytest
import torch

from mpsearch.errors import InputError
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.k_quant import KQuant
from mpsearch.schemes.k_quant_layout import FORMATS

BYTES = {  # of a block, ggml-common.h
    **{"q4_1": 20, "q5_1": 24, "iq4_nl": 18, "q2_k": 84, "q3_k": 110, "q4_k": 144, "q5_k": 176, "q6_k": 210, "iq4_xs": 136}
}


@pytest.fixture(params=FORMATS)
def scheme(request):
    return KQuant(request.param)


def random_blocks(scheme, rows=16, n_blocks=3, seed=0):
    """Blocks of random bytes, whose float16 numbers are finite, and the shape of their weight."""
    torch.manual_seed(seed)
    blocks = torch.randint(0, 256, (rows, n_blocks, scheme.blocks.n_bytes), dtype=torch.uint8)
    at = 0
    for field in scheme.blocks.fields:
        if field.plane is None:
            blocks[..., at : at + 2] = torch.randn(rows, n_blocks, 1).half().view(torch.uint8)
        at += field.n_bytes
    return {"blocks": blocks.flatten(1)}, (rows, n_blocks * scheme.blocks.block)


def golden(scheme):
    """gguf's decoder of the scheme: blocks `[rows, bytes]` -> float32 `[rows, columns]`."""
    gguf = pytest.importorskip("gguf", reason="needs pip install gguf")
    type_ = getattr(gguf.GGMLQuantizationType, scheme.ggml_type)
    assert gguf.GGML_QUANT_SIZES[type_] == (scheme.blocks.block, scheme.blocks.n_bytes)
    return type_, lambda blocks: gguf.quants.dequantize(blocks, type_)


def test_bytes_of_a_block(scheme):
    block = scheme.blocks.block
    assert scheme.storage_bits((3, 2 * block)) == 8 * 3 * 2 * BYTES[scheme.format]
    assert scheme.layout((3, 2 * block)) == {"blocks": (torch.uint8, (3, 2 * BYTES[scheme.format]))}


def test_codes_and_steps_are_packed_as_they_were_unpacked(scheme):
    tensors, shape = random_blocks(scheme)
    codes, steps = scheme.unpacked(tensors, shape)
    assert codes.max() == 2**scheme.weight_bits - 1
    assert torch.equal(scheme.stored(codes, steps, shape).tensors["blocks"], tensors["blocks"])
    assert torch.equal(torch.from_numpy(scheme.ggml_blocks(tensors, shape)), tensors["blocks"])


def test_random_blocks_are_decoded_as_by_gguf(scheme):
    _, decode = golden(scheme)
    tensors, shape = random_blocks(scheme)
    expected = decode(tensors["blocks"].numpy())
    assert np.array_equal(scheme.dequantize(tensors, shape).numpy().view(np.uint32), expected.view(np.uint32))


def test_what_ggml_encodes_is_decoded_as_by_gguf(scheme):
    libgguf = pytest.importorskip("libgguf", reason="needs pip install libgguf")
    type_, decode = golden(scheme)
    torch.manual_seed(1)
    weight = torch.randn(8, 512) * torch.rand(8, 512)
    blocks = libgguf.quantize_rows(weight.numpy(), type_)
    stored = scheme.dequantize({"blocks": torch.from_numpy(blocks)}, (8, 512))
    assert np.array_equal(stored.numpy().view(np.uint32), decode(blocks).view(np.uint32))
    assert (stored - weight).square().mean() < 0.2 * weight.square().mean()


def test_rows_of_other_lengths_are_refused(scheme):
    block = scheme.blocks.block
    assert scheme.takes("linear", (3, block))
    assert scheme.takes("embedding", (3, 2 * block))
    assert not scheme.takes("linear", (3, block - 16))
    assert not scheme.takes("conv2d", (3, block, 1, 1))
    assert scheme.storage_bits((3, block - 16)) == scheme.storage_bits((3, block))
    with pytest.raises(InputError, match=f"{scheme.ggml_type} stores rows in blocks of {block} weights; got rows of 40"):
        RoundToNearest().quantize(torch.zeros(2, 40), scheme)


def test_damaged_tensors_are_refused(scheme):
    tensors, shape = random_blocks(scheme)
    scheme.check(tensors, shape)
    with pytest.raises(InputError, match="'blocks' must be torch"):
        scheme.check({"blocks": tensors["blocks"][:, 1:]}, shape)
    with pytest.raises(InputError, match="it must have the tensors blocks; got codes"):
        scheme.check({"codes": tensors["blocks"]}, shape)
    damaged = tensors["blocks"].clone().fill_(0xFF)  # a float16 of ones is NaN
    with pytest.raises(InputError, match=r"'blocks' must stand for finite weights; \d+ of \d+ are not"):
        scheme.check({"blocks": damaged}, shape)


def test_q1_0_is_one_bit_in_groups_of_128():
    """ggml's bits and half scales as codes and scales of `Integer(1, 128)`: the same bytes, the same weights."""
    libgguf = pytest.importorskip("libgguf", reason="needs pip install libgguf")
    if not libgguf.row_size(41, 256):
        pytest.skip("this libgguf has no Q1_0")
    torch.manual_seed(0)
    stored = libgguf.quantize_rows(torch.randn(4, 256).numpy(), 41)
    expected = np.empty((4, 256), np.float32)
    libgguf.dequantize_rows_into_raw(41, stored, expected, 4, 256)
    blocks = torch.from_numpy(stored).reshape(4, 2, 18)
    scales = 2 * blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    codes = ((blocks[..., 2:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(4, 256)
    weight = Integer(1, 128).stored(codes, scales, None, {}, (4, 256))
    assert weight.nbytes == stored.nbytes
    assert np.array_equal(weight.dequantize().numpy(), expected)


def test_unknown_formats_are_refused():
    with pytest.raises(InputError, match=r"format of llama.cpp's blocks must be one of q4_1, .*; got 'q7_k'"):
        KQuant("q7_k")


def test_descriptions():
    texts = [KQuant(name).describe() for name in ("q4_k", "q6_k", "q4_1", "iq4_xs")]
    assert texts == [
        "Q4_K: 4-bit codes, integer scale and minimum per 32 weights, float16 scale and minimum per 256 weights",
        "Q6_K: 6-bit codes, integer scale per 16 weights, float16 scale per 256 weights",
        "Q4_1: 4-bit codes, float16 scale and minimum per 32 weights",
        "IQ4_XS: 4-bit codes of a table, integer scale per 32 weights, float16 scale per 256 weights",
    ]
