"""The layers of a file with quantized weights, checked: their description, their tensors, and that they fit a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.files.strict_json import JsonObject, canonical
from mpsearch.layer import KINDS, kind_of, rows_shape
from mpsearch.schemes.base import QuantizedTensor, QuantScheme, scheme_from_fields


@dataclass(frozen=True)
class StoredLayer:
    """A layer as a file describes it: `modules` own its weight of `shape` (output channels first)."""

    name: str
    kind: str
    modules: tuple[str, ...]
    shape: tuple[int, ...]
    scheme: QuantScheme
    about: JsonObject

    @classmethod
    def read(cls, name: str, about: JsonObject, scheme: JsonObject) -> StoredLayer:
        """From the JSON at `about`; without `modules`, `name` is the only one. `InputError` where it is malformed."""
        kind, shape = about.text("kind"), about.integers("shape")
        modules = about.texts("modules") if "modules" in about.data else (name,)
        if kind not in KINDS.values() or not modules or not shape:
            raise about.damaged(f"'{about.place}' must have a known kind, a module and a shape, got {kind!r}, {modules}, {shape}")
        return cls(name, kind, modules, shape, read_scheme(scheme, shape), about)

    @property
    def size_bytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.scheme.storage_bits(self.shape) // 8

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the stored tensors, without the layer's."""
        return tuple(sorted(self.scheme.layout(self.shape)))

    def weight(self, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """From the tensors of `keys`; `InputError` where one is not as the scheme stores it."""
        try:
            self.scheme.check(tensors, self.shape)
        except InputError as error:
            raise self.about.damaged(f"of the layer '{self.name}', {error}") from None
        return QuantizedTensor(self.scheme, self.shape, tensors)


def read_scheme(about: JsonObject, shape: tuple[int, ...]) -> QuantScheme:
    """The scheme whose fields are at `about`, for a weight of `shape`; `InputError` where they are none."""
    try:
        scheme = scheme_from_fields(about.data)
        same = canonical(scheme.fields()) == canonical(about.data)
        scheme.layout(shape)
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise about.damaged(f"'{about.place}' is no scheme ({type(error).__name__}: {error})") from None
    except InputError as error:
        raise about.damaged(f"'{about.place}' is no scheme: {str(error).rstrip('.')}") from None
    if not same:
        raise about.damaged(f"'{about.place}' lacks fields of a {about.data['class']}, or has them in another type")
    return scheme


def check_used(about: JsonObject, stored: Sequence[str], used: Sequence[str]) -> None:
    """Raise `InputError` unless every stored tensor is used exactly once."""
    if twice := [name for name, count in Counter(used).items() if count > 1]:
        raise about.damaged(f"the tensor '{twice[0]}' is used twice")
    if missing := sorted(set(used) - set(stored)):
        raise about.damaged(f"the tensor '{missing[0]}' is missing")
    if unused := sorted(set(stored) - set(used)):
        raise about.damaged(f"the tensor '{unused[0]}' belongs to no layer")


def check_fits(model: nn.Module, layers: Sequence[StoredLayer], where: object) -> None:
    """Raise `InputError` where the model lacks a module, or has one of another kind or shape than the file at `where` says."""
    modules: Mapping[str, Any] = dict(model.named_modules(remove_duplicate=False))
    seen: set[str] = set()
    for layer in layers:
        for name in layer.modules:
            if name in seen:
                raise layer.about.damaged(f"the module '{name}' is in two layers")
            seen.add(name)
            if name not in modules:
                raise InputError(f"{where} belongs to another model: this {type(model).__name__} has no module '{name}'.")
            module = modules[name]
            kind = kind_of(module)
            same_kind = kind == layer.kind if name == layer.modules[0] else kind is not None  # an embedding tied to a Linear
            if not same_kind or rows_shape(module) != layer.shape:
                actual = f"{kind} {list(rows_shape(module))}" if kind else type(module).__name__
                raise InputError(
                    f"{where} belongs to another model: the layer '{name}' is a {layer.kind} with a weight of shape "
                    f"{list(layer.shape)} (output channels first) there; this model has a {actual}."
                )
