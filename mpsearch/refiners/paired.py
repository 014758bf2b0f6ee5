"""The float model and a copy of it whose layers are quantized one after another, run side by side on the calibration data.

For each layer both are run up to its product, on the same batch: what meets its weight in the float model, and what meets it when
all layers before it are quantized. The copy shares the memory of all weights that have not been replaced yet. Of each batch only
some output positions are kept, drawn at random, the same of both models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.engine.engine import QuantEngine
from mpsearch.engine.prefix_cache import PrefixCache
from mpsearch.graph.products import Product, observe_products
from mpsearch.graph.shared_copy import shared_copy
from mpsearch.graph.surgery import Undo, hooked, quantize_input
from mpsearch.layer import LayerGroup, LayerSpec, from_rows, set_values
from mpsearch.schemes.base import QuantizedTensor

ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
SPLIT = "calibration"


@dataclass(frozen=True)
class Rows:
    """What meets a layer's weight at some output positions, and what was added to its output there.

    Attributes
    ----------
    inputs
        float32 `[k, n, columns]`, k the groups of a grouped convolution, else 1.
    residual
        float32 `[n, rows]`; `None` where nothing was added.
    shape
        Of the whole outputs, end to end.
    """

    inputs: Tensor
    residual: Tensor | None
    shape: tuple[int, ...]

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Those of several parts, of at least one; without residuals where a part has none."""
        if len(parts) == 1:
            return parts[0]
        residuals = [part.residual for part in parts if part.residual is not None]
        shape = tuple(n for part in parts for n in part.shape)
        residual = torch.cat(residuals) if len(residuals) == len(parts) else None
        return cls(torch.cat([part.inputs for part in parts], 1), residual, shape)

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return sum(x.untyped_storage().nbytes() for x in (self.inputs, self.residual) if x is not None)

    def taken(self, part: slice) -> Rows:
        """Those of a part of the positions."""
        return replace(self, inputs=self.inputs[:, part], residual=None if self.residual is None else self.residual[part])


@dataclass
class Stage:
    """Layers that read the same input; of each, whether another tensor is added to its output."""

    layers: list[LayerSpec] = field(default_factory=list)
    has_residual: dict[str, bool] = field(default_factory=dict)


Take = Callable[[str, Product], Product]


class PairedModels:
    """Runs `engine.model` and its copy on the calibration split.

    Parameters
    ----------
    engine
        The float model and its data.
    n_positions
        Output positions of each layer that are kept, over all batches, as a multiple of its columns.
    prefix_max_bytes
        Of outputs from which forward passes start, a quarter for each model, and of rows of the float model, which are the same
        for every allocation; 0: nothing is kept, and every pass starts at the input.
    """

    def __init__(self, engine: QuantEngine, n_positions: float, prefix_max_bytes: int) -> None:
        self.engine, self.task, self.n_positions = engine, engine.task, n_positions
        self.copy = shared_copy(engine.model)
        self.n_runs = 1  # of the model, in a forward pass of the task
        space = engine.space
        groups = tuple(LayerGroup(layer.name, (layer,)) for layer in space.layers)
        single = SearchSpace(groups, space.schemes, tuple(tuple(space.schemes) for _ in groups))
        self._caches = [
            PrefixCache(model, engine.task, single, prefix_max_bytes // 4, engine.scorer.scratch) if prefix_max_bytes else None
            for model in (engine.model, self.copy)
        ]
        self._float_rows: dict[tuple[str, int], dict[str, Rows]] = {}  # (first layer of a stage, batch)
        self._bytes_left = prefix_max_bytes // 2
        self._undo: list[Undo] = []
        self.restart()

    def restart(self) -> None:
        """Make the copy float again."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        for parameter, own in zip(self.engine.model.parameters(), self.copy.parameters(), strict=True):
            own.data = parameter.data
        for cache in self._caches:
            if cache is not None:
                cache.clear()
        self._placed: dict[str, str] = {}
        self._allocation = Allocation()

    @torch.no_grad()
    def stages(self) -> list[Stage]:
        """The layers with one product in each run of the model, in forward order; those with the same input are in one stage.

        A task may run the model several times in a forward pass, as on either text of a pair: all its products then count.
        """
        single = {layer.modules[0]: layer for layer in self.engine.space.layers if len(layer.modules) == 1}
        readers = [reader for layer in self.engine.space.layers for reader in layer.readers]
        n_products: Counter[str] = Counter()
        order: list[tuple[str, bool]] = []
        last: list[Tensor] = []
        runs: list[nn.Module] = []
        with _Additions() as additions, hooked([(self.engine.model, lambda model, args, kwargs: runs.append(model))]):

            def see(name: str, product: Product, output: Tensor) -> None:
                n_products[name] += 1
                if product.transposed:
                    single.pop(name, None)
                same = bool(last) and last[0].data_ptr() == product.input.data_ptr() and last[0].shape == product.input.shape
                last[:] = [product.input]
                order.append((name, same))
                additions.watch(name, output)

            with observe_products(self.engine.model, readers, see):
                self.task.forward(self.engine.model, self.engine.batches(SPLIT)[0][0])
        names = [name for name, _ in order]
        self.n_runs = max(len(runs), 1)
        n = len(names) // self.n_runs
        if names != names[:n] * self.n_runs:  # not the same layers in the same order
            self.n_runs, n = 1, len(names)
        stages: list[Stage] = []
        for name, same in order[:n]:
            layer = single.get(name)
            if layer is not None and n_products[name] == self.n_runs and not n_products[layer.weight_name]:
                if not same or not stages:
                    stages.append(Stage())
                stages[-1].layers.append(layer)
                stages[-1].has_residual[name] = name in additions.added
        return stages

    def pairs(self, stage: Stage, change: Take) -> Iterator[dict[str, tuple[Rows, Rows]]]:
        """Of each batch, in order: layer -> its rows in the float model and in the copy, where their outputs have one shape.

        A single batch is given in two halves, so that there are always two samples of the data.

        `change(layer, product)` is what is taken of the copy's product, as that with a quantized input.
        """
        batches = self.engine.batches(SPLIT)
        for i, (inputs, _) in enumerate(batches):
            one = self._rows_in_float(stage, i, inputs)
            two = self._rows(self.copy, self._caches[1], stage, i, inputs, change)
            both = {name: (one[name], two[name]) for name in one.keys() & two.keys() if one[name].shape == two[name].shape}
            for half in (slice(None),) if len(batches) > 1 else (slice(0, None, 2), slice(1, None, 2)):
                yield {name: (a.taken(half), b.taken(half)) for name, (a, b) in both.items()}

    def _rows_in_float(self, stage: Stage, i: int, inputs: Any) -> dict[str, Rows]:
        """Layer -> its rows in the float model; kept as long as memory allows, first come first served."""
        key = stage.layers[0].name, i
        if key not in self._float_rows:
            rows = self._rows(self.engine.model, self._caches[0], stage, i, inputs, lambda name, product: product)
            n_bytes = sum(each.nbytes for each in rows.values())
            if n_bytes > self._bytes_left:
                return rows
            self._bytes_left -= n_bytes
            self._float_rows[key] = rows
        return self._float_rows[key]

    def see_inputs(self, stage: Stage, see: Callable[[str, Product], None]) -> None:
        """Call `see(layer, product)` with each product of the copy's layers, of all batches."""

        def change(name: str, product: Product) -> Product:
            see(name, product)
            return product

        for i, (inputs, _) in enumerate(self.engine.batches(SPLIT)):
            self._rows(self.copy, self._caches[1], stage, i, inputs, change)

    def place(self, layer: LayerSpec, scheme: str, weight: QuantizedTensor, biases: Mapping[str, Tensor]) -> None:
        """Give the copy's layer a quantized weight, biases by module, and the input quantization of its scheme."""
        modules: list[Any] = [self.copy.get_submodule(name) for name in layer.modules]
        set_values(modules[0].weight, from_rows(modules[0], weight.dequantize()))
        for name, bias in biases.items():
            set_values(self.copy.get_parameter(f"{name}.bias"), bias)
        for module in modules:
            self._undo.append(quantize_input(module, weight))
        self._placed[layer.name] = scheme
        self._allocation = Allocation(self._placed)

    @torch.no_grad()
    def _rows(
        self, model: nn.Module, cache: PrefixCache | None, stage: Stage, i: int, inputs: Any, change: Take
    ) -> dict[str, Rows]:
        """Layer -> its rows in batch `i`; the pass ends with the last of them."""
        names = {layer.modules[0]: layer.name for layer in stage.layers}
        taken: dict[str, tuple[Product, Tensor, Tensor]] = {}
        rows: dict[str, list[Rows]] = {name: [] for name in names.values()}  # of each run of the model
        if cache is not None:
            cache.begin(SPLIT, i, inputs, self._allocation)
        with suppress(_SeenError), _Additions() as additions:

            def done(module: str, residual: Tensor | None) -> None:
                product, positions, patches = taken[module]
                added = None if residual is None else product.rows_at(residual, positions)
                rows[names[module]].append(Rows(patches, added, tuple(product.output.shape)))
                if all(len(each) == self.n_runs for each in rows.values()):
                    raise _SeenError

            def see(module: str, product: Product, output: Tensor) -> None:
                positions = self._positions(product, i, len(rows[names[module]]))
                taken[module] = product, positions, change(names[module], product).patches_at(positions)
                if stage.has_residual[module]:
                    additions.watch(module, output)
                else:
                    done(module, None)

            additions.callback = done
            with observe_products(model, list(names), see):
                if cache is None:
                    self.task.forward(model, inputs)
                else:
                    cache.forward(SPLIT, i, inputs, self._allocation)
        return {name: Rows.joined(each) for name, each in rows.items() if len(each) == self.n_runs}

    def _positions(self, product: Product, i: int, run: int) -> Tensor:
        """Output positions of batch `i` in one run of the model, drawn at random, int64 `[n]`."""
        n_batches = len(self.engine.batches(SPLIT)) * self.n_runs
        columns = product.input.shape[1 if product.kernel else -1] // product.groups * int(torch.tensor(product.kernel).prod())
        n = min(-(-int(self.n_positions * columns) // n_batches), product.count)
        generator = torch.Generator().manual_seed(i * self.n_runs + run)
        drawn = torch.arange(n) if n == product.count else torch.randint(product.count, (n,), generator=generator)
        return drawn.to(product.input.device)


class _SeenError(Exception):
    """All that was to be observed in a forward pass has been."""


class _Additions(TorchFunctionMode):
    """Observes what is added to tensors that are watched, before it is; `added` are the names of those to which something was."""

    def __init__(self) -> None:
        super().__init__()
        self.added: set[str] = set()
        self.callback: Callable[[str, Tensor], None] = lambda name, other: None
        self._watched: dict[int, tuple[str, Tensor]] = {}  # a tensor that is held keeps its id

    def watch(self, name: str, output: Tensor) -> None:
        """Watch a tensor until something is added to it."""
        self._watched[id(output)] = name, output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ADDITIONS and not kwargs and len(args) == 2 and all(isinstance(x, Tensor) for x in args):
            pairs = [(self._watched.get(id(x)), other) for x, other in (args, args[::-1])]
            if args[0].shape == args[1].shape:
                for watched, other in pairs:
                    if watched is not None and self._watched.pop(id(watched[1]), None) is not None:
                        self.added.add(watched[0])
                        self.callback(watched[0], other)
        return func(*args, **(kwargs or {}))
