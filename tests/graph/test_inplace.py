"""A network that writes into its layers' inputs is measured as the same network that does not."""

import pytest
import torch
from torch import nn

from mpsearch.graph.surgery import cloned_inputs
from mpsearch.graph.trace import overwritten_inputs
from mpsearch.metrics.fisher import Fisher
from mpsearch.metrics.gauss_newton import GaussNewton
from mpsearch.metrics.hawq import HAWQ
from mpsearch.quantizers.kronecker_descent import KroneckerDescent
from mpsearch.training.finetune import Training, train_epoch
from mpsearch.training.student import Student


class Residual(nn.Module):
    """x + fc(x) twice, in place or not."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.first, self.fc1, self.fc2, self.head = (nn.Linear(8, n) for n in (8, 8, 8, 5))

    def forward(self, x):
        x = self.first(x)
        for layer in (self.fc1, self.fc2):
            if self.in_place:
                x += layer(x)
            else:
                x = x + layer(x)
        return self.head(x.tanh())


def engine_of(tiny, in_place, **options):
    torch.manual_seed(0)
    model = Residual(in_place).eval()
    with torch.no_grad():
        model.head.weight.mul_(4)
    return tiny.engine(model, tiny.task(shape=(8,)), **options)


@pytest.mark.parametrize("metric", [GaussNewton(), Fisher(), HAWQ(n_probes=2)])
def test_metrics_see_the_input_that_the_layer_read(tiny, metric):
    found = []
    for in_place in (True, False):
        engine = engine_of(tiny, in_place)
        found.append(list(metric.measure(engine, [(group, "w2") for group in engine.space.names])))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_the_quantizer_gets_the_fisher_information_of_outputs(tiny):
    one, other = (engine_of(tiny, in_place, quantizer=KroneckerDescent()) for in_place in (True, False))
    assert all(torch.equal(moments.mean, other.moments[name].mean) for name, moments in one.moments.items())
    for layer in one.space.layers:
        assert torch.equal(one.quantized(layer.name, "w2").dequantize(), other.quantized(layer.name, "w2").dequantize())


def test_training_goes_through(tiny):
    losses = []
    for in_place in (True, False):
        student = Student(engine := engine_of(tiny, in_place), engine.space.uniform("w2"))
        optimizer = torch.optim.Adam(student.latents.values())
        losses.append(train_epoch(student, optimizer, Training(batch_size=10), 1))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_overwritten_inputs_are_found_and_copied():
    model, x = Residual(True), torch.randn(3, 8)
    names = ["first", "fc1", "fc2", "head"]
    found = overwritten_inputs(model, names, lambda: model(x))
    assert found == ("fc1", "fc2")
    assert overwritten_inputs(Residual(False), names, lambda: model(x)) == ()
    with cloned_inputs(model, found):
        assert overwritten_inputs(model, names, lambda: model(x)) == ()
