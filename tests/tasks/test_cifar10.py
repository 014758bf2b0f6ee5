"""CIFAR-10 from archives and from the distributed pickles, of which nothing is run that does more than make arrays."""

import os
import pickle
import struct

import numpy as np
import pytest
import torch

from mpsearch.errors import InputError
from mpsearch.tasks.cifar10 import MEAN, STD, Cifar10, _augmented, read_batch


def images(n, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), generator.integers(0, 10, n)


def rows(x):
    """Images as the distributed batches hold them: uint8 [n, 3072], red then green then blue."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2).reshape(len(x), -1))


def python2_batch(x, y):
    """The bytes that Python 2 and numpy 1 wrote: protocol 2, keys as byte strings, arrays by `numpy.core.multiarray`."""

    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    data = rows(x)
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R("
    array += b"K\x01" + b"J" + struct.pack("<i", data.shape[0]) + b"J" + struct.pack("<i", data.shape[1]) + b"\x86"
    array += (
        b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    )
    array += b"\x89" + text(data.tobytes()) + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in y.tolist()) + b"e"
    pairs = [(b"batch_label", text(b"training batch 1 of 5")), (b"labels", labels), (b"data", array)]
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in pairs) + b"u."


def test_distributed_batches_are_read(tmp_path):
    x, y = images(6)
    path = tmp_path / "data_batch_1"
    texts = [
        python2_batch(x, y),
        pickle.dumps({"data": rows(x), "labels": y.tolist()}, protocol=4),
        pickle.dumps({b"data": rows(x), b"labels": y.tolist()}, protocol=4),
    ]
    for text in texts:
        path.write_bytes(text)
        read_x, read_y = read_batch(path)
        assert np.array_equal(read_x, x)
        assert np.array_equal(read_y, y)
        assert (read_x.dtype, read_y.dtype) == (np.uint8, np.int64)


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-py"])
def test_both_forms_give_the_same_task(tmp_path, folder):
    archives, batches = tmp_path / "archives", tmp_path / "batches"
    archives.mkdir()
    (batches / folder).mkdir(parents=True)
    for i in range(1, 6):
        x, y = images(8, seed=i)
        np.savez(archives / f"train_{i}.npz", x=x, y=y.astype(np.uint8))
        (batches / folder / f"data_batch_{i}").write_bytes(python2_batch(x, y))
    x, y = images(10, seed=9)
    np.savez(archives / "test_0.npz", x=x, y=y)
    (batches / folder / "test_batch").write_bytes(python2_batch(x, y))

    sizes = {"n_calibration": 15, "n_search": 25}
    one, other = Cifar10(archives, **sizes), Cifar10(str(batches), **sizes)
    assert one.fingerprint() == other.fingerprint()
    assert [one.describe(split) for split in ("search", "confirm")] == ["25 samples, CIFAR-10 train", "10 samples, CIFAR-10 test"]
    confirmed, labels = one.batches("confirm")[0]
    expected = (torch.from_numpy(x).double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(confirmed, expected.permute(0, 3, 1, 2).float())
    assert labels.tolist() == y.tolist()
    fewer = Cifar10(archives, **sizes, n_confirm=3).batches("confirm")[0]
    assert torch.equal(fewer[0], confirmed[:3])
    with pytest.raises(
        InputError, match=r"holds 40 samples, 41 were asked for \(n_calibration=15, n_search=26\). Ask for 1 fewer"
    ):
        Cifar10(archives, n_calibration=15, n_search=26)
    for n, message in ((0, "at least 1; got n_confirm=0, of 10"), (11, "holds 10 samples, 11 were asked for")):
        with pytest.raises(InputError, match=message):
            Cifar10(archives, **sizes, n_confirm=n)


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, getattr, print, np.load, np.fromfile])
def test_a_malicious_batch_is_refused_and_not_run(tmp_path, function):
    path, mark = tmp_path / "data_batch_1", tmp_path / "it ran"
    path.write_bytes(pickle.dumps({"data": Malicious(function, f"touch '{mark}'")}, protocol=4))
    with pytest.raises(InputError, match=r"data_batch_1 is not a CIFAR-10 batch: it asks for '.*', .* it was not run"):
        read_batch(path)
    assert not mark.exists()


def test_damaged_batches_are_sentences(tmp_path):
    path = tmp_path / "data_batch_1"
    x, y = images(3)
    whole = python2_batch(x, y)
    for damaged in (
        b"",
        b"garbage",
        whole[: len(whole) // 2],
        pickle.dumps([1, 2]),
        pickle.dumps({"data": rows(x)}, protocol=4),
        pickle.dumps({"data": rows(x)[:, :7], "labels": y.tolist()}, protocol=4),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"data_batch_1 is not a whole CIFAR-10 batch \(\w+: "):
            read_batch(path)


def test_folders_without_cifar10_say_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"There is no folder .*nowhere to read CIFAR-10 from. Set task\.data_dir"):
        Cifar10(tmp_path / "nowhere")
    np.savez(tmp_path / "train_0.npz", x=images(3)[0], y=images(3)[1])
    with pytest.raises(InputError, match=r"looked for train_\*\.npz and test_\*\.npz, for data_batch_1 to 5"):
        Cifar10(tmp_path)
    np.savez(tmp_path / "test_0.npz", x=images(3)[0].astype(np.float32), y=images(3)[1])
    with pytest.raises(InputError, match=r"test_0.npz holds x float32 \[3, 32, 32, 3\] and 3 labels; CIFAR-10 is uint8"):
        Cifar10(tmp_path, n_calibration=1, n_search=1)
    (tmp_path / "test_0.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"test_0\.npz is not a whole \.npz file"):
        Cifar10(tmp_path, n_calibration=1, n_search=1)


def test_training_images_are_all_but_those_of_the_search_split(tmp_path):
    x, y = images(60)
    x[:, 8:24, 8:24] = np.arange(60)[:, None, None, None] * 4  # so that each tells which it is, however it is moved
    np.savez(tmp_path / "train_0.npz", x=x, y=y)
    np.savez(tmp_path / "test_0.npz", x=x, y=y)
    task = Cifar10(tmp_path, n_calibration=10, n_search=20)

    def marks(batches):
        pixels = [batch[:, 0, 16, 16] * STD[0] + MEAN[0] for batch, _ in batches]
        return [round(float(value) * 255 / 4) for value in torch.cat(pixels)]

    first = list(task.training(1, 16, seed=0))
    seen, searched = marks(first), marks(task.batches("search"))
    assert sorted(seen + searched) == list(range(60))
    assert [len(labels) for _, labels in first] == [16, 16, 8]
    assert torch.cat([labels for _, labels in first]).tolist() == y[seen].tolist()
    again, second = list(task.training(1, 16, seed=0)), marks(task.training(2, 16, seed=0))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert sorted(second) == sorted(seen)
    assert second != seen


def test_training_images_are_moved_by_up_to_four_pixels_and_mirrored():
    pixels = np.zeros((400, 32, 32, 3), np.uint8)
    pixels[:, 15, 12] = 255
    moved = _augmented(pixels, np.random.default_rng(0))
    assert (moved.shape, moved.dtype) == (pixels.shape, np.uint8)
    rows, columns = np.nonzero(moved[..., 0])[1:]
    assert set(rows) == set(range(11, 20))
    assert set(columns) == {*range(8, 17), *range(15, 24)}
