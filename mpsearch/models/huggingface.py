"""Models of Hugging Face transformers, from a local folder or a GGUF file.

Nothing is downloaded, no code from the folder is run (`trust_remote_code` is never set), and pickled weights are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpsearch.errors import InputError, did_you_mean, one_line

# What `head` may be, and the class of transformers that loads it.
HEADS = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "image_classification": "AutoModelForImageClassification",
    "speech_seq2seq": "AutoModelForSpeechSeq2Seq",
    "none": "AutoModel",
}


def huggingface(path: str | Path, head: str | None = None) -> nn.Module:
    """The model in a folder of Hugging Face transformers, float32 and in eval mode.

    Parameters
    ----------
    path
        A folder with `config.json` and `.safetensors` files, or a GGUF file of an architecture that transformers reads.
    head
        Which of several models a folder can be loaded as: one of `HEADS` ("none": the network without a head). By default the
        class that `architectures` in `config.json` names; of a GGUF file "causal_lm".

    Raises
    ------
    InputError
        The folder is absent or incomplete, holds pickled weights only, needs code of its own, or transformers cannot load it.
    """
    folder = Path(path).expanduser()
    if head is not None and head not in HEADS:
        raise InputError(f"model.head must be one of {', '.join(HEADS)}; got '{head}'.{did_you_mean(head, list(HEADS))}")
    transformers = import_transformers("model=hf")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "dtype": torch.float32}
    if folder.suffix == ".gguf":
        if not folder.is_file():
            raise InputError(f"There is no GGUF file {folder}.")
        loader = getattr(transformers, HEADS[head or "causal_lm"])
        model: Any = _loaded(loader, folder.parent, gguf_file=folder.name, **options)
        model.name_or_path = str(folder)  # the file, which an exporter reads again, and not the folder that it is in
        return model
    check_folder(folder)
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(file.name for file in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        weights = f"only pickled weights ({pickles[0]}), which could run code" if pickles else "no weights"
        raise InputError(
            f"{folder} has {weights}; expected .safetensors files. Save the model again where you trust it: "
            f"model.save_pretrained({str(folder)!r})."
        )
    return _loaded(_class(transformers, folder, head), folder, use_safetensors=True, **options)


def import_transformers(what: str) -> Any:
    """The package transformers; `InputError`, which names `what` needs it, where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise InputError(f"{what} needs the package transformers: pip install 'mpsearch[hf]'.") from None
    return transformers


def check_folder(folder: Path) -> None:
    """Raise `InputError` where a folder or its `config.json` is absent."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}. Give the folder of a model that was saved with save_pretrained.")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json, so it is no model of transformers. Give the folder that holds it.")


def _class(transformers: Any, folder: Path, head: str | None) -> Any:
    """The class that loads a folder: by `head`, or as its `config.json` says."""
    if head is not None:
        return getattr(transformers, HEADS[head])
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = config.get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} is not a configuration in JSON ({one_line(error)}).") from None
    model_class = getattr(transformers, str(names[0]), None) if names else None
    if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
        return model_class
    known = f"names {names[0]}, which transformers {transformers.__version__} does not have" if names else "names no architecture"
    raise InputError(f"{folder / 'config.json'} {known}. Give model.head: one of {', '.join(HEADS)}.")


def _loaded(loader: Any, folder: Path, **options: Any) -> nn.Module:
    """`loader.from_pretrained`, without its progress bar; what it raises is an `InputError`."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, about = loader.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # a damaged file, an architecture of the folder's own code: anything may be raised
        raise InputError(f"transformers cannot load {folder}: {one_line(error)}") from error
    finally:
        if was_shown:
            logging.enable_progress_bar()
    if missing := sorted(about["missing_keys"]):
        raise InputError(
            f"{folder} lacks {len(missing)} tensors of {type(model).__name__}, which would be random: {missing[0]}, … Give "
            f"model.head for the model that the file holds: one of {', '.join(HEADS)}."
        )
    model.config.use_cache = False  # keys and values of earlier calls
    module: nn.Module = model.eval()
    return module
