"""The contract of the exporters: write the picked allocation as a file that a runtime reads."""

from __future__ import annotations

import importlib.util
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation
from mpsearch.files import file_errors
from mpsearch.graph.channel_scaling import Equalization
from mpsearch.graph.surgery import hooked
from mpsearch.layer import kind_of, weight_rows
from mpsearch.packed.model import Weights

# Also the one name that tensors had before they were named by their content.
CONTENT_NAMED = re.compile(r"allocation\.safetensors|(allocation|equalization)-[0-9a-f]{12}\.safetensors")


@dataclass(frozen=True)
class ModelCall:
    """The arguments of a model's forward for one batch of inputs."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    @torch.no_grad()
    def record(cls, model: nn.Module, forward: Callable[[nn.Module, Any], object], inputs: Any) -> ModelCall:
        """The last call of `model` in `forward(model, inputs)`."""
        calls: list[ModelCall] = []
        with hooked(before=[(model, lambda module, args, kwargs: calls.append(cls(args, kwargs)))]):
            forward(model, inputs)
        return calls[-1]


@dataclass(frozen=True)
class Picked:
    """What an exporter is given: the picked point, its scores (split -> evaluation), and what the model was before.

    `model_sha256` is the checksum of the float model as it was built, `folds` the (layer, batch norm) pairs folded since,
    `equalization` how its channels were scaled then, if they were. `call` is a call of the model on some samples of the
    calibration split, where the exporter asks for it; `None` where the data are absent.
    """

    evaluation: Evaluation
    scores: Mapping[str, Evaluation]
    baselines: Mapping[str, Evaluation]
    quality_name: str
    model_sha256: str
    folds: Sequence[tuple[str, str]]
    equalization: Equalization | None = None
    call: ModelCall | None = None


class Exporter(ABC):
    """Writes files into a folder; their tensors have the size that the budget counted.

    Attributes
    ----------
    own_folder
        Name of a folder, inside the one that the user names, that holds nothing but the exported files; "": there is none.
    runtime
        The runtime that opens the files, as the report names it; "": mpsearch.
    needs_call
        Whether `Picked.call` is asked for.
    holds_weights
        Whether the files hold the weights of the point; if not, they cannot be loaded and scored.
    """

    own_folder: ClassVar[str] = ""
    runtime: ClassVar[str] = ""
    needs_call: ClassVar[bool] = False
    holds_weights: ClassVar[bool] = True

    def check_installed(self) -> None:  # noqa: B027  (ours need nothing)
        """Raise `InputError`, with the pip command, where a package is missing that `export` or `open` needs."""

    def check(self, model: nn.Module) -> None:  # noqa: B027
        """Raise `InputError` for a float model that cannot be written, before a search whose runtime names this exporter."""

    @abstractmethod
    def export(self, picked: Picked, engine: Weights, folder: Path) -> Path:
        """Write the files and return the path of the one that names all others, which is written last.

        Files that it names carry names of their content, so that earlier ones stay whole: see `remove_unreferenced`.
        """

    @abstractmethod
    def load(self, path: Path, model: nn.Module) -> nn.Module:
        """Make of the float `model`, in place, the exported one at `path`; returns it in eval mode."""

    def files(self, path: Path) -> list[Path]:
        """All files of the export at `path`: those of `own_folder`, or `path` alone where there is none."""
        return sorted(file for file in path.parent.rglob("*") if file.is_file()) if self.own_folder else [path]

    def open(self, path: Path, model: nn.Module) -> nn.Module:
        """The model at `path` as its runtime runs it.

        Parameters
        ----------
        path
            What `export` returned.
        model
            The float model as it was built; may be changed.

        Returns
        -------
        nn.Module
            Its forward takes and returns what that of `model` does. By default that of `load`, for files that PyTorch runs.

        Raises
        ------
        InputError
            The runtime is not installed (with the pip command), or it cannot run the file.
        """
        return self.load(path, model)

    def decode(self, path: Path, model: nn.Module) -> dict[str, Tensor]:
        """The weights at `path` as the runtime's own reader decodes them; parameters as those of `open`.

        Returns
        -------
        dict of str to Tensor
            Layer name -> float32, output channels first. By default the weights of the modules that `open` returns.
        """
        modules = self.open(path, model).named_modules()
        return {name: weight_rows(module).float() for name, module in modules if kind_of(module) is not None}


def check_packages(exporter: str, packages: Sequence[str], install: str) -> None:
    """Raise `InputError`, with the command that installs them, where a package that the exporter needs is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"exporter={exporter} needs the package {package}: {install}.")


def publish(path: Path, folder: Path, owned: bool = False) -> Path:
    """Move the files that were exported next to `path` into `folder`, `path` itself last; returns its new path.

    Other files of the folder are removed where it is `owned`. Where moving fails, an earlier export in `folder` is left as it
    was; `InputError` where the file system is the cause.
    """
    new: list[Path] = []
    try:
        with file_errors(folder):
            exported = [file for file in path.parent.iterdir() if not file.name.startswith(".")]
            for file in sorted(exported, key=lambda file: file == path):
                target = folder / file.name
                if not target.exists():
                    new.append(target)
                os.replace(file, target)
    except BaseException:
        for file in new:
            with suppress(OSError):
                file.unlink()
        raise
    remove_unreferenced(folder)
    if owned:
        for name in {file.name for file in folder.iterdir() if file.is_file()} - {file.name for file in exported}:
            (folder / name).unlink()
    return folder / path.name


def remove_unreferenced(folder: Path) -> None:
    """Remove tensor files, named by their content, that no JSON file of the folder names any more."""
    with suppress(OSError):
        named = "".join(file.read_text(encoding="utf-8", errors="replace") for file in folder.glob("*.json"))
        for file in folder.glob("*.safetensors"):
            if CONTENT_NAMED.fullmatch(file.name) and file.name not in named:
                file.unlink()
