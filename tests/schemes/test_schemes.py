"""Schemes: their sizes, what their stored tensors stand for, and the checks of their arguments."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mpsearch.errors import InputError
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.base import QuantizedTensor, QuantScheme, scheme_from_fields
from mpsearch.schemes.floating import FORMATS, Float
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.k_quant import KQuant
from mpsearch.schemes.outliers import Outliers
from mpsearch.schemes.rotated import Rotated

CONF = Path(__file__).parents[2] / "conf" / "scheme"
SHAPES = [(6, 4, 3, 3), (5, 33), (1, 7), (3, 1), (7,)]
IN_BLOCKS = [(5, 256), (1, 512), (0, 256)]
# Largest relative error of rounding to nearest: half a unit in the last place of 10, 7 and 23 bits of mantissa.
ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 0}


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_choice_can_be_built(path):
    assert path.read_text().startswith(f"# @package scheme.{path.stem}\n")
    config = OmegaConf.load(path)
    scheme = instantiate(config, _convert_="object")
    assert isinstance(scheme, QuantScheme)
    fields = scheme.fields()
    assert set(config) - {"_target_"} == set(fields) - {"class"}, "a YAML spells every field"
    assert json.loads(json.dumps(fields)) == fields
    assert scheme_from_fields(fields) == scheme
    assert scheme.describe()
    torch.manual_seed(0)
    for shape in IN_BLOCKS if isinstance(scheme, KQuant) else SHAPES:
        quantized = RoundToNearest().quantize(torch.randn(shape), scheme)
        assert quantized.shape == shape
        assert 8 * quantized.nbytes == scheme.storage_bits(shape)
        dense = quantized.dequantize()
        assert (dense.dtype, tuple(dense.shape)) == (torch.float32, shape)
        assert torch.equal(dense, scheme.dequantize(quantized.tensors, shape))


def test_names_say_the_bits():
    for path in CONF.glob("w*.yaml"):
        whole = instantiate(OmegaConf.load(path))
        scheme = whole.dense if isinstance(whole, Outliers | Rotated) else whole
        of_rotation = "r" if isinstance(whole, Rotated) else ""
        of_outliers = f"o{100 * whole.share:g}" if isinstance(whole, Outliers) else ""
        input_params = "" if scheme.input is None else f"a{scheme.input.bits}"
        of_groups = "" if scheme.group_size == "channel" else f"g{scheme.group_size}"
        static = "_static" if scheme.input is not None and scheme.input.scale == "static" else ""
        assert path.stem == f"w{scheme.bits}{input_params}{of_groups}{of_outliers}{of_rotation}{static}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"bits": 0}, "bits of an integer scheme must be an integer from 1 to 8; got 0"),
        ({"bits": 9}, "got 9. For more, use fp16"),
        ({"bits": 4.0}, "bits .* 1 to 8; got 4.0"),
        ({"bits": "4"}, "bits .* 1 to 8; got '4'"),
        ({"bits": True}, "bits .* 1 to 8; got True"),
        ({"bits": 4, "group_size": 0}, "'channel' or 'tensor'; got 0"),
        ({"bits": 4, "group_size": -1}, "'channel' or 'tensor'; got -1"),
        ({"bits": 4, "group_size": 2.5}, "'channel' or 'tensor'; got 2.5"),
        ({"bits": 4, "group_size": True}, "'channel' or 'tensor'; got True"),
        ({"bits": 4, "group_size": "row"}, "'channel' or 'tensor'; got 'row'"),
        ({"bits": 4, "scale_dtype": "bfloat16"}, "scale_dtype must be one of float16, float32; got 'bfloat16'"),
    ],
)
def test_fields_of_integers_are_checked(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        Integer(**arguments)


def test_format_of_floats_is_checked():
    with pytest.raises(InputError, match="one of float16, bfloat16, float32; got 'fp8'"):
        Float("fp8")


def test_schemes_are_frozen_values():
    assert Integer(4) == Integer(4, "channel", True, "float16") != Integer(4, 32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Integer(4).bits = 5
    assert Integer(4).fields() != Integer(4, symmetric=False).fields()


@pytest.mark.parametrize(
    ("group_size", "shape", "grid"),
    [
        ("channel", (64, 3, 3, 3), (64, 27, 27)),
        ("tensor", (64, 3, 3, 3), (1, 1728, 1728)),
        (9, (64, 3, 3, 3), (64, 27, 9)),
        (1000, (64, 3, 3, 3), (64, 27, 1000)),
        ("channel", (10,), (10, 1, 1)),
        ("tensor", (4, 0), (1, 0, 1)),
        ("channel", (4, 0), (4, 0, 1)),
        (8, (0, 5), (0, 0, 8)),
    ],
)
def test_grid(group_size, shape, grid):
    assert Integer(4, group_size).grid(shape) == grid


def test_example_of_the_docstring():
    """Weight [64, 3, 3, 3], groups of 9: 864 bytes of codes, 384 of scales, 192 of zero points."""
    shape = (64, 3, 3, 3)
    assert Integer(4, 9).storage_bits(shape) == 8 * (864 + 384)
    assert Integer(4, 9, symmetric=False).storage_bits(shape) == 8 * (864 + 384 + 192)
    quantized = RoundToNearest().quantize(torch.randn(shape), Integer(4, 9, symmetric=False))
    assert {name: (list(t.shape), t.dtype) for name, t in quantized.tensors.items()} == {
        "codes": ([864], torch.uint8),
        "scales": ([64, 3], torch.float16),
        "zero_points": ([64, 3], torch.uint8),
    }


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", ["tensor", "channel", 1, 5, 16, 1000])
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_at_most_half_a_step(bits, group_size, symmetric):
    """Rounding to nearest in a range that holds all weights; 33 columns leave an odd tail in groups of 5 and 16."""
    torch.manual_seed(bits)
    weight = torch.randn(6, 33)
    scheme = Integer(bits, group_size, symmetric, scale_dtype="float32")
    quantized = RoundToNearest().quantize(weight, scheme)
    rows, columns, size = scheme.grid((6, 33))
    scales = quantized.tensors["scales"].repeat_interleave(size, 1)[:, :columns]
    error = (quantized.dequantize() - weight).abs().reshape(rows, columns)
    steps = 0.5 if symmetric else 1.0  # an asymmetric zero point is rounded too: half a step more at the ends
    assert (error <= scales * steps * (1 + 1e-5)).all()


def test_one_bit_has_the_levels_of_a_sign():
    weight = torch.tensor([[-3.0, -0.1, 0.2, 2.0]])
    quantized = RoundToNearest().quantize(weight, Integer(1))
    assert quantized.dequantize().abs().unique().numel() == 1
    assert torch.equal(quantized.dequantize().sign(), weight.sign())


@pytest.mark.parametrize("format", FORMATS)
def test_floats_round_to_nearest(format):
    weight = torch.randn(7, 5, 3)
    quantized = RoundToNearest().quantize(weight, Float(format))
    assert 8 * quantized.nbytes == Float(format).storage_bits((7, 5, 3))
    error = (quantized.dequantize() - weight).abs()
    assert (error <= weight.abs() * ROUNDING[format]).all()
    assert torch.equal(quantized.dequantize(), weight.to(FORMATS[format]).float())


def test_what_overflows_float16_is_said():
    with pytest.raises(InputError, match=r"A weight of 70000 does not fit in float16. Use bf16 or fp32"):
        Float("float16").quantize(torch.tensor([1.0, -70000.0]))
    assert Float("bfloat16").quantize(torch.tensor([1.0, -70000.0])).dequantize()[1] == -70144


def test_descriptions():
    assert Integer(4).describe() == "4-bit integer, symmetric, per-channel float16 scale"
    assert Integer(1, "tensor", False, "float32").describe() == "1-bit integer, asymmetric, per-tensor float32 scale"
    assert Integer(2, 64, False).describe() == "2-bit integer, asymmetric, float16 scale per 64 weights"
    assert Float("bfloat16").describe() == "bfloat16"


def test_nothing_weighs_nothing():
    for scheme in (Integer(3), Integer(3, "tensor", False), Integer(3, 16), Float("float16")):
        quantized = RoundToNearest().quantize(torch.zeros(0, 5), scheme)
        assert 8 * quantized.nbytes == scheme.storage_bits((0, 5))
        assert quantized.dequantize().shape == (0, 5)


def test_nbytes_counts_every_stored_tensor():
    tensors = {"codes": torch.zeros(10, dtype=torch.uint8), "scales": torch.zeros(3, 2).half()}
    assert QuantizedTensor(Integer(4), (3, 6), tensors).nbytes == 10 + 12
    assert math.isclose(Integer(4, 3).storage_bits((3, 6)) / 8, 9 + 12)
