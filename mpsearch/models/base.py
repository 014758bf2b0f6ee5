"""What a model on this shelf is, and how its weights are loaded.

A model is any callable that takes keyword arguments and returns an `nn.Module` with float32 weights, trained and in eval
mode; `conf/model/<name>.yaml` points at it. Nothing else is asked of it: layers are found by running it once (`trace`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mpsearch.errors import InputError

M = TypeVar("M", bound=nn.Module)

# Counts the training steps of a batch norm; inference never reads it and many checkpoints drop it.
STEP_COUNTER = "num_batches_tracked"


def load_weights(
    model: M, path: str | Path, ignore: str | tuple[str, ...] = (), rename: Callable[[str], str] = lambda name: name
) -> M:
    """Fill `model` in place from a `.safetensors` file and return it in eval mode.

    Every parameter and buffer must be in the file with its shape and a floating-point dtype (step counters of batch norms
    may be absent, and all but the first name of a tied weight), and nothing else, except tensors whose name starts with (one of)
    `ignore`. `rename` makes the model's name of the file's. Raises `InputError` otherwise.
    """
    path = Path(path).expanduser()
    tensors = {rename(name): tensor for name, tensor in read(path).items() if not name.startswith(ignore)}
    return fill(model, tensors, path)


def fill(model: M, stored: Mapping[str, Tensor], path: str | Path) -> M:
    """`model`, in place and in eval mode, with the tensors that were read from `path`: the rules of `load_weights`."""
    wanted = model.state_dict()
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # the first name of each
    missing = [name for name in wanted if name in own - stored.keys() and name.rpartition(".")[2] != STEP_COUNTER]
    unexpected = [name for name in stored if name not in wanted]
    if missing or unexpected:
        parts = [
            f"{len(names)} {what} ({_some(names)})" for what, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise InputError(
            f"The weights in {path} are not those of {type(model).__name__}: of {len(wanted)} tensors {' and '.join(parts)}. "
            "Check that the file belongs to this model and depth."
        )
    for name, tensor in stored.items():
        if tensor.shape != wanted[name].shape:
            raise InputError(
                f"'{name}' in {path} has shape {list(tensor.shape)}, the model needs {list(wanted[name].shape)}. "
                "Check that the file belongs to this model."
            )
        if wanted[name].is_floating_point() and not tensor.is_floating_point():
            raise InputError(f"'{name}' in {path} is {tensor.dtype}; a float checkpoint is needed, not a quantized one.")
    model.load_state_dict(stored, strict=False)
    return model.eval()


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file; `InputError` where there is none, or it is damaged."""
    if not path.is_file():
        raise InputError(f"There is no weights file {path}. Give the path of a .safetensors file.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole .safetensors file ({error}). Copy or download it again.") from error


def _some(names: Collection[str], shown: int = 3) -> str:
    first = ", ".join(f"'{name}'" for name in list(names)[:shown])
    return first if len(names) <= shown else f"{first}, …"
