"""A GGUF file in llama.cpp (package llama-cpp-python), as a PyTorch module."""

from __future__ import annotations

import logging
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.errors import InputError


class LlamaCppModel(nn.Module):
    """Token ids int64 `[n, length]` -> logits float32 `[n, length, vocabulary]` of the token that follows each, on the CPU.

    Parameters
    ----------
    path
        The GGUF file.

    Raises
    ------
    InputError
        llama-cpp-python is not installed, or llama.cpp does not load the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self._library = path, import_llama_cpp().llama_cpp
        options = self._library.llama_model_default_params()
        options.n_gpu_layers = 0
        options.use_extra_bufts = not has_amx()
        self._model = self._library.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise InputError(f"llama.cpp does not load {path}. Export it again, or try another version of llama-cpp-python.")
        self._context: Any = None
        self._length = 0
        weakref.finalize(self, self._library.llama_model_free, self._model)

    def __deepcopy__(self, memo: object) -> LlamaCppModel:
        return LlamaCppModel(self.path)

    def _context_of(self, length: int) -> Any:
        """A context for texts of `length` tokens; kept, and made again for longer ones."""
        if length > self._length:
            options = self._library.llama_context_default_params()
            options.n_ctx = options.n_batch = options.n_ubatch = length
            options.n_threads = options.n_threads_batch = torch.get_num_threads()
            context = self._library.llama_init_from_model(self._model, options)
            if not context:
                raise InputError(f"llama.cpp has no memory for {length:,} tokens of {self.path}. Use a shorter task.window.")
            weakref.finalize(self, self._library.llama_free, context)
            self._context, self._length = context, length
        return self._context

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits; `InputError` for padded texts."""
        if attention_mask is not None and not attention_mask.all():
            raise InputError("llama.cpp runs texts of one length here; got an attention mask with zeros. Leave out the padding.")
        context = self._context_of(input_ids.shape[1])
        return torch.stack([self._logits(context, text) for text in input_ids.tolist()]).to(input_ids.device)

    def _logits(self, context: Any, text: list[int]) -> Tensor:
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(context), True)
        batch = library.llama_batch_init(len(text), 0, 1)
        try:
            batch.n_tokens = len(text)
            for i, token in enumerate(text):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
                batch.seq_id[i][0] = 0
            if code := library.llama_decode(context, batch):
                raise InputError(f"llama.cpp cannot run {self.path} on {len(text):,} tokens (llama_decode returned {code}).")
        finally:
            library.llama_batch_free(batch)
        vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        logits = np.ctypeslib.as_array(library.llama_get_logits(context), shape=(len(text), vocabulary))
        return torch.from_numpy(logits.copy())


def has_amx() -> bool:
    """Whether the processor has AMX.

    llama.cpp's kernels for it, which run repacked weights, crash in version 0.3.36 of the package (Q4_0 and Q8_0 in batches; see
    also ggml-org/llama.cpp issue 20824), and with them the process.
    """
    with suppress(OSError):
        return "amx_tile" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return False


def import_llama_cpp() -> Any:
    """The package llama_cpp, silent; `InputError` with the command that installs it where it is missing."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError):  # or its library is missing, or built for another processor
        raise InputError("Opening GGUF files in llama.cpp needs llama-cpp-python: pip install llama-cpp-python.") from None
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    return llama_cpp
