"""The contract of the models, and loading of their weights.

A model is any callable that takes keyword arguments and returns an `nn.Module` with float32 weights, trained and in eval mode.
Nothing else is asked of it: layers are found by running it once (`graph.trace`).

To add a model: write `models/<name>.py` with such a function, and `conf/model/<name>.yaml` with its `_target_` and defaults.
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

# Counts the training steps of a batch norm; inference does not read it and many checkpoints drop it.
STEP_COUNTER = "num_batches_tracked"


def load_weights(
    model: M, path: str | Path | None, ignore: str | tuple[str, ...] = (), rename: Callable[[str], str] = lambda name: name
) -> M:
    """Fill `model` in place from a `.safetensors` file and return it in eval mode.

    Every parameter and buffer must be in the file with its shape and a floating-point dtype (step counters of batch norms may be
    missing, and all but the first name of a tied weight).

    Parameters
    ----------
    path
        The file; `None` leaves the model's initial weights.
    ignore
        Prefixes of tensor names to skip.
    rename
        File's name of a tensor -> the model's.

    Raises
    ------
    InputError
        Where the file is missing or damaged, or its tensors are not those of the model.
    """
    if path is None:
        return model.eval()
    path = Path(path).expanduser()
    tensors = {rename(name): tensor for name, tensor in read(path).items() if not name.startswith(ignore)}
    return fill(model, tensors, path)


def fill(model: M, stored: Mapping[str, Tensor], path: str | Path) -> M:
    """`model`, in place and in eval mode, with the tensors that were read from `path`: the rules of `load_weights`."""
    expected = model.state_dict()
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # the first name of each
    missing = [name for name in expected if name in own - stored.keys() and name.rpartition(".")[2] != STEP_COUNTER]
    unexpected = [name for name in stored if name not in expected]
    if missing or unexpected:
        differences = (("missing", missing), ("unexpected", unexpected))
        parts = [f"{len(names)} {difference} ({_some(names)})" for difference, names in differences if names]
        raise InputError(
            f"The weights in {path} are not those of {type(model).__name__}: of {len(expected)} tensors {' and '.join(parts)}. "
            "Check that the file belongs to this model and depth."
        )
    for name, tensor in stored.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"'{name}' in {path} has shape {list(tensor.shape)}, the model needs {list(expected[name].shape)}. "
                "Check that the file belongs to this model."
            )
        if expected[name].is_floating_point() and not tensor.is_floating_point():
            raise InputError(f"'{name}' in {path} is {tensor.dtype}; a float checkpoint is needed, not a quantized one.")
    model.load_state_dict(stored, strict=False)
    return model.eval()


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file; `InputError` where it is missing or damaged."""
    if not path.is_file():
        raise InputError(f"There is no weights file {path}. Give the path of a .safetensors file.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a complete .safetensors file ({error}). Copy or download it again.") from error


def _some(names: Collection[str], shown: int = 3) -> str:
    first = ", ".join(f"'{name}'" for name in list(names)[:shown])
    return first if len(names) <= shown else f"{first}, …"
