"""Budgets: as they are written, and checked against the smallest allocation before anything is measured."""

import re

import numpy as np
import pytest

import mpsearch
from mpsearch.allocation import SearchSpace
from mpsearch.budget import Budget, check_limits, feasible, read_budgets, restricted
from mpsearch.costs.base import CostTable
from mpsearch.costs.size import AverageBits, Bytes, Fraction
from mpsearch.errors import InputError
from mpsearch.layer import LayerSpec
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.integer import Integer
from mpsearch.tasks.digits import Digits

COSTS = {"bytes": Bytes(), "bits": AverageBits(), "fraction": Fraction()}
# 1,000 channels of 1,000 weights: 250,000 bytes of codes at 2 bits, 500,000 at 4, and 2,000 of scales
LAYERS = [LayerSpec(name, "linear", (1000, 1000), 10**6, name, (name,)) for name in ("one", "two", "three")]


def space(pin=(), other_bits=8 * 4000):
    return SearchSpace.build(LAYERS, {"w2": Integer(2), "w4": Integer(4)}, pin, other_bits)


def test_without_a_limit_there_is_no_budget():
    assert read_budgets(dict.fromkeys(COSTS), COSTS, space()) == ()


def test_every_limit_that_is_given_counts():
    budgets = read_budgets({"bytes": "1.2 MB", "bits": None, "fraction": 0.1}, COSTS, space())
    assert [(b.table.name, b.limit) for b in budgets] == [("bytes", 1_200_000.0), ("fraction", 0.1)]


def test_what_meets_the_limit_exactly_is_within():
    smallest = 3 * 252_000 + 4000
    (budget,) = read_budgets({"bytes": smallest}, COSTS, space())
    assert budget.allows([0, 0, 0])
    assert not budget.allows([0, 1, 0])
    mixed = 2 * 252_000 + 502_000
    (in_bits,) = read_budgets({"bits": 8 * mixed / 3e6}, COSTS, space())
    (in_fraction,) = read_budgets({"fraction": (mixed + 4000) / (12e6 + 4000)}, COSTS, space())
    for budget in (in_bits, in_fraction):
        for choice in ([0, 0, 1], [0, 1, 0], [1, 0, 0]):
            assert budget.allows(choice)
            assert budget.table.values[np.arange(3), choice].sum() <= budget.capacity
        assert not budget.allows([0, 1, 1])


@pytest.mark.parametrize(
    ("limits", "pin", "sentences"),
    [
        ({"bytes": "750kB"}, (), ["size_bytes <= 750,000", "below the least there is, 760,000: every layer at w2", "Raise the"]),
        ({"bytes": 1_259_999}, ("one:w4", "two:w4"), ["<= 1,259,999 ", "least there is, 1,260,000: 2 at w4, 1 "]),
        ({"bits": 2}, (), ["average_bits <= 2 ", "2.016: every layer at w2"]),
        ({"bits": 3}, ("*:w4",), ["4.016: every layer at w4", "loosen a pin"]),
        ({"fraction": 0.05}, (), ["fraction <= 0.05 ", "0.0633"]),
        ({"bytes": 0}, (), ["budget.bytes must be above 0; got 0"]),
        ({"bits": -3}, (), ["budget.bits must be above 0; got -3"]),
        ({"bits": "nan"}, (), ["budget.bits must be above 0; got nan"]),
        ({"fraction": "half"}, (), ["budget.fraction must be a number; got 'half'"]),
        ({"bits": [3]}, (), ["budget.bits must be a number"]),
        ({"byte": 10}, (), ["no cost 'byte' to budget", "Did you mean 'bytes'"]),
    ],
)
def test_a_wrong_limit_is_said_with_numbers(limits, pin, sentences):
    with pytest.raises(InputError) as caught:
        read_budgets(limits, COSTS, space(pin))
    for sentence in sentences:
        assert sentence in str(caught.value)


def test_a_budget_on_a_peak_narrows_the_choices():
    peak = CostTable("peak", "peak", np.array([[1.0, 1.0], [1.0, 9.0], [1.0, 1.0]]), 0.0, peak=True)
    inside, left = restricted(space(), [Budget(peak, 5.0)])
    assert inside.choices == (("w2", "w4"), ("w2",), ("w2", "w4"))
    assert left == ()
    assert feasible([Budget(peak, 5.0)], np.array([1, 0, 1]))
    assert not feasible([Budget(peak, 5.0)], np.array([0, 1, 0]))


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"fraction": 12}, "budget.fraction must be at most 1, the size in float32; got 12. For 12 % give 0.12."),
        ({"bytes": "1 MByte"}, "'1 MByte' is not a size"),
        ({"bytes": 0}, "budget.bytes must be above 0; got 0"),
        ({"bits": 1}, "The budget average_bits <= 1 is below the least there is, 2 or more: every layer at w2. Raise the budget"),
        ({"fraction": 0.05}, "The budget fraction <= 0.05 is below the least there is, 0.0625 or more: every layer at w2"),
    ],
)
def test_a_limit_that_no_model_meets_is_refused_before_the_model_is_loaded(limits, sentence):
    def model():
        raise AssertionError("the model was loaded")

    with pytest.raises(InputError, match=re.escape(sentence)):
        mpsearch.search(model, Digits(), schemes=["w4", "w2", "w8"], budget=limits)


def test_a_limit_that_a_wide_layer_meets_is_not_refused_early():
    schemes = {"w2": Integer(2), "ternary": Codebook("ternary"), "w2g64": Integer(2, group_size=64)}
    check_limits({"bits": 1.6, "fraction": 0.05, "bytes": 1, "latency_ms": None}, COSTS, schemes)
    with pytest.raises(InputError, match=r"1\.6 or more: every layer at ternary"):
        check_limits({"bits": 1.59}, COSTS, schemes)
