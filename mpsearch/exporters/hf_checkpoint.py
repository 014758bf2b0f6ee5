"""The folder of a model of Hugging Face transformers: how it names, lays out and shards the tensors of the network.

A network is searched with a Linear layer for each expert and for each `Conv1D`, and under the names of its modules. The files may
hold other names (Mixtral's `block_sparse_moe.experts.0.w1`) and layouts (gate and up apart, all experts in one tensor, `Conv1D`
transposed). transformers knows how to go back (`revert_weight_conversion`); it is asked with the numbers of the rows in the place
of the weights, so that the answer says where each row goes.
"""

from __future__ import annotations

import json
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.files import file_errors, write_atomically
from mpsearch.graph.experts import SplitExperts
from mpsearch.models.huggingface import check_folder

COPIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "preprocessor_config.json"),
)
SHARD_BYTES = 2 * 10**9  # of the largest file of tensors, which is all that is in memory in addition to the model
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


@dataclass(frozen=True)
class Part:
    """Rows of a tensor of the network's state that a tensor of the files holds."""

    name: str
    rows: slice


@dataclass(frozen=True)
class Origin:
    """What a tensor of the files is made of: one part, or one for each expert, stacked; each transposed where said."""

    parts: tuple[Part, ...]
    is_stack: bool = False
    is_transposed: bool = False

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        """The tensor of the files, from those of `parts`, whole."""
        values = [tensor[part.rows] for part, tensor in zip(self.parts, tensors, strict=True)]
        values = [value.t() if self.is_transposed and value.dim() == 2 else value for value in values]
        return torch.stack(values) if self.is_stack else values[0].contiguous()


class Checkpoint:
    """The files that a model of transformers was loaded from.

    Attributes
    ----------
    source
        The folder.
    dtypes
        Tensor of the files -> its dtype.
    origins
        Tensor of the files -> what it is made of; those that are tied to another one included.
    """

    def __init__(self, model: nn.Module, what: str) -> None:
        self.source = source_of(model, what)
        self.dtypes = stored_dtypes(self.source)
        self.origins = origins(model)
        if missing := [name for name in self.dtypes if name not in self.origins]:
            known = ", ".join(missing[:3])
            raise InputError(
                f"{self.source} holds {len(missing)} tensors that this {type(model).__name__} has not ({known}), which {what} "
                "would drop. Save the model as it was searched, with save_pretrained, or use exporter=native."
            )

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in the dtype that it was stored in, where that loses nothing."""
        narrow = tensor.to(self.dtypes.get(name, tensor.dtype))
        return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor

    def copy_others(self, folder: Path) -> None:
        """Copy the tokenizer and its like."""
        for name in COPIED:
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, folder / name)

    def config(self) -> dict[str, Any]:
        """`config.json`."""
        config: dict[str, Any] = json.loads((self.source / "config.json").read_text(encoding="utf-8"))
        return config


def source_of(model: nn.Module, what: str) -> Path:
    """The folder that a model was loaded from; `InputError`, which names `what` writes it, where it is none of transformers."""
    source = Path(str(getattr(model, "name_or_path", "")))
    if not source.parts or not hasattr(model, "config"):
        raise InputError(
            f"{what} writes models of Hugging Face transformers; got a {type(model).__name__}. Search with model=hf "
            "model.path=FOLDER, or use exporter=native."
        )
    check_folder(source)
    return source


def origins(model: Any) -> dict[str, Origin]:
    """Tensor of the files -> what it is made of, of a model whose projections are exposed."""
    from transformers.core_model_loading import revert_weight_conversion

    state, modules = model.state_dict(), dict(model.named_modules())
    sources: list[tuple[list[str], int, bool]] = []  # names of the state, rows of each, transposed
    of_experts: dict[str, tuple[list[str], bool]] = {}
    for name, module in modules.items():
        if isinstance(module, SplitExperts):
            of_experts |= {fused: (names, bool(module.is_transposed)) for fused, names in _stacks(name, module).items()}
    stacked = {name for names, _ in of_experts.values() for name in names}
    numbers: dict[str, Tensor] = {}
    starts, count = [], 0
    conv1d = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Linear) and hasattr(module, "nf")}
    singles = {name: ([name], name in conv1d) for name in state if name not in stacked}
    for name, (names, transposed) in {**singles, **of_experts}.items():
        shape = state[names[0]].shape
        rows = shape[0] if len(shape) else 1
        size = len(names) * rows
        ids = torch.arange(count, count + size)
        lead = (len(names), rows) if name in of_experts else tuple(shape[:1])
        numbers[name] = ids.reshape(*lead, *([1] * (len(shape) - 1)))
        sources.append((names, rows, transposed))
        starts.append(count)
        count += size
    return {
        name: _origin(name, ids, sources[i], starts[i])
        for name, ids in revert_weight_conversion(model, numbers).items()
        for i in [bisect_right(starts, int(ids.flatten()[0])) - 1]
    }


def _stacks(name: str, module: Any) -> dict[str, list[str]]:
    """The parameters of a block of experts -> the names of each expert's part."""
    parts = [(f"{part}.weight", part) for part in (module.first_name, "down_proj")]
    if module.has_bias:
        parts += [(f"{part}.bias", f"{part}_bias") for part in (module.first_name, "down_proj")]
    return {f"{name}.{fused}": [f"{name}.{i}.{part}" for i in range(module.num_experts)] for part, fused in parts}


def _origin(name: str, ids: Tensor, source: tuple[list[str], int, bool], start: int) -> Origin:
    names, rows, transposed = source
    flat = ids.flatten()
    first = int(flat[0]) - start
    if not torch.equal(flat, torch.arange(len(flat)) + start + first) or first + len(flat) > len(names) * rows:
        raise InputError(
            f"The tensor '{name}' of the checkpoint is arranged in a way that is not known here. Use exporter=native."
        )
    if len(flat) > rows:
        return Origin(tuple(Part(part, slice(0, rows)) for part in names), True, transposed)
    part, row = divmod(first, rows)
    return Origin((Part(names[part], slice(row, row + len(flat))),), False, transposed)


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Tensor -> its dtype, from the headers of the folder's safetensors files."""
    dtypes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                dtype = tensors.get_slice(name).get_dtype()
                dtypes[name] = DTYPES[dtype] if dtype in DTYPES else tensors.get_tensor(name).dtype
    return dtypes


def write_shards(groups: Iterable[Mapping[str, Tensor]], folder: Path, about: Mapping[str, str] | None = None) -> None:
    """Write `model.safetensors`, or, above `SHARD_BYTES`, numbered files and an index; tensors of a mapping stay together.

    `about` are further metadata, which each file gets.
    """
    written: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def write() -> None:
        path = folder / f"shard-{len(written)}"
        save_file(shard, path, metadata={"format": "pt", **(about or {})})
        written.append((path, list(shard)))
        shard.clear()

    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for group in groups:
            size = sum(tensor.nbytes for tensor in group.values())
            if shard and sum(tensor.nbytes for tensor in shard.values()) + size > SHARD_BYTES:
                write()
            shard.update(group)
            total += size
        write()
        if len(written) == 1:
            written[0][0].replace(folder / "model.safetensors")
            return
        index = {}
        for i, (path, names) in enumerate(written, 1):
            file = f"model-{i:05}-of-{len(written):05}.safetensors"
            path.replace(folder / file)
            index.update(dict.fromkeys(names, file))
    contents = {"metadata": {"total_size": total}, "weight_map": index}
    write_atomically(folder / "model.safetensors.index.json", json.dumps(contents, indent=2) + "\n")


def read_shards(folder: Path) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file of a folder."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            yield {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
