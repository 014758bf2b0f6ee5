"""Packed outputs that differ from the simulated ones are noticed, marked, and end the command; nothing measured is lost."""

import pandas as pd
import pytest
import torch
from torch import nn

from mpsearch.packed.agreement import agrees
from mpsearch.packed.layers import PackedLinear
from mpsearch.pipeline.evaluators import ConfirmEvaluator
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.integer import Integer

SCHEMES = {"w4": Integer(4), "w8": Integer(8), "w8a4": Integer(8, input={"bits": 4}), "w4a8": Integer(4, input={"bits": 8})}


class Other(nn.Sequential):
    """Runs in another way where its layer is not torch's: in the place of any code that bypasses a packed module."""

    def forward(self, x):
        return super().forward(x) if isinstance(self[0], nn.Linear) else self[2](torch.relu(x @ self[0].weight.T + self[0].bias))


class Scaled(Other):
    def forward(self, x):
        return nn.Sequential.forward(self, x) * (1 if isinstance(self[0], nn.Linear) else 1.01)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", [nn.Sequential, Other, Scaled])
def test_what_runs_otherwise_packed_is_unverified(tiny, kind, scheme):
    torch.manual_seed(0)
    model = kind(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    engine = tiny.engine(model, tiny.task(shape=(8,)), SCHEMES, quantizer=RoundToNearest())
    score, _ = ConfirmEvaluator(engine).run_packed(engine.space.uniform(scheme))
    bypassed = kind is Other and scheme == "w8a4"  # where weights alone are quantized, or inputs finely, it changes nothing
    assert score.verified != (bypassed or (kind is Scaled and scheme in ("w4", "w8")))


def test_independent_rounding_is_no_difference():
    """In a deep network a code that differs makes others differ, until errors of inputs are partly independent."""
    torch.manual_seed(0)
    reference, common, own, other = torch.randn(4, 64, 10)
    simulated = reference + 0.1 * common
    assert agrees(simulated + 0.05 * own, simulated, reference, has_quantized_inputs=True)
    assert not agrees(simulated + 0.05 * own, simulated, reference, has_quantized_inputs=False)
    assert not agrees(reference + 0.001 * other, simulated, reference, has_quantized_inputs=True)
    broken = simulated.clone()
    broken[0, 0] = float("nan")
    assert agrees(broken, broken, reference, has_quantized_inputs=False)
    assert not agrees(simulated, broken, reference, has_quantized_inputs=False)


def test_the_command_keeps_all_rows_and_ends_with_a_sentence(mpsearch, undrawn, monkeypatch, tmp_path):
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: 1.1 * forward(self, x))
    code, said = mpsearch("search", "scheme=[w4,w8]", "n_trials=3", "hydra.run.dir=run")
    assert code == 2
    assert "unverified" in said
    assert "Traceback" not in said
    table = pd.read_csv(tmp_path / "run" / "confirm.csv")
    assert not table["verified"].any()
    assert "**Unverified: the points of" in (tmp_path / "run" / "report.md").read_text()
    rows = (tmp_path / "run" / "evaluations.csv").read_text()
    assert mpsearch("search", "run=run")[0] == 2, "also where the run is complete"
    assert (tmp_path / "run" / "evaluations.csv").read_text() == rows
