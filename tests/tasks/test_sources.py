"""Splits from files that the user names: each from its own, several from one without a sample in two of them."""

import numpy as np
import pytest

from mpsearch.errors import InputError
from mpsearch.tasks.arrays import Arrays
from mpsearch.tasks.cifar10 import Cifar10
from mpsearch.tasks.imagenet import ImageNetSample
from mpsearch.tasks.language import Stories
from mpsearch.tasks.overlap import overlap
from mpsearch.tasks.sources import default_sizes
from mpsearch.tasks.stsb import STSBenchmark
from mpsearch.tasks.wikitext2 import WikiText2

SPLITS = ("calibration", "search", "confirm")


def arrays(file, n, seed, shape=(4,)):
    rng = np.random.default_rng(seed)
    np.savez(file, x=rng.normal(size=(n, *shape)).astype(np.float32), y=rng.integers(0, 3, n))


def images(file, n, seed):
    rng = np.random.default_rng(seed)
    np.savez(file, x=rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), y=rng.integers(0, 10, n).astype(np.uint8))


def stories(file, n, seed):
    rng = np.random.default_rng(seed)
    np.savez(file, tokens=np.concatenate([[1, *rng.integers(2, 500, 40)] for _ in range(n)]).astype(np.uint16))


def pairs(file, n, seed):
    a, b = np.random.default_rng(seed).integers(1, 900, (2, n, 6)).astype(np.uint16)
    np.savez(file, a=a, b=b, gold=np.linspace(0, 5, n, dtype=np.float32))


def lengths(task):
    return {split: overlap(task)["samples"][split] for split in SPLITS}


def shared(task):
    return sum(overlap(task)["shared"].values())


def samples(task, split):
    return np.concatenate([np.asarray(x) for x, _ in task.batches(split)])


def test_arrays_take_each_split_from_its_file(tmp_path):
    for seed, name in enumerate(("train", "val", "test")):
        arrays(tmp_path / f"{name}.npz", 30, seed)
    named = Arrays(tmp_path / "train.npz", search_data="val.npz", confirm_data=tmp_path / "test.npz", n_search=20)
    assert lengths(named) == {"calibration": 30, "search": 20, "confirm": 30}
    with np.load(tmp_path / "val.npz") as file:
        assert {row.tobytes() for row in samples(named, "search")} <= {row.tobytes() for row in file["x"]}
    assert named.describe("search") == "20 samples, val.npz"
    together = Arrays(tmp_path / "train.npz", search_data="val.npz", confirm_data="val.npz")
    assert lengths(together) == {"calibration": 30, "search": 15, "confirm": 15}
    assert shared(together) == 0
    same = Arrays(tmp_path / "train.npz", search_data="train.npz")
    assert same.fingerprint() == Arrays(tmp_path / "train.npz").fingerprint()


def test_cifar10_is_searched_on_test_images_that_do_not_confirm(tmp_path):
    images(tmp_path / "train_0.npz", 30, 0)
    images(tmp_path / "test_0.npz", 20, 1)
    task = Cifar10(tmp_path, n_calibration=10, n_search=8, search_data="test_0.npz")
    assert lengths(task) == {"calibration": 10, "search": 8, "confirm": 12}
    assert shared(task) == 0
    assert task.describe("search") == "8 samples, test_0.npz"
    assert sum(len(y) for _, y in task.training(0, 7, 0)) == 30
    assert sum(len(y) for _, y in Cifar10(tmp_path, n_calibration=10, n_search=8).training(0, 7, 0)) == 22
    images(tmp_path / "test_1.npz", 20, 2)
    apart = Cifar10(tmp_path, n_calibration=10, n_search=20, search_data="test_0.npz")
    with np.load(tmp_path / "test_1.npz") as file:
        assert np.concatenate([y for _, y in apart.batches("confirm")]).tolist() == file["y"].tolist()
    assert shared(apart) == 0
    with pytest.raises(InputError, match="holds 20 samples, 21 were asked for"):
        Cifar10(tmp_path, n_calibration=10, n_search=21, search_data="test_0.npz")


def test_stories_are_dealt_out_from_the_file_of_each_split(tmp_path):
    stories(tmp_path / "tokens_dev.npz", 20, 0)
    stories(tmp_path / "other.npz", 20, 1)
    sizes = {"n_calibration": 3, "n_search": 4, "window": 16, "batch_size": 2}
    task = Stories(tmp_path, **sizes, search_data="other.npz", confirm_data="other.npz")
    assert shared(task) == 0
    assert lengths(task)["search"] == 4
    with np.load(tmp_path / "other.npz") as file:
        text = " ".join(map(str, file["tokens"]))
    for split, within in (("calibration", False), ("search", True), ("confirm", True)):
        first = samples(task, split)[0]
        assert (" ".join(map(str, first[:8])) in text) is within
    assert "tokens_dev.npz and other.npz" in task.describe("search")


def test_pairs_come_from_the_file_of_each_split(tmp_path):
    pairs(tmp_path / "sts_train.npz", 60, 0)
    pairs(tmp_path / "sts_dev.npz", 32, 1)
    sizes = {"n_calibration": 20, "n_search": 10, "batch_size": 10}
    task = STSBenchmark(tmp_path, **sizes, search_data="sts_dev.npz")
    assert lengths(task) == {"calibration": 20, "search": 10, "confirm": 20}
    assert shared(task) == 0
    assert task.describe("search") == "10 samples, STS-B dev"


def test_pictures_come_from_the_file_of_each_split(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for seed, name in enumerate(("images_even", "other")):
        files = []
        for i in range(6):
            picture = image.fromarray(np.full((8, 8, 3), 100 * seed + 10 * i, dtype=np.uint8))
            picture.save(tmp_path / "one.jpg")
            files.append((tmp_path / "one.jpg").read_bytes())
        jpeg, offsets = np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)])
        np.savez(tmp_path / f"{name}.npz", jpeg=jpeg, offsets=offsets, label=np.arange(6))
    task = ImageNetSample(tmp_path, n_calibration=2, n_search=2, search_data="other.npz")
    assert lengths(task) == {"calibration": 2, "search": 2, "confirm": 4}
    assert samples(task, "search").mean() > samples(task, "confirm").mean()
    assert shared(task) == 0


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("task", "make", "own"),
    [
        (Arrays, arrays, ["data.npz"]),
        (Cifar10, images, ["train_0.npz", "test_0.npz"]),
        (Stories, stories, ["tokens_dev.npz"]),
        (STSBenchmark, pairs, ["sts_train.npz", "sts_dev.npz"]),
        (WikiText2, None, []),
        (ImageNetSample, None, []),
    ],
)
def test_an_absent_file_is_a_sentence(tmp_path, task, make, own, split):
    for seed, name in enumerate(own):
        make(tmp_path / name, 30, seed)
    where = tmp_path / "data.npz" if task is Arrays else tmp_path
    with pytest.raises(InputError, match=rf"no data file for the {split} split: looked for .*none\.npz.* Set task\.{split}_data"):
        task(where, **{f"{split}_data": "none.npz"})


def test_a_file_of_another_shape_is_a_sentence(tmp_path):
    arrays(tmp_path / "data.npz", 30, 0)
    arrays(tmp_path / "wide.npz", 30, 1, (5,))
    with pytest.raises(InputError, match=r"differ in shape: calibration \[4\], search \[5\], confirm \[4\]"):
        Arrays(tmp_path / "data.npz", search_data="wide.npz")
    images(tmp_path / "train_0.npz", 30, 0)
    images(tmp_path / "test_0.npz", 20, 1)
    with pytest.raises(InputError, match=r"wide.npz holds x float32 \[30, 5\].*CIFAR-10 is uint8"):
        Cifar10(tmp_path, n_calibration=2, n_search=2, search_data="wide.npz")


def test_default_sizes_are_useful_and_said(capsys):
    sources = {"calibration": "a", "search": "a", "confirm": "b"}
    assert default_sizes(sources, {"a": 10_000, "b": 5000}, (None, 100, None)) == {
        "calibration": 256,
        "search": 100,
        "confirm": 1024,
    }
    assert "256 samples calibrate, 100 score proposals and 1,024 confirm" in (said := " ".join(capsys.readouterr().err.split()))
    assert "±3.1 points, a drop more exactly; more: task.n_confirm=…" in said
    assert list(default_sizes(sources, {"a": 90, "b": 50}, (None,) * 3, multiple=20).values()) == [40, 40, 40]
