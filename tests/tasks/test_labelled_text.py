"""Tables of texts with classes, and of pairs of texts with scores, on tiny encoders of transformers."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import mpsearch
from mpsearch.errors import InputError
from mpsearch.models.huggingface import huggingface
from mpsearch.tasks.base import SPLITS
from mpsearch.tasks.text_classification import TextClassification
from mpsearch.tasks.text_pairs import TextPairs
from tests.models.families import tiny

transformers = pytest.importorskip("transformers")
byte_tokenizer = pytest.importorskip("tests.models.byte_tokenizer")
N = 36


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a BERT of two classes, "bad" and "good"."""
    folder = tmp_path_factory.mktemp("encoder")
    model = tiny(transformers, "bert")
    model.config.id2label, model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    model.save_pretrained(folder)
    byte_tokenizer.save_byte_tokenizer(transformers, folder)
    return folder


@pytest.fixture
def reviews(tmp_path):
    table = pd.DataFrame({"text": [f"{i} " + "word " * (1 + i % 7) for i in range(N)], "label": ["bad", "good"] * (N // 2)})
    table.to_csv(tmp_path / "reviews.csv", index=False)
    return tmp_path / "reviews.csv"


@pytest.fixture
def pairs(tmp_path):
    rows = [{"sentence1": f"{i}" + "a" * (1 + i % 9), "sentence2": f"{i}" + "b" * (1 + i % 4), "score": i % 5} for i in range(N)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "pairs.jsonl"


def test_classes_are_numbered_by_the_model(encoder, reviews):
    task = TextClassification(reviews, encoder, batch_size=5, max_length=16)
    assert task.quality_name == "accuracy"
    n = {split: sum(len(targets) for _, targets in task.batches(split)) for split in SPLITS}
    assert n == dict.fromkeys(SPLITS, N // 3)
    inputs, targets = task.batches("search")[-1]
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert inputs["input_ids"].shape[1] <= 16
    assert set(targets.tolist()) <= {0, 1}
    first, _ = task.batches("search")[0]
    assert first["input_ids"].shape[1] <= inputs["input_ids"].shape[1], "short texts first, so that little is padded"
    table = pd.read_csv(reviews)
    table["label"] = (table["label"] == "good").astype(int)
    table.to_csv(reviews, index=False)
    same = TextClassification(reviews, encoder, batch_size=5, max_length=16)
    assert same.fingerprint() == task.fingerprint(), "integers and names of the same classes"


def test_a_split_has_a_table_of_its_own(encoder, reviews, pairs, tmp_path):
    others = tmp_path / "others.csv"
    pd.read_csv(reviews).head(8).to_csv(others, index=False)
    task = TextClassification(reviews, encoder, confirm_data="others.csv")
    n = {split: sum(len(targets) for _, targets in task.batches(split)) for split in SPLITS}
    assert n == {"calibration": N // 2, "search": N // 2, "confirm": 8}
    (tmp_path / "more.jsonl").write_text("\n".join(pairs.read_text().splitlines()[:12]))
    task = TextPairs(pairs, encoder, batch_size=4, confirm_data=tmp_path / "more.jsonl")
    n = {split: sum(len(scores) for _, scores in task.batches(split)) for split in SPLITS}
    assert n == {"calibration": 16, "search": 16, "confirm": 12}
    assert task.describe("confirm") == "12 samples, more.jsonl"
    with pytest.raises(InputError, match=r"There is no data file for the search split: .* Set task.search_data to a file"):
        TextPairs(pairs, encoder, search_data="nowhere.csv")


def test_padding_does_not_change_a_text(encoder, reviews):
    model, task = huggingface(encoder), TextClassification(reviews, encoder, batch_size=12)
    inputs, _ = task.batches("confirm")[0]
    with torch.no_grad():
        together = task.forward(model, inputs)
        for i, mask in enumerate(inputs["attention_mask"]):
            alone = {name: tensor[i : i + 1, : int(mask.sum())] for name, tensor in inputs.items()}
            assert torch.allclose(task.forward(model, alone)[0], together[i], atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*not positive definite")  # a dozen short texts
@pytest.mark.slow
def test_searches_of_encoders(encoder, reviews, pairs):
    options = {"schemes": ["w2", "w8"], "quantizer": "gptq", "n_trials": 4, "n_seeds": 2, "confirm_points": 2}
    result = mpsearch.search(huggingface(encoder), TextClassification(reviews, encoder), **options)
    assert all(e.verified for e in result.run.on("confirm").values())
    result = mpsearch.search(huggingface(encoder, "none"), TextPairs(pairs, encoder, batch_size=4), **options)
    assert result.run.quality_name == "spearman"
    assert all(e.verified for e in result.run.on("confirm").values())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_pair_is_compared_by_its_embeddings(encoder, pairs, pooling):
    model, task = huggingface(encoder, "none"), TextPairs(pairs, encoder, batch_size=4, pooling=pooling)
    (first, second), scores = task.batches("search")[0]
    with torch.no_grad():
        logits = task.forward(model, (first, second))
        hidden = [model(**{k: v[:1] for k, v in part.items()}).last_hidden_state[0] for part in (first, second)]
    ends = [int(part["attention_mask"][0].sum()) for part in (first, second)]
    a, b = (h[0] if pooling == "cls" else h[:end].mean(0) for h, end in zip(hidden, ends, strict=True))
    assert logits.shape == (4, 4)
    assert float(logits[0, 0]) == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)) / 0.05, rel=1e-4)
    assert scores.min() >= 0
    assert scores.max() <= 5


def test_what_cannot_be_used_is_one_sentence(encoder, reviews, pairs, tmp_path):
    def refused(sentence, make, *args, **options):
        with pytest.raises(InputError, match=sentence):
            make(*args, encoder, **options)

    refused("There is no file .*nowhere.csv. Set task.path to a table with", TextClassification, tmp_path / "nowhere.csv")
    refused("has no column 'body'; it has text, label. Set task.text", TextClassification, reviews, text="body")
    table = pd.read_csv(reviews)
    table.assign(label="god").to_csv(tmp_path / "other.csv", index=False)
    refused("the label 'god', which label2id of .* lacks; it has bad, good. Did you", TextClassification, tmp_path / "other.csv")
    table.assign(text=np.where(table.index < 2, "", table.text)).to_csv(tmp_path / "empty.csv", index=False)
    refused("2 of 36 rows of .* have an empty cell", TextClassification, tmp_path / "empty.csv")
    (tmp_path / "bad.csv").write_text('a,b\n"1,2\n')
    refused("bad.csv cannot be read as a table", TextClassification, tmp_path / "bad.csv")
    refused("n_calibration is 0 of 36 pairs; it must be a multiple of batch_size, 32", TextPairs, pairs)
    refused("task.pooling must be one of mean, cls; got 'max'", TextPairs, pairs, pooling="max")
    refused("column 'sentence1' of .* must hold numbers that differ", TextPairs, pairs, score="sentence1", batch_size=4)
    task = TextPairs(pairs, encoder, batch_size=4)
    with pytest.raises(InputError, match="needs a model that returns last_hidden_state; got a SequenceClassifierOutput"):
        task.forward(huggingface(encoder), task.batches("search")[0][0])
