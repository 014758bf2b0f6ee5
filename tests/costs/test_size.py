"""The costs of an allocation, and how their limits are written."""

from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mpsearch.allocation import SearchSpace
from mpsearch.costs.base import Cost
from mpsearch.costs.latency import REST, Latency, write_latency
from mpsearch.costs.size import parse_bytes
from mpsearch.errors import InputError
from mpsearch.layer import Activations, LayerSpec
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer

CONF = Path(__file__).parents[2] / "conf" / "cost"
SHAPES = [(8, 3, 3, 3), (5, 7), (1, 13)]
SCHEMES = {"w1": Integer(1), "w3g4": Integer(3, 4, symmetric=False), "fp16": Float("float16")}


@pytest.fixture
def space():
    layers = [
        LayerSpec(f"layer{i}", "linear", shape, 10, f"layer{i}", (f"layer{i}",), Activations(100 + i, 60, 10, 1, 50))
        for i, shape in enumerate(SHAPES)
    ]
    return SearchSpace.build(layers, SCHEMES, other_bits=8 * 333)


@pytest.fixture
def latency_csv(space, tmp_path):
    """What `cost=latency_ms` reads: each layer faster in a smaller scheme."""
    pairs = [(name, scheme) for name in space.names for scheme in space.scheme_names]
    cells = [Latency(n, "linear", "1x27", s, 1, 2, "avx2", i + 1.0) for i, (n, s) in enumerate(pairs)]
    write_latency(tmp_path / "latency.csv", [Latency(REST, "", "", REST, 1, 2, "avx2", 0.5), *cells])
    return str(tmp_path / "latency.csv")


@pytest.fixture
def npu_csv(tmp_path, space):
    """What `cost=table` reads."""
    rows = [f"*,{scheme},{i + 1}" for i, scheme in enumerate(space.scheme_names)]
    (tmp_path / "npu.csv").write_text("\n".join(["layer,scheme,value", *rows]))
    return str(tmp_path / "npu.csv")


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_choice_can_be_built(path, space, latency_csv, npu_csv):
    assert path.read_text().startswith("# @package _global_\n")
    config = OmegaConf.load(path)
    assert list(config.cost) == list(config.budget) == [path.stem]
    assert config.budget[path.stem] is None
    reads = {"path": npu_csv if path.stem == "table" else latency_csv} if "path" in config.cost[path.stem] else {}
    cost = instantiate(config.cost[path.stem], _convert_="object", **reads)
    assert isinstance(cost, Cost)
    assert cost.name == path.stem
    table = cost.table(space)
    assert (table.name, table.column) == (cost.name, cost.column)
    assert table.values.shape == (3, 3)
    assert (table.values > 0).all()
    for choice in np.ndindex(3, 3, 3):
        entries = [table.values[i, j] for i, j in enumerate(choice)]
        assert table.cost_of(choice) == pytest.approx(
            max(table.constant, *entries) if table.peak else table.constant + sum(entries)
        )
    assert cost.parse("1") == cost.parse(1) == 1.0


def test_one_size_in_three_units(space):
    weights = 8 * 27 + 35 + 13
    # 1 bit: 27 + 5 + 2 bytes of codes, 8 + 5 + 1 scales; 3 bits in fours: 8 x 7, 5 x 2 and 4 groups; float16
    bits = {
        (0, 0, 0): 8 * (27 + 5 + 2) + 16 * 14,
        (1, 1, 1): 8 * (81 + 14 + 5) + 24 * (56 + 10 + 4),
        (2, 2, 2): 16 * weights,
        (0, 1, 2): (8 * 27 + 16 * 8) + (8 * 14 + 24 * 10) + 16 * 13,
    }
    costs = {
        path.stem: instantiate(OmegaConf.load(path).cost[path.stem]).table(space)
        for path in map(CONF.joinpath, ("bytes.yaml", "bits.yaml", "fraction.yaml"))
    }
    for choice, expected in bits.items():
        assert costs["bytes"].cost_of(choice) == expected / 8 + 333
        assert costs["bits"].cost_of(choice) == pytest.approx(expected / weights)
        assert costs["fraction"].cost_of(choice) == pytest.approx((expected / 8 + 333) / (4 * weights + 333))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (120000, 120_000),
        ("120000", 120_000),
        ("120kB", 120_000),
        ("120KB", 120_000),
        ("120KiB", 122_880),
        ("1.5 MB", 1_500_000),
        (" 2 MiB ", 2_097_152),
        ("1e6", 1_000_000),
        ("0.5GiB", 2**29),
        ("2GB", 2 * 10**9),
        ("7B", 7),
        (1.5e3, 1500),
    ],
)
def test_sizes_as_people_write_them(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "kB", "12 apples", "1.2.3MB", "-5kB", "12kb", "1,000", "nan", "1e999", None, True])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match=r"is not a size. Give bytes, or a number with one of B, kB"):
        parse_bytes(text)
