"""The contract of the refiners, kept by every one; and what each makes of a network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpsearch.allocation import Allocation
from mpsearch.engine.weight_files import WeightFiles
from mpsearch.errors import InputError
from mpsearch.graph.products import observe_products
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.kronecker_descent import KroneckerDescent
from mpsearch.refiners.base import Refiner
from mpsearch.refiners.distillation import Distillation
from mpsearch.refiners.error_propagation import ErrorPropagation
from mpsearch.refiners.paired import PairedModels, Rows
from mpsearch.refiners.targets import Regression, Sums, held_out
from mpsearch.registry import names, resolve
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.floating import Float
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.k_quant import KQuant
from mpsearch.schemes.outliers import Outliers
from mpsearch.schemes.rotated import Rotated
from mpsearch.tasks.makers import fidelity_task

STATIC = IntegerInput(8, "static", symmetric=False)
SCHEMES = {
    "w3": Integer(3),
    "w3g4": Integer(3, 4, symmetric=False),
    "tensor": Integer(4, "tensor"),
    "nf4": Codebook("nf4", 8),
    "outliers": Outliers(Integer(3)),
    "dynamic": Integer(4, input=IntegerInput(8)),
    "static": Integer(4, input=STATIC),
    "fp16": Float("float16"),
}
LINEAR = {"rotated": Rotated(Integer(3)), "rotated_static": Rotated(Integer(4, input=STATIC))}


class Residual(nn.Module):
    """Tokens [n, 5] -> logits [n, 6]: a tied embedding, two layers with one input, a sum in place, and a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 16), nn.Linear(16, 6, bias=False)
        self.head.weight = self.embed.weight
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24, bias=False), nn.Linear(24, 16)
        self.twice = nn.Linear(16, 16)

    def forward(self, tokens):
        x = self.embed(tokens)
        x += self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return self.head(self.twice(torch.tanh(self.twice(x))).mean(1))


@pytest.fixture(params=names("refiner"))
def refiner(request):
    found = resolve("refiner", request.param)
    assert isinstance(found, Refiner)
    return found


def residual_engine(tiny, schemes, quantizer=None):
    torch.manual_seed(0)
    tokens = [torch.randint(6, (n, 5)) for n in (40, 40, 40)]
    return tiny.engine(
        Residual().eval(),
        fidelity_task(calibration=tokens[0], search=tokens[1], confirm=tokens[2], batch_size=16),
        schemes,
        quantizer=quantizer,
    )


@pytest.mark.parametrize("scheme", [*SCHEMES, *LINEAR])
def test_every_kind_of_scheme_keeps_its_bytes_and_the_engine_stays_as_it_was(refiner, scheme, tiny):
    if scheme in LINEAR:
        engine = residual_engine(tiny, LINEAR | {"w3": Integer(3)}, KroneckerDescent(n_passes=1))
    else:
        engine = tiny.engine(tiny.net(), tiny.task(), SCHEMES, quantizer=KroneckerDescent(n_passes=1))
    allocation = engine.space.uniform(scheme)
    before, banked = (
        tiny.state(engine.model),
        {la.name: engine.quantized(la.name, scheme) for la in engine.space.layers if allocation[la.group] == scheme},
    )
    loss = engine.score(allocation).loss
    refined = refiner.start(engine)(allocation)
    tiny.assert_same_state(engine.model, before)
    for layer in engine.space.layers:
        name = allocation[layer.group]
        weight = refined.quantized(layer.name, name)
        assert weight.scheme == engine.space.schemes[name]
        weight.scheme.check(weight.tensors, weight.shape)
        assert 8 * weight.nbytes == weight.scheme.storage_bits(layer.shape)
        biases = refined.biases(layer.name, name)
        assert all(getattr(engine.model.get_submodule(module), "bias", None) is not None for module in biases)
        if layer.name in banked:
            assert engine.quantized(layer.name, name) is banked[layer.name]
    assert engine.score(allocation).loss == loss
    assert refined.score(allocation).loss < 10 * loss + 1e-6
    again = refiner.start(engine)(allocation)
    for layer in engine.space.layers:
        one, two = (e.quantized(layer.name, allocation[layer.group]).tensors for e in (refined, again))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_blocks_of_llama_cpp_are_refined(tiny):
    """A residual pair of layers with rows of 256 and 32: the refined weights are blocks, and the loss on unseen data falls."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 8)).eval()
    splits = [torch.randn(n, 256) @ torch.randn(256, 256).div(16).add(torch.eye(256)) for n in (600, 100, 200)]
    task = fidelity_task(calibration=splits[0], search=splits[1], confirm=splits[2], batch_size=200)
    schemes = {"q2_k": KQuant("q2_k"), "q4_1": KQuant("q4_1"), "w8": Integer(8)}
    engine = tiny.engine(net, task, schemes, quantizer=KroneckerDescent())
    assert engine.space.choices == (("q2_k", "q4_1", "w8"), ("q4_1", "w8"), ("q2_k", "q4_1", "w8"))
    allocation = Allocation({"0": "q2_k", "2": "q4_1", "4": "q2_k"})
    refined = ErrorPropagation().start(engine)(allocation)
    for layer in engine.space.layers:
        weight = refined.quantized(layer.name, allocation[layer.group])
        weight.scheme.check(weight.tensors, weight.shape)
    assert refined.score(allocation, "confirm").loss < engine.score(allocation, "confirm").loss


def test_the_loss_on_data_that_nothing_has_seen_falls(refiner, trained):
    refinement = refiner.start(trained)
    for scheme in ("w2", "w3"):
        allocation = trained.space.uniform(scheme)
        assert refinement(allocation).score(allocation, "confirm").loss < 0.7 * trained.score(allocation, "confirm").loss


def test_an_interrupted_refinement_is_resumed(refiner, trained, tmp_path, monkeypatch):
    allocation = trained.space.uniform("w2")

    def files():
        return WeightFiles(tmp_path, {}).derived(tmp_path / "refined", {"of": "w2"})

    whole = refiner.start(trained)(allocation)
    calls = []
    quantize = ClipSearch.quantize

    def counted(self, *args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return quantize(self, *args)

    monkeypatch.setattr(ClipSearch, "quantize", counted)
    with pytest.raises(KeyboardInterrupt):
        refiner.start(trained)(allocation, files())
    resumed = refiner.start(trained)(allocation, files())
    n_layers = len(trained.space.layers)
    assert len(calls) == 4 + n_layers - 3, "three layers were written, the fourth was not"
    read = refiner.start(trained)(allocation, files())
    assert len(calls) == 4 + n_layers - 3
    for layer in trained.space.layers:
        one, two, three = (e.quantized(layer.name, "w2").tensors for e in (whole, resumed, read))
        assert all(torch.equal(one[key], two[key]) and torch.equal(one[key], three[key]) for key in one)
        biases = [e.biases(layer.name, "w2") for e in (whole, read)]
        assert all(torch.equal(biases[0][module], biases[1][module]) for module in biases[0])


def test_an_allocation_that_begins_as_the_one_before_is_refined_as_if_it_came_first(refiner, trained, monkeypatch):
    engine = trained
    groups = engine.space.groups
    first, second = (Allocation({g.name: "w3" if i in at else "w2" for i, g in enumerate(groups)}) for at in ({0}, {0, 2}))
    alone = refiner.start(engine)(second)
    refine = refiner.start(engine)
    refine(first)
    seen = []
    see = PairedModels.pairs
    monkeypatch.setattr(PairedModels, "pairs", lambda self, stage, change: seen.append(stage) or see(self, stage, change))
    after = refine(second)
    assert len(seen) == len(groups) - 2
    for group in groups:
        (layer,) = group.layers
        scheme = second[group.name]
        assert torch.equal(after.quantized(layer.name, scheme).dequantize(), alone.quantized(layer.name, scheme).dequantize())


def test_layers_without_a_product_of_their_own_keep_the_weight_of_the_bank(tiny):
    engine = residual_engine(tiny, {"w2": Integer(2)})
    allocation = engine.space.uniform("w2")
    refined = ErrorPropagation().start(engine)(allocation)
    same = {
        layer.name: torch.equal(refined.quantized(layer.name, "w2").dequantize(), engine.quantized(layer.name, "w2").dequantize())
        for layer in engine.space.layers
    }
    assert same["embed"], "two modules own it"
    assert same["twice"], "it has two products"
    assert not same["down"]


def test_all_runs_of_the_model_in_a_forward_pass_count(tiny):
    """On either half of the inputs, as on either text of a pair: what is refined is that of one run on both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(3, 60, 2, 6)
    refined = []
    for data, forward in (
        (x, lambda model, inputs: torch.cat([model(part) for part in inputs.unbind(1)], 1)),
        (x.transpose(1, 2).reshape(3, 120, 6), lambda model, inputs: model(inputs)),
    ):
        task = fidelity_task(calibration=data[0], search=data[1], confirm=data[2], batch_size=len(data[0]))
        task.forward = forward
        engine = tiny.engine(model, task, {"w2": Integer(2)}, quantizer=ClipSearch())
        refined.append(ErrorPropagation(0.1, 1.0, n_positions=1000).start(engine)(engine.space.uniform("w2")))
        assert len(PairedModels(engine, 32, 0).stages()) == 3
    for layer in ("0", "2", "4"):
        first, second = (each.quantized(layer, "w2").dequantize() for each in refined)
        assert torch.allclose(first, second, atol=1e-5), layer
        assert not torch.equal(first, engine.quantized(layer, "w2").dequantize()) or layer == "0"


def test_static_ranges_are_those_of_the_quantized_inputs(tiny):
    engine = tiny.engine(tiny.net(), tiny.task(), {"w2a8": Integer(2, input=IntegerInput(8, "static"))})
    allocation = engine.space.uniform("w2a8")
    refined = ErrorPropagation().start(engine)(allocation)
    largest: list[float] = []
    with refined.applied(allocation) as model, torch.no_grad():
        hook = model.last.register_forward_pre_hook(lambda module, args: largest.append(args[0].abs().max().item()), prepend=True)
        for inputs, _ in refined.batches("calibration"):
            model(inputs)
        hook.remove()
    scale = refined.quantized("last", "w2a8").tensors["input_scale"].item()
    assert scale == pytest.approx(max(largest) / 127, rel=1e-5)
    assert scale != engine.quantized("last", "w2a8").tensors["input_scale"].item()


def test_errors_of_a_residual_connection_are_made_up_for(tiny):
    """The added tensor is off by what the copy's layer before it does; the last layer's target holds the difference."""
    engine = residual_engine(tiny, {"w2": Integer(2), "w8": Integer(8)})
    allocation = Allocation({**engine.space.uniform("w8"), "embed": "w2"})
    losses = [
        ErrorPropagation(residuals=residuals).start(engine)(allocation).score(allocation, "confirm").loss
        for residuals in (True, False)
    ]
    assert losses[0] < 0.9 * losses[1]


def random_sums(n, seed, shift=0.0, scale=0.3):
    """Sums of `n` positions, 5 columns, 3 rows: quantized inputs are mixtures of the float ones and noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, n, 5, generator=generator) + 1
    q = x + scale * torch.randn(1, n, 5, generator=generator) + shift * x.roll(1, 2)
    residual = torch.randn(n, 3, generator=generator)
    sums = Sums()
    sums.add(Rows(x, residual, (n, 3)), Rows(q, residual - 0.1 * q[0, :, :3], (n, 3)))
    return sums, x[0].double(), q[0].double()


def test_the_regression_is_least_squares():
    weight = torch.randn(1, 3, 5, dtype=torch.float64)
    sums, x, q = random_sums(200, 0)
    wanted = x @ weight[0].T + 0.1 * q[:, :3]
    change = Regression.from_sums(sums, weight, centred=False).change(1e-12)
    assert torch.allclose((weight + change)[0].T, torch.linalg.lstsq(q, wanted).solution, atol=1e-5)
    centred = Regression.from_sums(sums, weight, centred=True).change(1e-12)
    solution = torch.linalg.lstsq(q - q.mean(0), wanted - wanted.mean(0)).solution
    assert torch.allclose((weight + centred)[0].T, solution, atol=1e-5)


def test_the_variance_of_a_constant_input_is_not_negative():
    generator = torch.Generator().manual_seed(0)
    sums = Sums()
    for _ in range(5):
        x = torch.randn(1, 1001, 64, generator=generator) * 1e-3 + torch.rand(64, generator=generator)
        x[..., :32] = 0.1 * torch.arange(1, 33)
        sums.add(Rows(x, None, (1001, 4)), Rows(x, None, (1001, 4)))
    plain = Regression.from_sums(sums, torch.ones(1, 4, 64, dtype=torch.float64), centred=False)
    raw = plain.hessian.diagonal(dim1=1, dim2=2) - plain.mean**2
    assert raw.min() < 0, "rounding of the sums"
    centred = Regression.from_sums(sums, torch.ones(1, 4, 64, dtype=torch.float64), centred=True)
    assert centred.hessian.diagonal(dim1=1, dim2=2).min() == 0


def test_held_out_samples_choose_no_step_where_there_is_nothing_to_learn():
    weight = torch.randn(1, 3, 5, dtype=torch.float64)
    good = [Regression.from_sums(random_sums(500, seed, shift=0.5)[0], weight, centred=True) for seed in (0, 1)]
    damping, step = held_out(good, (0.01, 1.0), None)
    assert (damping, step > 0.9) == (0.01, True)
    opposed = [
        good[0],
        Regression(*(getattr(good[1], name) for name in ("mean", "float_mean", "residual_mean", "hessian")), -good[0].pull),
    ]
    assert held_out(opposed, (0.01, 1.0), None)[1] == 0
    assert held_out(good[:1], (0.01, 1.0), None)[1] == 0


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "groups": 2}, {"padding": "same"}])
def test_patches_at_positions_are_those_of_all_positions(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, **options))
    seen = []
    with observe_products(model, ["0"], lambda name, product, output: seen.append(product)):
        output = model(torch.randn(3, 4, 7, 6))
    (product,) = seen
    positions = torch.tensor([0, 5, product.count - 1, 5])
    whole = torch.cat(list(product.patches()), 1)
    assert torch.equal(product.patches_at(positions), whole[:, positions])
    rows = output.movedim(1, -1).reshape(-1, 6)
    assert torch.equal(product.rows_at(output, positions), rows[positions])
    assert torch.allclose(
        F.conv2d(product.input, model[0].weight, None, model[0].stride, model[0].padding, model[0].dilation, model[0].groups)
        .movedim(1, -1)
        .reshape(-1, 6)[positions],
        torch.einsum(
            "gnc,grc->ngr", product.patches_at(positions), model[0].weight.reshape(product.groups, 6 // product.groups, -1)
        ).reshape(-1, 6),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ErrorPropagation(step=1.5), "step must be from 0 to 1"),
        (lambda: ErrorPropagation(damping=0.0), "damping must be a number above 0"),
        (lambda: ErrorPropagation(n_positions=1), "n_positions must be 2 or more"),
        (lambda: Distillation(learning_rate=-1.0), "learning_rate must be a number above 0"),
        (lambda: Distillation(n_steps=0), "n_steps"),
    ],
)
def test_settings_are_checked(make, says):
    with pytest.raises(InputError, match=says):
        make()


def test_a_hessian_of_few_positions_is_damped_more():
    """Centred sums of few positions have eigenvalues below 0 by rounding."""
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    values = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -0.05], dtype=torch.float64)
    hessian, zeros = (basis * values @ basis.T)[None], torch.zeros(1, 6, dtype=torch.float64)
    pull = torch.ones(1, 2, 6, dtype=torch.float64)
    regression = Regression(zeros, zeros, zeros[:, :2], hessian, pull)
    damped = hessian + 0.1 * hessian.diagonal(dim1=1, dim2=2).mean() * torch.eye(6, dtype=torch.float64)
    assert torch.allclose(regression.change(0.01), pull @ torch.linalg.inv(damped))
    assert not Regression(zeros, zeros, zeros[:, :2], torch.full_like(hessian, torch.nan), pull).change(0.01).any()
