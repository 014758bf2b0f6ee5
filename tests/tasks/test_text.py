"""The user's own text: where texts begin and end, which split they are in, and what is said of files that cannot be read."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from mpsearch.errors import InputError
from mpsearch.tasks.base import SPLITS
from mpsearch.tasks.text import Text, read_texts

transformers = pytest.importorskip("transformers")
byte_tokenizer = pytest.importorskip("tests.models.byte_tokenizer")
SIZES = {"n_calibration": 3, "n_search": 3, "n_confirm": 3, "window": 16}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer of bytes, `<s>` before each text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer.save_byte_tokenizer(transformers, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def texts(n=20):
    return [f"Text {i} of several. " * 4 for i in range(n)]


def ids(task):
    return {split: np.concatenate([batch[0].flatten().numpy() for batch in task.batches(split)]) for split in SPLITS}


def written(folder, kind):
    """`texts()` in a file or folder of a kind."""
    path = folder / f"data.{kind}"
    if kind == "folder":
        path.mkdir()
        for i, text in enumerate(texts()):
            (path / f"{i:02d}.{'md' if i % 2 else 'txt'}").write_text(text)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(texts())) + "\n\n")
    elif kind == "parquet":
        pytest.importorskip("pyarrow")
        pd.DataFrame({"text": texts()}).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet"])
def test_each_record_is_a_text(tmp_path, tokenizer, kind):
    path = written(tmp_path, kind)
    assert list(read_texts(path)) == texts()
    task = Text(path, tokenizer, **SIZES)
    of_split = ids(task)
    assert all(len(tokens) == 3 * 16 for tokens in of_split.values())
    assert all(tokens[0] == 1 for tokens in of_split.values()), "every text begins with <s>"
    assert task.batches("search")[0][1].tolist()[:15] == of_split["search"][1:16].tolist(), "targets follow their tokens"
    assert task.describe("confirm") == f"3 windows of 16 tokens from 1 of {path.name}"


def test_a_single_file_is_cut_between_paragraphs(tmp_path, tokenizer):
    path = tmp_path / "my.txt"
    path.write_text("\n\n".join(texts(40)))
    task = Text(path, tokenizer, **{**SIZES, "n_calibration": 8})
    decode = transformers.AutoTokenizer.from_pretrained(tokenizer).decode
    decoded = {split: decode(tokens) for split, tokens in ids(task).items()}
    numbers = {split: set(re.findall(r"Text (\d+) of", text)) for split, text in decoded.items()}
    assert all(numbers.values())
    assert not numbers["search"] & numbers["confirm"]
    assert not numbers["calibration"] & (numbers["search"] | numbers["confirm"])
    assert "<s>" not in decoded["search"], "a paragraph is no text of its own"
    same = Text(path, tokenizer, **{**SIZES, "n_calibration": 8})
    other = Text(path, tokenizer, **{**SIZES, "n_calibration": 8}, seed=1)
    assert same.fingerprint() == task.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("separator", ["\n", " "])
def test_a_single_paragraph_is_cut_at_lines_or_at_tokens(tmp_path, tokenizer, separator):
    path = tmp_path / "my.txt"
    path.write_text(separator.join(texts(40)))
    task = Text(path, tokenizer, **SIZES)
    of_split = ids(task)
    assert all(len(tokens) == 3 * 16 for tokens in of_split.values())
    whole = transformers.AutoTokenizer.from_pretrained(tokenizer)(path.read_text(), add_special_tokens=False)["input_ids"]
    windows = {bytes(tokens[:16].astype(np.uint16)) for tokens in of_split.values()}
    assert len(windows) == 3, "the splits differ"
    assert windows <= {bytes(np.array(whole[i : i + 16], np.uint16)) for i in range(len(whole))}, "tokens keep their order"


def test_the_longest_of_a_few_texts_is_cut(tmp_path, tokenizer):
    for name, part in (("a", texts(40)[:2]), ("b", texts(40)[2:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part))
    task = Text(tmp_path, tokenizer, **SIZES)
    assert all(len(tokens) == 3 * 16 for tokens in ids(task).values())


def test_what_cannot_be_read_is_one_sentence(tmp_path, tokenizer):
    def refused(sentence, path, folder=tokenizer, **options):
        with pytest.raises(InputError, match=sentence):
            Text(path, folder, **{**SIZES, **options})

    refused("There is no text .*nowhere.txt. Set task.path", tmp_path / "nowhere.txt")
    (tmp_path / "empty").mkdir()
    refused(r"holds no file that ends in .txt, .md, .jsonl, .csv, .tsv, .parquet", tmp_path / "empty")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    refused("windows of 16 tokens left for the calibration split", short)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("déjà vu".encode("latin-1"))
    refused("is not UTF-8 text: byte 1 is 0xe9", latin)
    lines = written(tmp_path, "jsonl")
    refused("data.jsonl has no column 'body'; it has text, id. Set task.field", lines, field="body")
    lines.write_text('{"text": "a"}\n{"text": \n')
    refused("Line 2 of .*data.jsonl is not JSON", lines)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    refused("bad.parquet (cannot be read as parquet|is read by the package pyarrow)", tmp_path / "bad.parquet")
    path = written(tmp_path, "folder")
    refused("There is no folder", path, tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused(r"has no tokenizer \(tokenizer.json\). .* set task.tokenizer to the folder that has it", path, tmp_path)


def test_each_split_is_dealt_out_of_the_file_that_is_named_for_it(tmp_path, tokenizer):
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name} {text}"}) for text in texts()))
    task = Text(tmp_path / "train.jsonl", tokenizer, **SIZES, search_data="val.jsonl", confirm_data=tmp_path / "val.jsonl")
    decode = transformers.AutoTokenizer.from_pretrained(tokenizer).decode
    first = {split: decode(tokens[1:5].tolist()) for split, tokens in ids(task).items()}
    assert first == {"calibration": "trai", "search": "val ", "confirm": "val "}
    assert ids(task)["search"].tolist() != ids(task)["confirm"].tolist()
    with pytest.raises(InputError, match="no data file for the search split"):
        Text(tmp_path / "train.jsonl", tokenizer, **SIZES, search_data="none.jsonl")
