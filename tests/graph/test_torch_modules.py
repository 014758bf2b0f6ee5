"""Packed and simulated outputs agree for every module type of torch that contains a Linear or a convolution."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.nn import intrinsic
from torch.nn.utils import parametrizations

from mpsearch.graph.projections import expose_projections
from mpsearch.packed.layers import Dequantized, PackedModule
from mpsearch.packed.model import load, pack, packed, quantized_layers, save
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.integer import Integer

SCHEMES = {
    "w8": Integer(8),
    "w4a8": Integer(4, input={"bits": 8}),
    "w8a4": Integer(8, input={"bits": 4}),
    "w4g4u": Integer(4, 4, symmetric=False),
    "w4g4a8u": Integer(4, 4, symmetric=False, input={"bits": 8, "symmetric": False, "scale": "static"}),
    "nf4": Codebook("nf4"),
}
WIDTH, TOKENS = 8, 6


class Wrapped(nn.Module):
    """Images `[n, 2, 6, 8]` -> logits `[n, 5]`; the module under test gets what `shape` says, between two Linear layers."""

    def __init__(self, module, run, shape="tokens"):
        super().__init__()
        self.before, self.module, self.head = nn.Linear(WIDTH, WIDTH), module, nn.Linear(WIDTH, 5)
        self.run, self.of = run, shape

    def forward(self, x):
        x = self.before(x)
        x = x if self.of == "images" else x[:, 0]  # [n, 6, 8]
        y = self.run(self.module, x)
        return self.head(y.reshape(len(y), -1, WIDTH).mean(1))


class Functional(nn.Sequential):
    """Reads its layers' weights instead of calling them."""

    def forward(self, x):
        for layer in self:
            x = F.relu(F.linear(x, layer.weight, layer.bias))
        return x


class OwnAttention(nn.MultiheadAttention):
    """A forward of its own, which torch's encoder layer may bypass."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, **options)


def with_own_attention():
    layer = encoder_layer()
    layer.self_attn = OwnAttention(WIDTH, 2, batch_first=True)
    return layer


def lazy():
    module = nn.LazyLinear(WIDTH)
    module(torch.zeros(1, WIDTH))
    return module


def twice(module, x):
    return module(x, x)


def attend(module, x):
    return module(x, x, x)[0]


def attend_quickly(module, x):
    return module(x, x, x, need_weights=False)[0]


def attend_across(module, x):
    return module(x, x[..., :4], x[..., 2:])[0]


def padded(module, x):
    return module(x, src_key_padding_mask=torch.arange(TOKENS).expand(len(x), -1) >= 4)


def first(module, x):
    return module(x)[0]


def as_channels(module, x):
    return module(x.transpose(1, 2)).transpose(1, 2)


def call(module, x):
    return module(x)


MODULES = {
    "encoder layer": (encoder_layer, call),
    "encoder layer, gelu, norm first": (lambda: encoder_layer(activation="gelu", norm_first=True), call),
    "encoder layer, no bias": (lambda: encoder_layer(bias=False), call),
    "encoder layer, own attention": (with_own_attention, call),
    "encoder": (lambda: nn.TransformerEncoder(encoder_layer(), 2), call),
    "encoder, padded": (lambda: nn.TransformerEncoder(encoder_layer(), 2, nn.LayerNorm(WIDTH)), padded),
    "decoder layer": (lambda: nn.TransformerDecoderLayer(WIDTH, 2, 16, batch_first=True), twice),
    "decoder": (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 16, batch_first=True), 2), twice),
    "transformer": (lambda: nn.Transformer(WIDTH, 2, 1, 1, 16, batch_first=True), twice),
    "attention": (lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True), attend),
    "attention, no weights": (lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True), attend_quickly),
    "attention, across": (lambda: nn.MultiheadAttention(WIDTH, 2, kdim=4, vdim=6, batch_first=True), attend_across),
    "attention, own forward": (lambda: OwnAttention(WIDTH, 2, batch_first=True), attend),
    "lstm": (lambda: nn.LSTM(WIDTH, WIDTH, 2, batch_first=True), first),
    "lstm, projected": (lambda: nn.LSTM(WIDTH, 16, proj_size=WIDTH, batch_first=True), first),
    "gru": (lambda: nn.GRU(WIDTH, 4, bidirectional=True, batch_first=True), first),
    "rnn": (lambda: nn.RNN(WIDTH, WIDTH, batch_first=True), first),
    "bilinear": (lambda: nn.Bilinear(WIDTH, WIDTH, WIDTH), twice),
    "lazy": (lazy, call),
    "fused linear": (lambda: intrinsic.LinearReLU(nn.Linear(WIDTH, WIDTH), nn.ReLU()), call),
    "fused conv1d": (lambda: intrinsic.ConvReLU1d(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.ReLU()), as_channels),
    "fused conv2d": (lambda: intrinsic.ConvReLU2d(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()), call),
    "conv3d": (lambda: nn.Conv3d(1, 2, 3, padding=1), lambda module, x: module(x[:, None, None])),
    "transposed": (lambda: nn.ConvTranspose2d(2, 2, 3, padding=1), call),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), call),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), call),
    "functional": (lambda: Functional(nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)), call),
    "softmax": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(WIDTH, 16, [4, 8], div_value=2.0),
        lambda module, x: module.log_prob(x.flatten(0, 1)).reshape(len(x), -1, WIDTH),
    ),
}
IMAGES = ("fused conv2d", "transposed")


def made(name):
    torch.manual_seed(0)
    module, run = MODULES[name]
    return Wrapped(module(), run, "images" if name in IMAGES else "tokens").eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", MODULES)
def test_packed_and_simulated_agree(tiny, tmp_path, name):
    """Also in the hands of a user, who loads the packed file into the network as it was written."""
    task = tiny.task(n=12, batch_size=12, shape=(2, TOKENS, WIDTH))
    original = made(name)
    model = expose_projections(copy.deepcopy(original))
    engine = tiny.engine(model, task, SCHEMES, quantizer=RoundToNearest())
    x = engine.batches("confirm")[0][0]
    before = tiny.state(model)
    for scheme in SCHEMES:
        allocation = engine.space.uniform(scheme)
        with torch.no_grad(), engine.applied(allocation) as applied:
            simulated = applied(x)
        with torch.no_grad(), packed(engine, allocation) as installed:
            run = {"packed": installed(x)}
        tiny.assert_same_state(model, before)
        theirs = pack(copy.deepcopy(original), quantized_layers(engine, allocation))
        loaded = load(save(theirs, tmp_path / f"{scheme}.safetensors"), made(name))
        assert sum(isinstance(m, PackedModule | Dequantized) for m in loaded.modules()) >= 2
        with torch.inference_mode():
            run["packed by hand"], run["loaded, in inference mode"] = theirs(x), loaded(x)
        with torch.no_grad():
            run["loaded, without gradients"] = loaded(x)
        with torch.enable_grad():
            run["loaded"] = loaded(x)
        # A float product's last bits may move a value over the edge of a code of the next layer's input.
        share = 2e-2 if SCHEMES[scheme].input_format else 1e-5
        for how, output in run.items():
            assert (output - simulated).abs().max() <= share * simulated.abs().max(), (scheme, how)
