"""A GGUF file in llama.cpp (package llama-cpp-python), as a PyTorch module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError, one_line


class LlamaCppModel(nn.Module):
    """Token ids int64 `[n, length]` -> logits float32 `[n, length, vocabulary]` of the token that follows each, on the CPU.

    Parameters
    ----------
    path
        The GGUF file.
    threads
        `None`: as many as PyTorch uses.

    Raises
    ------
    InputError
        llama-cpp-python is not installed, or llama.cpp does not load the file.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        super().__init__()
        self.path, self.threads = path, threads
        self._llama: Any = None
        self.context(1)

    def context(self, length: int) -> Any:
        """A `llama_cpp.Llama` for texts of up to `length` tokens; kept, and made again for longer ones."""
        llama_cpp = import_llama_cpp()
        if self._llama is None or self._llama.n_ctx() < length:
            n_threads = self.threads or torch.get_num_threads()
            options = {"n_ctx": length, "n_batch": length, "n_ubatch": length, "logits_all": True, "n_gpu_layers": 0}
            try:
                self._llama = llama_cpp.Llama(
                    str(self.path), n_threads=n_threads, n_threads_batch=n_threads, verbose=False, **options
                )
            except Exception as error:  # what a file that it cannot read raises
                raise InputError(f"llama.cpp does not load {self.path}: {one_line(error)}") from error
        return self._llama

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits; `InputError` for padded texts."""
        if attention_mask is not None and not attention_mask.all():
            raise InputError(
                "llama.cpp runs texts without padding here; got an attention mask with zeros. Use texts of one length."
            )
        llama = self.context(input_ids.shape[1])
        logits = []
        for text in input_ids.tolist():
            llama.reset()
            llama.eval(text)
            logits.append(torch.from_numpy(llama.scores[: len(text)].copy()))
        return torch.stack(logits).to(input_ids.device)


def import_llama_cpp() -> Any:
    """The package llama_cpp; `InputError` with the command that installs it where it is missing."""
    try:
        import llama_cpp
    except ImportError:
        raise InputError("Opening GGUF files in llama.cpp needs llama-cpp-python: pip install llama-cpp-python.") from None
    return llama_cpp
