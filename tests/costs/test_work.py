"""Costs of the work: bit-operations and millijoules, against sums done by hand."""

import pytest

from mpsearch.allocation import SearchSpace
from mpsearch.costs.bit_operations import BitOperations
from mpsearch.costs.millijoules import Millijoules
from mpsearch.errors import InputError
from mpsearch.layer import LayerSpec
from mpsearch.schemes.floating import Float
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer

LAYERS = [
    LayerSpec("embed", "embedding", (10, 8), 0, "embed", ("embed",)),
    LayerSpec("q", "linear", (8, 8), 64, "qk", ("q",)),
    LayerSpec("k", "linear", (4, 8), 32, "qk", ("k",)),
    LayerSpec("conv", "conv2d", (4, 2, 3, 3), 7200, "conv", ("conv",)),
]
SCHEMES = {
    "w4": Integer(4),
    "w4a8": Integer(4, input=IntegerInput(8)),
    "w2a4": Integer(2, input=IntegerInput(4)),
    "fp16": Float("float16"),
}
SPACE = SearchSpace.build(LAYERS, SCHEMES, other_bits=640)
W4, W4A8, W2A4, FP16 = range(4)


def test_bit_operations_are_macs_times_both_bits():
    table = BitOperations().table(SPACE)
    assert table.values.tolist() == [
        [0, 0, 0, 0],
        [96 * 4 * 32, 96 * 4 * 8, 96 * 2 * 4, 96 * 16 * 32],
        [7200 * 4 * 32, 7200 * 4 * 8, 7200 * 2 * 4, 7200 * 16 * 32],
    ]
    assert table.cost_of([FP16, W4A8, W2A4]) == 96 * 32 + 7200 * 8


def test_millijoules_are_arithmetic_and_memory():
    table = Millijoules().table(SPACE)
    pj_per_bit = 1300 / 64
    assert table.constant == pytest.approx(1e-9 * 640 * pj_per_bit)
    assert (table.values[0] == 0).all(), "rows that are looked up"
    stored = {"w4": 4 * 72 + 16 * 4, "w2a4": 2 * 72 + 16 * 4, "fp16": 16 * 72}
    assert table.values[2, W4] == pytest.approx(1e-9 * (7200 * 4.6 + stored["w4"] * pj_per_bit))
    assert table.values[2, FP16] == pytest.approx(1e-9 * (7200 * 4.6 + stored["fp16"] * pj_per_bit))
    assert table.values[2, W4A8] == pytest.approx(1e-9 * (7200 * (0.2 / 2 + 0.1) + stored["w4"] * pj_per_bit))
    assert table.values[2, W2A4] == pytest.approx(1e-9 * (7200 * (0.2 / 8 + 0.1) + stored["w2a4"] * pj_per_bit))


def test_a_batch_shares_what_is_read_and_not_what_is_computed():
    one, eight = Millijoules().table(SPACE), Millijoules(8).table(SPACE)
    assert eight.constant == pytest.approx(one.constant / 8)
    computed = 1e-9 * 7200 * 4.6
    assert eight.values[2, W4] - computed == pytest.approx((one.values[2, W4] - computed) / 8)
    with pytest.raises(InputError, match="batch_size must be an integer of at least 1; got 0"):
        Millijoules(0)
