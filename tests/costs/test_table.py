"""Costs from a table of the user's."""

import numpy as np
import pytest

from mpsearch.allocation import SearchSpace
from mpsearch.budget import read_budgets
from mpsearch.costs.table import TableCost
from mpsearch.errors import InputError
from mpsearch.layer import LayerSpec
from mpsearch.pipeline.solve import solution
from mpsearch.registry import resolve

LAYERS = [LayerSpec(name, "linear", (8, 8), 64, group, (name,)) for name, group in (("a.q", "a"), ("a.k", "a"), ("b", "b"))]
SPACE = SearchSpace.build(LAYERS, {name: resolve("scheme", name) for name in ("w4", "w8")}, ["b:w8"])
ROWS = "layer,scheme,value\na.*,w4,1\na.*,w8,3\na.k,w8,5\nb,w8,10\n,,0.5\n"


def cost(tmp_path, text, **options):
    (tmp_path / "npu.csv").write_text(text)
    return TableCost(str(tmp_path / "npu.csv"), **options)


def test_names_go_before_patterns_and_groups_are_sums(tmp_path):
    table = cost(tmp_path, ROWS).table(SPACE)
    i, j = SPACE.names.index("a"), SPACE.names.index("b")
    assert table.values[i].tolist() == [1 + 1, 3 + 5]
    assert table.values[j, SPACE.scheme_names.index("w8")] == 10
    assert table.constant == 0.5
    choice = np.zeros(2, int)
    choice[j] = 1
    assert table.cost_of(choice) == 12.5


def test_it_is_budgeted(tmp_path):
    costs = {"table": cost(tmp_path, ROWS)}
    losses = np.where(SPACE.allowed, [[2.0, 1.0], [2.0, 1.0]], np.inf)
    budget = {limit: solution(SPACE, losses, read_budgets({"table": limit}, costs, SPACE)) for limit in (12.5, 20)}
    assert budget[12.5]["a"] == "w4"
    assert budget[20]["a"] == "w8"
    with pytest.raises(InputError, match=r"12\.5"):
        read_budgets({"table": 12}, costs, SPACE)


def test_the_rows_of_a_batch_size_count(tmp_path):
    both = "layer,scheme,value,batch_size\n*,w4,1,1\n*,w8,2,1\n*,w4,10,8\n*,w8,20,8\n"
    assert cost(tmp_path, both, batch_size=8).table(SPACE).values.max() == 40
    with pytest.raises(InputError, match=r"rows for batch sizes 1, 8. Set cost.table.batch_size"):
        cost(tmp_path, both).table(SPACE)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("layer,scheme,value\n*,w4,1\n", "has no row for layer '.*' in scheme 'w8'. Add it, or a pattern"),
        (ROWS + "*,w4,2\n", r"has 2 rows for layer 'a\.[qk]' in scheme 'w4'; expected one"),
        (ROWS + ",,2\n", "has 2 rows without a layer and a scheme"),
        ("layer,value\n*,1\n", "is not a cost table: it has no column scheme"),
        ("layer,scheme,value\n*,w4,-1\n", "is not a cost table: the value of row 1 is -1, expected a number of 0 or more"),
        ("layer,scheme,value\n*,w4,much\n", "is not a cost table: could not convert string to float"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_sentence(tmp_path, text, sentence):
    with pytest.raises(InputError, match=sentence):
        cost(tmp_path, text).table(SPACE)


def test_a_missing_file_is_said():
    for path in (None, "nowhere.csv"):
        with pytest.raises(InputError, match=f"There is no cost table {path}. Set cost.table.path"):
            TableCost(path).table(SPACE)
