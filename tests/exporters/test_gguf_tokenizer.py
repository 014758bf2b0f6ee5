"""Tokenizers in GGUF files: llama.cpp gives the tokens that transformers gives."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from mpsearch.errors import InputError
from mpsearch.exporters.gguf_source import read_gguf
from mpsearch.exporters.gguf_tokenizer import SPLITS, add_tokenizer, check_tokenizer

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
decoders, models, normalizers = tokenizers.decoders, tokenizers.models, tokenizers.normalizers
pre_tokenizers, processors, trainers = tokenizers.pre_tokenizers, tokenizers.processors, tokenizers.trainers

TEXTS = [
    "The quick brown fox doesn't jump over 1234567 lazy dogs, does it?",
    "  Two spaces,\ttabs\n\nand  lines \r\n end  ",
    "Grüße aus Köln: naïve café, 東京 and 🦙🦙!",
    "def add(a, b):\n    return a + b  # x_1 == 'y'\n",
    "WE'LL see; I'VE seen HTTPServer camelCase 3.14159",
]
VOCABULARY = 700
SPECIAL = ["<unk>", "<s>", "</s>"]
REGEX = {name: splits[0] for splits, name in SPLITS.items() if len(splits) == 1 and len(splits[0]) > 9}


def of_bytes(*steps):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)


def by_regex(name):
    split = pre_tokenizers.Split(tokenizers.Regex(REGEX[name]), "isolated")
    return of_bytes(split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


def with_byte_fallback():
    """As transformers converts the tokenizers of Llama 2 and Mistral from SentencePiece."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
    return tokenizer, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False, max_token_length=8)


MADE = {
    "gpt-2": lambda: of_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: of_bytes(pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    **{name: (lambda name=name: by_regex(name)) for name in REGEX},
    "byte fallback": with_byte_fallback,
}


def saved(folder, name, chat_template=None):
    tokenizer, trainer = MADE[name]()
    tokenizer.train_from_iterator(itertools.islice(itertools.cycle(TEXTS), 40), trainer)
    if name == "byte fallback":  # trained, the bytes are special tokens; SentencePiece's are not
        about = json.loads(tokenizer.to_str())
        about["added_tokens"] = [token for token in about["added_tokens"] if not token["content"].startswith("<0x")]
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(about))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=chat_template
    )
    fast.save_pretrained(folder)
    return fast


def written(folder):
    """A GGUF file that holds a Llama without layers and the tokenizer of the folder."""
    path = folder / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length, writer.add_head_count):
        add(32)
    writer.add_block_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    add_tokenizer(writer, folder, VOCABULARY)
    writer.add_tensor("token_embd.weight", np.zeros((VOCABULARY, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", MADE)
def test_llama_cpp_gives_the_same_tokens(tmp_path, name):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = saved(tmp_path, name)
    llama = llama_cpp.Llama(str(written(tmp_path)), vocab_only=True, verbose=False)
    for text in [*TEXTS, "A <think>special</think> one</s>"]:
        expected = tokenizer(text)["input_ids"]
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == expected, text
    llama.close()


def test_what_is_written(tmp_path):
    tokenizer = saved(tmp_path, "byte fallback", chat_template="{{ messages }}")
    fields = read_gguf(written(tmp_path)).fields
    value = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}
    assert (value["model"], value["bos_token_id"], value["eos_token_id"], value["unknown_token_id"]) == ("llama", 1, 2, 0)
    assert (value["add_bos_token"], value["add_space_prefix"]) == (True, True)
    assert value["tokenizer.chat_template"] == "{{ messages }}"
    types, tokens, scores = value["token_type"], value["tokens"], value["scores"]
    assert types[:4] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE]
    assert types[tokens.index("<think>")] == gguf.TokenType.USER_DEFINED
    assert (tokens[-1], types[-1]) == (f"[PAD{VOCABULARY - 1}]", gguf.TokenType.UNUSED)
    merges = [a + b for a, b in json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]]
    ranks = [scores[tokenizer.convert_tokens_to_ids(piece)] for piece in dict.fromkeys(merges)]
    assert ranks == sorted(ranks, reverse=True), "what is merged first has the highest score"


def test_other_tokenizers_are_refused(tmp_path):
    saved(tmp_path, "gpt-2")
    path = tmp_path / "tokenizer.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(InputError, match=r"splits text by Whitespace; exporter=gguf knows llama.cpp's gpt-2, smollm"):
        check_tokenizer(tmp_path)
    path.write_text(json.dumps({**about, "model": {"type": "WordLevel", "vocab": {}}}))
    with pytest.raises(InputError, match="is a WordLevel tokenizer; exporter=gguf writes BPE ones"):
        check_tokenizer(tmp_path)
    path.write_text(json.dumps(about))
    check_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"has 4\d\d tokens or more, the model only 100"):
        add_tokenizer(SimpleNamespace(), tmp_path, 100)
