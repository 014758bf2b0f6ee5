"""Folders and tables of images: their classes, and what is done to the pixels."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from mpsearch.errors import InputError
from mpsearch.tasks.base import SPLITS
from mpsearch.tasks.image_folder import IMAGENET_MEAN, IMAGENET_STD, ImageFolder, Preprocessing

Image = pytest.importorskip("PIL.Image")
SIZES = {"n_calibration": 2, "n_search": 2, "n_confirm": 2, "size": 8}


@pytest.fixture
def folder(tmp_path):
    """Six pictures of two classes; the blue channel says which, the red one which picture."""
    for i in range(6):
        name = "blue" if i % 2 else "black"
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((12, 16, 3), np.uint8)
        pixels[..., 2], pixels[..., 0] = 255 * (i % 2), 40 * i
        Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "black" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def all_of(task):
    pairs = [batch for split in SPLITS for batch in task.batches(split)]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def test_a_folder_of_folders(folder):
    x, y = all_of(ImageFolder(folder, **SIZES))
    assert x.shape == (6, 3, 8, 8)
    assert sorted(y.tolist()) == [0] * 3 + [1] * 3
    blue = x[:, 2] * IMAGENET_STD[2] + IMAGENET_MEAN[2]
    assert torch.allclose(blue, y.float().view(-1, 1, 1).expand(-1, 8, 8), atol=1e-6)
    red = (x[:, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]).mean((1, 2)) * 255 / 40
    assert sorted(red.round().int().tolist()) == list(range(6)), "each picture is in one split"


def test_a_split_has_images_of_its_own(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "others")
    task = ImageFolder(folder, size=8, confirm_data=tmp_path / "others")
    n = {split: sum(len(y) for _, y in task.batches(split)) for split in SPLITS}
    assert n == {"calibration": 3, "search": 3, "confirm": 6}
    assert task.describe("confirm") == "6 samples, others"
    (tmp_path / "others" / "green").mkdir()
    with pytest.raises(InputError, match="must have folders of the same classes, which are numbered by name; 'green'"):
        ImageFolder(folder, size=8, confirm_data=tmp_path / "others")


def test_a_table_of_files(folder):
    rows = [{"image": f"{name}/{i}.png", "label": i % 2} for i in range(6) for name in [("blue" if i % 2 else "black")]]
    pd.DataFrame(rows).to_csv(folder / "list.csv", index=False)
    x, y = all_of(ImageFolder(folder / "list.csv", **SIZES, n_classes=5))
    assert x.shape == (6, 3, 8, 8)
    assert sorted(y.tolist()) == [0] * 3 + [1] * 3
    (folder / "blue" / "1.png").unlink()
    with pytest.raises(InputError, match=r"1 of 6 images of .* are absent"):
        ImageFolder(folder / "list.csv", **SIZES)


CONFIG = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"size": {"height": 32, "width": 24}}, ((32, 24), None)),
        ({"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}, ((32, 32), 36)),
        ({"size": 224}, ((224, 224), None)),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, ((224, 224), 256)),
    ],
)
def test_a_preprocessor_config_is_read(tmp_path, config, expected):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**CONFIG, **config}))
    read = Preprocessing.read(tmp_path)
    assert (read.size, read.short_side) == expected
    assert (read.mean, read.std, read.resample) == ((0.5,) * 3, (0.5,) * 3, 2)


def test_pixels_are_those_of_transformers(tmp_path):
    """The processor of a model, where it runs without torchvision."""
    transformers = pytest.importorskip("transformers")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}, **CONFIG)
    processor.save_pretrained(tmp_path)
    expected = processor(Image.open(tmp_path / "x.png"), return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(Preprocessing.read(tmp_path)(tmp_path / "x.png"), expected, atol=1e-5)


def test_what_cannot_be_used_is_one_sentence(folder, tmp_path):
    def refused(sentence, path, **options):
        with pytest.raises(InputError, match=sentence):
            ImageFolder(path, **{**SIZES, **options})

    (tmp_path / "none").mkdir()
    refused("has no images .* in folders of a class each", tmp_path / "none")
    refused("There is no file .*nowhere. Set task.path", tmp_path / "nowhere")
    refused("preprocessor_config.json does not say how images are prepared", folder, preprocessing=tmp_path)
    refused("mean and std must have 1 or 3 numbers each", folder, mean=[0.5], std=[0.5, 0.5, 0.5])
    refused("short_side at least size; got 8 and 4", folder, short_side=4)
    refused("6 samples, 7 were asked for", folder, n_confirm=3)
    (folder / "blue" / "1.png").write_bytes(b"not an image")
    refused("1.png is no whole image", folder)
