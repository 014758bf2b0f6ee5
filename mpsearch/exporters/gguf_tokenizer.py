"""The tokenizer of a Hugging Face folder in the keys `tokenizer.*` of a GGUF file.

From `tokenizer.json`, by llama.cpp's converter (`conversion/base.py`) and its vocabulary (`src/llama-vocab.cpp`). Byte-pair
encodings of bytes are its "gpt2", with a name for how text is split first; those with byte fallback, which stem from
SentencePiece, are its "llama", whose scores give the order of the merges. No architecture that is written has unigram models.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mpsearch.errors import InputError, one_line
from mpsearch.exporters.gguf_architecture import import_gguf

# The splits of text before the merges -> the name that llama.cpp's vocabulary has for them.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",): "llama-bpe",
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",): "qwen2",
    (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_PATHS}",): "tekken",
    (rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_PATHS}",): "gpt-4o",
}
ADDED_SCORE = -1000.0
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused\d*>|<pad>|<mask>|<2mass>|\[@BOS@\]")


def add_tokenizer(writer: Any, folder: Path, vocabulary: int) -> None:
    """Write the tokenizer of the folder, padded to `vocabulary` tokens, to a `gguf.GGUFWriter`.

    Raises
    ------
    InputError
        The folder has no tokenizer.json, or its tokenizer has no form in llama.cpp.
    """
    gguf = import_gguf()
    about = _read(folder)
    model, added = about["model"], {token["id"]: token for token in about.get("added_tokens") or []}
    kind, pieces, scores = _pieces(about, folder)
    if len(pieces) > vocabulary or any(i >= vocabulary for i in added):
        raise InputError(
            f"{folder / 'tokenizer.json'} has {max(len(pieces), *added, 0):,} tokens or more, the model only {vocabulary:,}. "
            "Copy the tokenizer of this model."
        )
    tokens, types = [], []
    unknown = model.get("unk_token")
    for i in range(vocabulary):
        token, token_type = pieces.get(i), gguf.TokenType.NORMAL
        if i in added:
            token, is_special = added[i]["content"], added[i]["special"] or LOOKS_SPECIAL.fullmatch(added[i]["content"])
            token_type = gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED
            token = token if is_special else token.replace("\u2581", " ")
            scores[i] = ADDED_SCORE
        if token is None:
            token, token_type = f"[PAD{i}]", gguf.TokenType.UNUSED
        elif kind == "llama" and token == unknown:
            token_type = gguf.TokenType.UNKNOWN
        elif kind == "llama" and BYTE.fullmatch(token):
            token_type = gguf.TokenType.BYTE
        tokens.append(token)
        types.append(token_type)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(_split_name(about, folder) if kind == "gpt2" else "default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        writer.add_token_scores([scores.get(i, ADDED_SCORE) for i in range(vocabulary)])
        writer.add_add_space_prefix(_adds_space(about))
    special = gguf.SpecialVocab(folder, load_merges=kind == "gpt2", n_vocab=vocabulary)
    for name in ("bos", "eos"):  # llama.cpp adds them to texts of some vocabularies unless it is told not to
        special.add_special_token.setdefault(name, False)
    special.add_to_gguf(writer, quiet=True)


def check_tokenizer(folder: Path) -> None:
    """Raise `InputError` where `add_tokenizer` would, as far as the files tell."""
    about = _read(folder)
    kind, _, _ = _pieces(about, folder)
    if kind == "gpt2":
        _split_name(about, folder)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{folder} has no tokenizer.json, which exporter=gguf writes into the file. Save it there: "
            f"transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})."
        )
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        about["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a tokenizer in JSON ({one_line(error)}). Copy it again.") from None
    return about


def _pieces(about: dict[str, Any], folder: Path) -> tuple[str, dict[int, str], dict[int, float]]:
    """llama.cpp's name of the model, and the piece and score of each token."""
    model = about["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind != "BPE":
        raise InputError(f"{folder / 'tokenizer.json'} is a {kind} tokenizer; exporter=gguf writes BPE ones.")
    pieces = {i: piece for piece, i in model["vocab"].items()}
    if not model["merges"]:
        raise InputError(f"{folder / 'tokenizer.json'} has no merges, without which llama.cpp loads no BPE tokenizer.")
    if not model.get("byte_fallback"):
        return "gpt2", pieces, {}
    # SentencePiece merges what has the highest score. Merges are in that order, and every piece has one or more.
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    last = len(model["merges"])
    return "llama", pieces, {i: 0.0 if BYTE.fullmatch(piece) else -float(ranks.get(piece, last)) for i, piece in pieces.items()}


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, which may be a sequence."""
    if step is None:
        return []
    return [inner for part in step[key] for inner in _steps(part, key)] if step["type"] == "Sequence" else [step]


def _split_name(about: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name for how text is split before the merges."""
    splits = []
    for step in _steps(about.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Split":
            splits.append(step["pattern"].get("Regex", str(step["pattern"])))
        elif step["type"] == "Digits" and step.get("individual_digits"):
            splits.append("digits")
        elif step["type"] == "ByteLevel":
            splits.extend(["bytes"] if step.get("use_regex", True) else [])
        else:
            splits.append(step["type"])
    name = SPLITS.get(tuple(splits))
    if name is None:
        raise InputError(
            f"{folder / 'tokenizer.json'} splits text by {' then '.join(splits) or 'nothing'}; exporter=gguf knows llama.cpp's "
            f"{', '.join(SPLITS.values())}. Convert the model by llama.cpp's convert_hf_to_gguf.py, and search the GGUF file."
        )
    return name


def _adds_space(about: dict[str, Any]) -> bool:
    """Whether a text gets a space in front."""
    normalizers = _steps(about.get("normalizer"), "normalizers")
    spaces = [step for step in _steps(about.get("pre_tokenizer"), "pretokenizers") if step["type"] == "Metaspace"]
    always = any(step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True) for step in spaces)
    return always or any(step["type"] == "Prepend" for step in normalizers)
