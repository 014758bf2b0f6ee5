"""What stays float is named with its share, and a size counts what a file stores."""

import io
import json

import torch
from torch import nn

from mpsearch.graph.trace import trace_layers
from mpsearch.graph.unsearched import other_bits, sentence, unsearched
from mpsearch.packed.model import pack, quantized_layers, save


class Recurrent(nn.Module):
    """Sequences `[n, 6]` -> logits `[n, 5]`: most weights are an LSTM's, one is a plain parameter."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.norm = nn.Linear(1, 4), nn.LSTM(4, 20, batch_first=True), nn.LayerNorm(20)
        self.mix, self.head = nn.Parameter(torch.randn(20, 20)), nn.Linear(20, 5)
        self.register_buffer("kept", torch.zeros(7))
        self.register_buffer("recomputed", torch.zeros(1000), persistent=False)

    def forward(self, x):
        return self.head(self.norm(self.lstm(self.embed(x[..., None]))[0][:, -1] @ self.mix))


def made():
    torch.manual_seed(0)
    return Recurrent().eval()


def layers_of(model):
    return trace_layers(model, lambda m, x: m(x), torch.zeros(2, 6))


def test_each_weight_that_stays_float_is_named_with_its_bytes():
    model = made()
    found = unsearched(model, layers_of(model))
    assert found == {
        "bytes": sum(p.nbytes for p in model.parameters()),
        "float_bytes": 4 * (80 * 4 + 80 * 20 + 160 + 400 + 40 + 4 + 5),
        "weights": {"lstm": {"class": "LSTM", "bytes": 4 * (80 * 4 + 80 * 20)}, "mix": {"class": "Parameter", "bytes": 1600}},
        "biases_and_norms": 4 * (160 + 40 + 4 + 5),
    }
    total = found["bytes"]
    assert sentence(found) == (
        f"{100 * found['float_bytes'] / total:.3g} % of the parameters are not searched and stay float: "
        f"lstm (LSTM, {100 * 7680 / total:.3g} %), mix (Parameter, {100 * 1600 / total:.3g} %), "
        f"biases and norms ({100 * 836 / total:.3g} %)."
    )


def test_many_modules_are_counted_and_not_listed():
    found = {"bytes": 100, "float_bytes": 70, "weights": {f"m{i}": {"class": "GRU", "bytes": 10} for i in range(7)}}
    said = sentence({**found, "biases_and_norms": 0})
    assert said.startswith("70 % of the parameters are not searched and stay float: m0 (GRU, 10 %), ")
    assert said.endswith("m4 (GRU, 10 %), 2 more modules (20 %).")
    assert sentence({"bytes": 4, "float_bytes": 0, "weights": {}, "biases_and_norms": 0}) == "All parameters are searched."


def test_a_size_counts_what_a_file_stores(tiny, tmp_path):
    """A buffer that is not persistent is in no file."""
    model = made()
    assert other_bits(model, layers_of(model)) == 8 * (unsearched(model, layers_of(model))["float_bytes"] + 4 * 7)
    engine = tiny.engine(model, tiny.task(shape=(6,)))
    allocation = engine.space.uniform("w4")
    theirs = pack(made(), quantized_layers(engine, allocation))
    file = save(theirs, tmp_path / "packed.safetensors")
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert 8 * (file.stat().st_size - header) == engine.space.size_bits(engine.space.choice(allocation))


def test_the_command_names_it_on_the_console_in_the_report_and_in_the_space(mpsearch, undrawn, monkeypatch, tmp_path):
    console = io.StringIO()
    monkeypatch.setattr("sys.stdout", console)
    code, _ = mpsearch("search", "scheme=[w4,w8]", "n_trials=2", "hydra.run.dir=run")
    assert code == 0
    found = json.loads((tmp_path / "run" / "space.json").read_text())["not_searched"]
    assert found["weights"] == {}
    assert found["float_bytes"] == found["biases_and_norms"] > 0
    assert sentence(found) in console.getvalue().splitlines()
    assert sentence(found) in (tmp_path / "run" / "report.md").read_text()
