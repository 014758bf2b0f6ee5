"""The table of runtimes in the API reference is made from the profiles and the contract tests."""

import importlib.util
from pathlib import Path

import pytest

from mpsearch.registry import names

pytest.importorskip("pdoc")
PATH = Path(__file__).parents[2] / "scripts" / "build_reference.py"


def test_every_scheme_and_runtime_is_in_the_table():
    spec = importlib.util.spec_from_file_location("build_reference", PATH)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    header, _, verified, *rows = [line.strip("|").split(" | ") for line in script.runtime_table().splitlines()]
    runtimes = [cell.strip() for cell in header[1:]]
    assert runtimes == names("runtime")
    assert [row[0].strip(" `") for row in rows] == names("scheme")
    cells = {row[0].strip(" `"): dict(zip(runtimes, (cell.strip() for cell in row[1:]), strict=True)) for row in rows}
    assert cells["w4"]["vllm"] == "linear"
    assert cells["nf4"]["torchao"] == "no"
    assert cells["w1"]["mpsearch"] == "linear, embedding, conv1d, conv2d"
    assert verified[1 + runtimes.index("vllm")].strip() == "exporter=compressed_tensors, opened by transformers, contract tests"
