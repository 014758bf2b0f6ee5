"""The packed model: quantized layers run on packed weights by the compiled kernels, in the memory that was counted.

`pack` puts packed modules in the place of the float ones; `packed` does so for a while, to measure; `save` and `load` keep a
packed model in one safetensors file, whose tensors weigh what the budget counted. A layer for which there is no kernel keeps
its stored tensors and dequantizes them whenever it is called: right, as small, and slow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from mpsearch import kernels
from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.errors import InputError, check_memory
from mpsearch.files import file_errors, write_atomically
from mpsearch.files.tensor_file import TensorFile, opened, tensor_file
from mpsearch.graph.channel_scaling import ChannelClip, Equalization
from mpsearch.graph.fold import Pair, apply_folds
from mpsearch.graph.projections import block_fused_paths, expose_projections
from mpsearch.graph.surgery import Undo, quantize_input, replace_module, snapshot
from mpsearch.graph.uses import owners_outside
from mpsearch.layer import kind_of, rows_shape, runs_as_usual
from mpsearch.packed.layers import (
    Dequantized,
    PackedConv,
    PackedEmbedding,
    PackedLinear,
    PackedModule,
    QuantizedLayer,
    kernel_for,
    read_from,
)
from mpsearch.packed.stored import StoredLayer, check_fits, check_used
from mpsearch.schemes.base import QuantizedTensor
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.rotated import Rotated

FORMAT, VERSION = "mpsearch-packed", 2
REMEDY = "Give the file that save() or mpsearch export exporter=packed wrote."


def pack(
    model: nn.Module, layers: Sequence[QuantizedLayer], folds: Sequence[Pair] = (), equalization: Equalization | None = None
) -> nn.Module:
    """Fold the batch norms in `folds`, equalize, and pack `layers` of the float model, in place; returns it in eval mode.

    Raises `InputError` where a weight has another shape than its module's. A packed model gives no gradients.
    """
    apply_folds(expose_projections(model.eval()), folds)
    if equalization is not None:
        equalization.apply(model)
    _install(model, layers)
    cast(Any, model).folded_batch_norms = tuple(folds)  # for `load`, which is given the model unfolded
    return model.requires_grad_(False)


class Weights(Protocol):
    """The quantized weights of a run: a `QuantEngine`, or its bank of weights."""

    @property
    def model(self) -> nn.Module:
        """The float model, folded and equalized."""

    @property
    def space(self) -> SearchSpace:
        """The search space."""

    def quantized(self, layer: str, scheme: str) -> QuantizedTensor:
        """A layer's weight in the scheme called so."""

    def biases(self, layer: str, scheme: str) -> dict[str, Tensor]:
        """Module name -> corrected bias of the layer in the scheme."""


@contextmanager
def packed(engine: Weights, allocation: Allocation) -> Iterator[nn.Module]:
    """The engine's model on packed weights while the block runs; afterwards it is bitwise as it was."""
    with installed(engine.model, quantized_layers(engine, allocation)):
        yield engine.model


@contextmanager
def installed(model: nn.Module, layers: Sequence[QuantizedLayer]) -> Iterator[None]:
    """`layers` of the model are packed while the block runs."""
    undo = _install(model, layers)
    try:
        yield
    finally:
        undo()


def quantized_layers(engine: Weights, allocation: Allocation) -> list[QuantizedLayer]:
    """The layers of an allocation, as the engine's bank has them; groups that it leaves out stay float."""
    return [
        QuantizedLayer(layer.kind, layer.modules, engine.quantized(layer.name, scheme), engine.biases(layer.name, scheme))
        for layer, scheme in engine.space.layer_schemes(allocation)
    ]


RUNS = {"linear": PackedLinear, "conv1d": PackedConv, "conv2d": PackedConv, "embedding": PackedEmbedding}


def _install(model: nn.Module, layers: Iterable[QuantizedLayer]) -> Undo:
    """Put packed modules in place, one layer after the other; returns the undo."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    # A bias may be shared too: it has one value, that of its last layer, as where an allocation is swapped in.
    known = layers if isinstance(layers, Sequence) else ()
    biases = {id(model.get_submodule(m).bias): bias for layer in known for m, bias in layer.biases.items()}

    with ExitStack() as undo:
        undo.callback(block_fused_paths(model))
        for layer in layers:
            modules: list[Any] = [model.get_submodule(name) for name in layer.modules]
            _check_shape(layer, modules[0])
            layer = layer.on(modules[0].weight.device)
            others = owners_outside(model, modules[0].weight, modules)
            runs = runs_packed(layer, modules) and not any("" in names[module] for module in modules)
            packed = packed_weight(modules[0], layer.weight) if runs else None
            for module in modules:
                bias = getattr(module, "bias", None)
                bias = None if bias is None else biases.get(id(bias), bias.detach()).to(bias.device)
                if runs:
                    new = RUNS[str(kind_of(module))](module, layer, packed, bias).eval()
                    for name in names[module]:
                        undo.callback(replace_module(model, name, new))
                else:
                    new = module
                    undo.callback(_dequantize_when_called(module, layer, bias))
            for holder, name in others:
                undo.callback(read_from(holder, name, new))
        return undo.pop_all().close


def packed_weight(module: Any, weight: QuantizedTensor) -> Any:
    """The weight as the module's kernel reads it; one for a Linear and an Embedding that are tied."""
    scheme = cast(Integer, weight.scheme.dense if isinstance(weight.scheme, Rotated) else weight.scheme)
    codes, scales, zero_points, group_size = scheme.unpacked(weight.tensors, weight.shape)
    if isinstance(module, nn.Linear | nn.Embedding):
        return kernels.pack_weight(codes, scales, zero_points, bits=scheme.bits, group_size=group_size)
    geometry = {"kernel_size": module.kernel_size, "groups": module.groups}
    return kernels.pack_conv(codes, scales, zero_points, bits=scheme.bits, group_size=group_size, **geometry)


def runs_packed(layer: QuantizedLayer, modules: Sequence[Any]) -> bool:
    """Whether kernels run all the layer's modules, and nothing but the modules' own forward would have run."""
    hooks = [(m._forward_hooks, m._forward_pre_hooks, m._backward_hooks) for m in modules]
    plain = all(runs_as_usual(module) and getattr(module, "max_norm", None) is None for module in modules)
    ops = [kernel_for(str(kind_of(module)), layer.weight.shape, layer.weight.scheme) for module in modules]
    return plain and not any(map(any, hooks)) and None not in ops


def _dequantize_when_called(module: Any, layer: QuantizedLayer, bias: Tensor | None) -> Undo:
    """Make the module a `Dequantized` one; returns the undo."""
    weight = layer.weight
    with ExitStack() as undo:
        undo.callback(snapshot(module))
        undo.callback(quantize_input(module, weight))
        del module.weight
        module.__class__ = type(type(module).__name__, (Dequantized, type(module)), {})
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        module.own_state = tuple(name for name, _ in own)
        module.stored, module.kind, module.owners = tuple(weight.tensors), layer.kind, layer.modules
        module.scheme, module.shape = weight.scheme, weight.shape
        for name, tensor in weight.tensors.items():
            module.register_buffer(f"stored_{name}", tensor.clone())  # no view of a file or of the bank
        return undo.pop_all().close


def _check_shape(layer: QuantizedLayer, module: Any) -> None:
    if rows_shape(module) != tuple(layer.weight.shape):
        raise InputError(
            f"Layer '{layer.modules[0]}' has a weight of shape {list(rows_shape(module))} (output channels first); the packed "
            f"one is {list(layer.weight.shape)}. Give the model that was quantized."
        )


def packed_modules(model: nn.Module) -> dict[str, Any]:
    """Name -> each module that runs on packed weights or dequantizes them."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, PackedModule | Dequantized)}


def save(model: nn.Module, path: Path | str, folds: Sequence[Pair] | None = None) -> Path:
    """Write a packed model to a safetensors file: stored tensors, and all other parameters and buffers; returns the path.

    `folds` are the batch norms that were folded, `None` those that `pack` folded: `load` is given the network unfolded.

    The tensors weigh what `size_bytes` counted; the file's metadata describe them (JSON), with a digest over the description and
    all tensors. `InputError` where the model is not packed, or the file cannot be written.
    """
    modules = packed_modules(model)
    folds = getattr(model, "folded_batch_norms", ()) if folds is None else folds
    if not modules:
        raise InputError(f"This {type(model).__name__} is not packed. Pack it first: load_allocation(path).pack(model).")
    layers: dict[str, dict[str, Any]] = {}
    schemes: list[dict[str, Any]] = []  # each once: budgets limit the whole file, with its header
    tensors: dict[str, Tensor] = {}
    done: set[str] = set()  # names in the state that stand for packed weights
    for name, module in modules.items():
        done |= {f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False) if buffer not in module.own_state}
        layer = module.owners[0]
        if layer not in layers:
            weight = module.quantized()
            tensors.update({f"{layer}.weight.{key}": tensor for key, tensor in weight.tensors.items()})
            fields = weight.scheme.fields()
            if fields not in schemes:
                schemes.append(fields)
            layers[layer] = {"kind": module.kind, "shape": list(weight.shape), "scheme": schemes.index(fields)}
            if module.owners != (layer,):
                layers[layer]["modules"] = list(module.owners)
    first: dict[tuple[int, torch.Size], str] = {}
    shared = {}
    for name, tensor in model.state_dict().items():
        if name in done:
            continue
        if tensor.numel() and (tensor.data_ptr(), tensor.shape) in first:
            shared[name] = first[tensor.data_ptr(), tensor.shape]
        else:
            first[tensor.data_ptr(), tensor.shape] = name
            tensors[name] = tensor
    about = {
        "version": VERSION,
        "folds": [list(pair) for pair in folds],
        "layers": layers,
        "schemes": schemes,
        "clips": [name for name, module in model.named_modules() if isinstance(module, ChannelClip)],
        "shared": shared,
        "size_bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }
    path = Path(path)
    with file_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, tensor_file(tensors, FORMAT, about))
    return path


def load(path: Path | str, model: nn.Module) -> nn.Module:
    """Make of `model` (the same network, whatever its weights, on the CPU or the "meta" device) the packed one that was saved.

    In place; returned in eval mode. Before the model is touched the file is checked: its description, that every tensor is used
    once and is what its scheme stores, and its digest. That finds damage and careless edits; a digest is no signature, so load
    files of a source that you trust. `InputError` where the file is missing or damaged, or belongs to another network, or where a
    network on "meta" has buffers that no file holds (non-persistent ones, as of rotary positions).
    """
    path = Path(path)
    with opened(path, FORMAT, REMEDY) as file:
        if file is None:
            raise InputError(f"{path} is no packed model of mpsearch. {REMEDY}")
        about = file.about
        if about.data.get("version") != VERSION:
            raise InputError(f"{path} has version {about.data.get('version')}; this mpsearch reads {VERSION}. Save it again.")
        layers, floats, shared = _described(file)
        folds, clips = about.pairs("folds"), about.texts("clips")
        weights = {layer.name: layer.weight({key: _tensor_of(file, layer.name, key) for key in layer.keys}) for layer in layers}
        file.verify()
        check_fits(expose_projections(model), layers, path)
        names = dict(model.named_modules())
        if wrong := [name for name in clips if not name or name not in names or f"{name}.high" not in floats]:
            raise InputError(f"{path} belongs to another model: the activation '{wrong[0]}' is not in both.")
        pack(model, (), folds)
        for name in clips:  # in the place of a ReLU6, where channels were equalized
            model.set_submodule(name, ChannelClip(file.tensor(f"{name}.high")))
        _install(model, (QuantizedLayer(layer.kind, layer.modules, weights.pop(layer.name)) for layer in layers))
        # Copies: a tensor of the file's would keep all of it in memory.
        tensors = {name: file.tensor(name).clone() for name in floats}
    tensors |= {name: tensors[first] for name, first in shared.items()}
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:  # tensors of other shapes
        check_memory(error)
        raise InputError(f"{path} belongs to another model: {' '.join(str(error).split())}") from None
    missing = [name for name in missing if name.rpartition(".")[0] not in packed_modules(model) or name.endswith(".bias")]
    if missing or unexpected:
        raise InputError(
            f"{path} belongs to another model: {len(missing)} tensors are missing and {len(unexpected)} unknown, such as "
            f"'{(missing + unexpected)[0]}'."
        )
    if empty := [name for name, tensor in (*model.named_buffers(), *model.named_parameters()) if tensor.is_meta]:
        raise InputError(
            f"This {type(model).__name__} computes '{empty[0]}' when it is built and does not store it, so on the device 'meta' "
            "it has no values. Build the network on the CPU."
        )
    return model


def _described(file: TensorFile) -> tuple[list[StoredLayer], list[str], Mapping[str, str]]:
    """The layers, the names of the other tensors, and further names of those; `InputError` where they do not add up."""
    about = file.about
    about.only(("version", "folds", "layers", "schemes", "clips", "shared", "size_bytes"))
    described, schemes = about.object("layers"), about.objects("schemes")
    layers = []
    for name in described.data:
        entry = described.object(name)
        entry.only(("kind", "shape", "scheme"), ("modules",))
        if entry.integer("scheme") >= len(schemes):
            raise about.damaged(f"'{entry.place}.scheme' must be below {len(schemes)}, got {entry.integer('scheme')}")
        layers.append(StoredLayer.read(name, entry, schemes[entry.integer("scheme")]))
    in_layers = [f"{layer.name}.weight.{key}" for layer in layers for key in layer.keys]
    floats = sorted(set(file.names) - set(in_layers))
    check_used(about, file.names, in_layers + floats)
    shared = about.mapping("shared")
    for name, first in shared.items():
        if name in file.names or first not in floats:
            raise about.damaged(f"'shared' must name a stored tensor for each other name, got '{first}' for '{name}'")
    nbytes = sum(layer.size_bytes for layer in layers) + sum(file.nbytes(name) for name in floats)
    if about.integer("size_bytes") != nbytes:
        raise about.damaged(f"its tensors have {nbytes:,} bytes, but size_bytes is {about.integer('size_bytes'):,}")
    return layers, floats, shared


def _tensor_of(file: TensorFile, layer: str, key: str) -> Tensor:
    tensor = file.tensor(f"{layer}.weight.{key}")
    return tensor.clone() if key.startswith("input_") else tensor  # modules keep those, and with a view all of the file
