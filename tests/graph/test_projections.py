"""Attention and transposed projections as layers of their own: the same outputs, whatever the options."""

import copy
import itertools

import pytest
import torch
from torch import nn

from mpsearch.exporters.allocation_file import load_allocation
from mpsearch.exporters.base import Picked
from mpsearch.exporters.native import Native
from mpsearch.graph.projections import PaddedEncoder, ProjectedAttention, expose_projections
from mpsearch.graph.trace import trace_layers
from mpsearch.layer import weights_sha256
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.integer import Integer


class Conv1D(nn.Module):
    """The layout of Hugging Face transformers: weight `[in, out]`."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        shape = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(shape)


OPTIONS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "add_bias_kv": True},
    {"kdim": 6, "vdim": 10},
    {"kdim": 6, "vdim": 10, "bias": False},
]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_is_the_same(options, batch_first):
    torch.manual_seed(0)
    ours = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs = copy.deepcopy(ours)
    assert type(expose_projections(ours)) is ProjectedAttention
    n, queries, keys = 3, 5, 4
    query, key, value = torch.randn(n, queries, 8), torch.randn(n, keys, ours.kdim), torch.randn(n, keys, ours.vdim)
    padding = torch.tensor([[False] * 4, [False, False, True, True], [False, True, False, False]])
    mask = torch.rand(queries, keys) > 0.7
    mask[:, 0] = False
    masks = [None, mask, torch.randn(queries, keys), torch.randn(n * 2, queries, keys)]
    turn = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    for attn_mask, pad, (weights, average) in itertools.product(
        masks, [None, padding, torch.randn(n, keys)], [(False, True), (True, True), (True, False)]
    ):
        if attn_mask is not None and pad is not None and attn_mask.dtype != pad.dtype:
            continue
        given = {"key_padding_mask": pad, "attn_mask": attn_mask, "need_weights": weights, "average_attn_weights": average}
        with torch.no_grad():
            expected, expected_weights = theirs(turn(query), turn(key), turn(value), **given)
            output, output_weights = ours(turn(query), turn(key), turn(value), **given)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output_weights, expected_weights, rtol=1e-4, atol=1e-5)
    single = {"key_padding_mask": padding[1], "attn_mask": mask}
    with torch.no_grad():
        output, expected = (of(query[0], key[0], value[0], **single) for of in (ours, theirs))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("final_norm", [None, nn.LayerNorm(8, elementwise_affine=True)])
@pytest.mark.parametrize("padding", [None, [3, 5, 2], "right"])
def test_an_encoder_is_the_same_in_eval_mode(final_norm, padding):
    """Also at padded tokens, where nested tensors give zeros."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, final_norm).eval()
    if final_norm is not None:
        nn.init.normal_(final_norm.bias)
    theirs = copy.deepcopy(model)
    expose_projections(model)
    assert type(model) is PaddedEncoder
    x = torch.randn(3, 5, 8)
    mask = None
    if padding == "right":
        mask = torch.arange(5).expand(3, 5) < torch.tensor([[1], [0], [2]])
    elif padding is not None:
        mask = torch.arange(5).expand(3, 5) >= torch.tensor(padding)[:, None]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            expected = theirs(x, src_key_padding_mask=mask)
            torch.testing.assert_close(model(x, src_key_padding_mask=mask), expected, rtol=1e-4, atol=1e-5)


def test_a_second_call_changes_nothing():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), Conv1D(4, 8)).eval()
    expose_projections(model)
    before = dict(model.named_parameters())
    expose_projections(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


class Gpt(nn.Module):
    """Two blocks of `Conv1D`, the second of which shares its weight with a third."""

    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj, self.again = Conv1D(24, 8), Conv1D(8, 24), Conv1D(8, 24)
        self.again.weight = self.c_proj.weight

    def forward(self, x):
        return self.again(self.c_attn(self.c_proj(self.c_attn(x))))


def test_transposed_weights_become_linear_layers():
    torch.manual_seed(0)
    model, x = Gpt().eval(), torch.randn(3, 8)
    expected = model(x)
    layers = trace_layers(expose_projections(model), lambda m, x: m(x), x)
    torch.testing.assert_close(model(x), expected)
    assert [(layer.kind, layer.shape, layer.modules) for layer in layers] == [
        ("linear", (24, 8), ("c_attn",)),
        ("linear", (8, 24), ("c_proj", "again")),
    ]
    assert model.again.weight is model.c_proj.weight


def test_weights_that_others_hold_stay():
    """A weight read elsewhere cannot be split without untying it."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "line": Conv1D(4, 8), "other": nn.Module()})
    model["other"].a, model["other"].b = model["attention"].in_proj_weight, model["line"].weight
    expose_projections(model)
    assert type(model["attention"]) is nn.MultiheadAttention
    assert type(model["line"]) is Conv1D


def test_attention_modules_that_share_a_weight_go_on_sharing_it():
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)])
    model[1].in_proj_weight = model[0].in_proj_weight
    expose_projections(model)
    assert model[0].k_proj.weight is model[1].k_proj.weight
    assert model[0].k_proj.bias is not model[1].k_proj.bias


def test_an_exported_allocation_is_applied_to_the_network_as_it_was_written(tiny, tmp_path):
    class Net(nn.Module):
        """`[n, 6, 8]` -> logits `[n, 5]`."""

        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), Conv1D(5, 8)

        def forward(self, x):
            return self.head(self.encoder(x).mean(1))

    torch.manual_seed(0)
    original = Net().eval()
    model = expose_projections(copy.deepcopy(original))
    schemes = {"w4": Integer(4), "w8a4": Integer(8, input={"bits": 4})}
    engine = tiny.engine(model, tiny.task(shape=(6, 8)), schemes, quantizer=RoundToNearest())
    assert engine.space.names[:4] == tuple(f"encoder.self_attn.{name}_proj" for name in ("q", "k", "v", "out"))
    for scheme in schemes:
        e = SearchEvaluator(engine)(engine.space.uniform(scheme), "uniform")
        picked = Picked(e, {"search": e}, {}, "accuracy", weights_sha256(original), ())
        exported = load_allocation(Native().export(picked, engine, tmp_path / scheme))
        applied, packed = (getattr(exported, how)(copy.deepcopy(original)) for how in ("apply", "pack"))
        x = engine.batches("search")[0][0]
        with torch.no_grad(), engine.applied(e.allocation) as simulated:
            expected = simulated(x)
        with torch.no_grad():
            torch.testing.assert_close(applied(x), expected, rtol=0, atol=0)
            assert (packed(x) - expected).abs().max() <= 2e-2 * expected.abs().max()
