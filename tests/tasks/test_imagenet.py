"""Pictures from JPEG files that lie end to end in one file."""

import io
import sys

import numpy as np
import pytest
import torch

from mpsearch.errors import InputError
from mpsearch.tasks.imagenet import ImageNetSample

Image = pytest.importorskip("PIL.Image")


def save(folder, n=30, **changes):
    """`n` pictures of one colour each, which is three times their number."""
    files = []
    for i in range(n):
        stream = io.BytesIO()
        Image.fromarray(np.full((16, 16, 3), 3 * i, np.uint8)).save(stream, "JPEG", quality=95, subsampling=0)
        files.append(np.frombuffer(stream.getvalue(), np.uint8))
    arrays = {
        "jpeg": np.concatenate(files),
        "offsets": np.cumsum([0, *map(len, files)]),
        "label": 2 * np.arange(n, dtype=np.int16),
    }
    np.savez(folder / "images_even.npz", **(arrays | changes))


def test_pictures_are_decoded_and_scaled(tmp_path):
    save(tmp_path)
    task = ImageNetSample(tmp_path, 10, 5, batch_size=4)
    assert task.describe("confirm") == "15 samples, ImageNet, one picture a class"
    assert task.n_classes == 1000
    for split in ("calibration", "search", "confirm"):
        for x, y in task.batches(split):
            assert x.shape[1:] == (3, 16, 16)
            colour = (x * 128 + 127).mean((1, 2, 3))
            torch.testing.assert_close(colour, 1.5 * y.float(), rtol=0, atol=1.5)


def test_files_that_are_none_are_sentences(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no data file .*images_even\.npz"):
        ImageNetSample(tmp_path)
    save(tmp_path, offsets=np.arange(20))
    with pytest.raises(InputError, match="holds no JPEG files end to end"):
        ImageNetSample(tmp_path, 1, 1)
    save(tmp_path, jpeg=np.zeros(10**5, np.uint8))
    with pytest.raises(InputError, match=r"picture \d+ of .*images_even\.npz is no whole JPEG file"):
        ImageNetSample(tmp_path, 1, 1)
    save(tmp_path)
    with pytest.raises(InputError, match="holds 30 samples"):
        ImageNetSample(tmp_path, 20, 20, 1)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"Pillow, which is not installed here\. Run: pip install pillow"):
        ImageNetSample(tmp_path, 1, 1)
