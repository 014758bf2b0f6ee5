"""Train a small Llama on English text, in pieces that resume: a real language model whose rows are multiples of 256.

    python scripts/train_llama.py TEXTS FOLDER --seconds 840      # again until it says that it is done

`TEXTS` is a folder with `.rst` and `.txt` files, also compressed by gzip, such as Debian's packages linux-doc, python3-doc and
python-pandas-doc unpacked by `dpkg -x`. `FOLDER` gets a model of Hugging Face transformers with its tokenizer, `held_out.txt`
(one file in `HELD_OUT`, by the digest of its content, so that no text is in both), and `training.csv` with the held-out loss.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import math
import time
from pathlib import Path

import numpy as np
import torch

from mpsearch.files import write_atomically

VOCABULARY, WINDOW, BATCH, STEPS = 4096, 256, 16, 500
RATE = 3e-3
HELD_OUT = 50  # one file in so many
WARM_UP = 20
SPECIAL = ["<unk>", "<s>", "</s>"]


def texts(folder: Path) -> tuple[list[str], list[str]]:
    """Training and held-out texts, without repeated files and without translations."""
    seen: set[str] = set()
    split: tuple[list[str], list[str]] = ([], [])
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".rst", ".txt", ".gz") and path.is_file()):
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest in seen or "translations" in str(file) or not {".rst", ".txt"} & set(file.suffixes):
            continue
        seen.add(digest)
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        if sum(ord(letter) > 127 for letter in text) < len(text) / 100:
            split[int(digest, 16) % HELD_OUT == 0].append(text)
    return split


def prepare(source: Path, folder: Path) -> None:
    """The tokenizer, and the tokens of both parts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    training, held_out = texts(source)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(training, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    saved.save_pretrained(folder)
    for name, part in (("training", training), ("held_out", held_out)):
        tokens = np.concatenate([np.array(encoding.ids, np.uint16) for encoding in tokenizer.encode_batch(part)])
        np.save(folder / f"{name}.npy", tokens)
        print(f"{name}: {len(part):,} texts, {sum(map(len, part)):,} characters, {len(tokens):,} tokens", flush=True)
    (folder / "held_out.txt").write_text("\n\n".join(held_out), encoding="utf-8")


def network() -> torch.nn.Module:
    """An untrained Llama of 4.2 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=True, **sizes, **heads, **ids)
    return LlamaForCausalLM(config)


def windows(tokens: np.ndarray, starts: np.ndarray) -> torch.Tensor:
    """int64 `[len(starts), WINDOW + 1]`."""
    return torch.from_numpy(np.stack([tokens[start : start + WINDOW + 1] for start in starts]).astype(np.int64))


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats; products are in bfloat16 where the processor has them, which else takes ten times as long."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.cpu.get_capabilities().get("avx512_bf16", False)):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokens: np.ndarray) -> float:
    """Mean over 128 windows, evenly spread."""
    starts = np.linspace(0, len(tokens) - WINDOW - 1, 128).astype(int)
    return float(torch.stack([loss_of(model, windows(tokens, part)) for part in np.array_split(starts, 8)]).mean())


def rate(step: int) -> float:
    """Of the full learning rate: a linear warm-up, then a cosine to zero."""
    return min(1.0, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=840)
    arguments = parser.parse_args()
    folder, end = arguments.folder, time.monotonic() + arguments.seconds
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "held_out.txt").is_file():
        prepare(arguments.texts, folder)
    training, held_out = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("training", "held_out"))
    model, checkpoint, first = network(), folder / "checkpoint.pt", 0
    # Muon takes fewer steps, but computes in bfloat16, which takes most of the time where the processor has no products of it.
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started = time.monotonic()
    for step in range(first, STEPS + 1):
        if step == STEPS or time.monotonic() > end:
            break
        starts = np.random.default_rng(step).integers(0, len(training) - WINDOW - 1, BATCH)
        loss = loss_of(model, windows(training, starts))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * rate(step + 1)
        optimizer.step()
        if step % 20 == 0:
            seconds = (time.monotonic() - started) / (step - first + 1)
            print(f"step {step}: training loss {float(loss.detach()):.4f}, {seconds:.2f} s a step", flush=True)
    unfinished = checkpoint.with_suffix(".new")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, unfinished)
    unfinished.replace(checkpoint)
    model.eval()
    nats = held_out_loss(model, held_out)
    rows = (folder / "training.csv").read_text() if (folder / "training.csv").is_file() else "step,held_out_nats\n"
    write_atomically(folder / "training.csv", f"{rows}{step},{nats:.4f}\n")
    model.save_pretrained(folder)
    print(f"step {step} of {STEPS}: held-out loss {nats:.4f} nats; {'done' if step == STEPS else 'not done'}", flush=True)


if __name__ == "__main__":
    main()
