"""Classification of the user's images: a folder of a class each, or a table of files and classes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import InputError, did_you_mean, one_line
from mpsearch.models.timm_model import check_name, import_timm
from mpsearch.tasks.base import SPLITS
from mpsearch.tasks.classification import Classification
from mpsearch.tasks.records import class_numbers, read_columns
from mpsearch.tasks.sources import default_sizes, draw_by_source, named_files, read_once

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC = 3  # Pillow's number of the filter, which preprocessor_config.json gives too
RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": BICUBIC}
TIMM = "timm:"


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to what the model takes: `(pixels / 255 - mean) / std` of a crop from the centre.

    Attributes
    ----------
    size
        (height, width) of the crop.
    short_side
        To which the picture is scaled before; `None`: the picture is scaled to `size` without a crop.
    mean, std
        Of each channel; one channel makes pictures grey.
    resample
        Pillow's number of the filter: 2 bilinear, 3 bicubic.
    """

    size: tuple[int, int]
    short_side: int | None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resample: int = BICUBIC

    @classmethod
    def read(cls, folder: Path) -> Preprocessing:
        """That of `preprocessor_config.json` in a Hugging Face folder, `InputError` where it cannot be read."""
        file = folder / "preprocessor_config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            size, crop = config.get("size", 224), config.get("crop_size")
            short = size.get("shortest_edge") if isinstance(size, Mapping) else None
            if short is not None and "crop_pct" in config and short < 384:  # ConvNeXT
                size, crop, short = short, short, int(short / config["crop_pct"])
            exact = _pair(crop if crop is not None and config.get("do_center_crop", True) else short or size)
            return cls(
                exact,
                short,
                tuple(map(float, config["image_mean"])) if config.get("do_normalize", True) else (0.0,) * 3,
                tuple(map(float, config["image_std"])) if config.get("do_normalize", True) else (1.0,) * 3,
                int(config.get("resample", BICUBIC)),
            )
        except Exception as error:  # a file of the user's: anything may be missing from it
            raise InputError(
                f"{file} does not say how images are prepared ({one_line(error)}). Set task.size, task.short_side, task.mean and "
                "task.std instead of task.preprocessing."
            ) from error

    @classmethod
    def of_timm(cls, name: str) -> Preprocessing:
        """That with which timm evaluates a model of its registry; `InputError` for an unknown name."""
        check_name(name)
        timm = import_timm("task.preprocessing=timm:…")
        config = timm.models.get_pretrained_cfg(name)
        if config is None:
            raise InputError(f"timm has no model {name}.{did_you_mean(name, timm.list_models())}")
        size = (int(config.input_size[1]), int(config.input_size[2]))
        if config.crop_mode != "center" or size[0] != size[1] or config.interpolation not in RESAMPLE:
            raise InputError(
                f"timm prepares images for {name} by crop_mode={config.crop_mode}, interpolation={config.interpolation} and size "
                f"{size[0]} x {size[1]}, which task=image_folder does not do. Set task.size, task.mean and task.std."
            )
        return cls(size, int(size[0] / config.crop_pct), tuple(config.mean), tuple(config.std), RESAMPLE[config.interpolation])

    def __call__(self, file: Path) -> Tensor:
        """float32 `[channels, height, width]` of an image file."""
        from PIL import Image

        try:
            image = Image.open(file).convert("L" if len(self.mean) == 1 else "RGB")
        except Exception as error:  # a damaged file can raise anything
            raise InputError(f"{file} is no whole image ({one_line(error)}). Remove it, or copy it again.") from error
        height, width = self.size
        if self.short_side is None:
            image = image.resize((width, height), self.resample)
        else:
            scale = self.short_side / min(image.size)
            image = image.resize(tuple(max(round(side * scale), 1) for side in image.size), self.resample)
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image, np.float32)).reshape(height, width, -1).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


class ImageFolder(Classification):
    """Images of several classes, dealt out to the splits in an order drawn with `seed`: accuracy.

    Parameters
    ----------
    path
        A folder with one folder for each class, numbered in the order of their names; or a table (`records.TABLES`) with the
        columns `image` (a file, relative to the table) and `label` (integers from 0, or names that the model's folder numbers).
    preprocessing
        A Hugging Face folder with `preprocessor_config.json`; `config.json` there numbers the classes by name (`label2id`).
        Or `timm:` and a name in timm's registry. Without it the four arguments that follow count.
    size, short_side, mean, std
        See `Preprocessing`; by default `short_side` is 256 / 224 of the size, and mean and std are those of ImageNet.
    n_calibration, n_search, n_confirm
        Images of each split; `None`: see `sources.default_sizes`.
    calibration_data, search_data, confirm_data
        Another folder or table for this split, with the same classes; it may serve several.

    Raises
    ------
    InputError
        A file, a class or Pillow is absent, or there are too few images.
    """

    def __init__(
        self,
        path: str | Path,
        preprocessing: str | Path | None = None,
        size: int = 224,
        short_side: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        n_calibration: int | None = None,
        n_search: int | None = None,
        n_confirm: int | None = None,
        seed: int = 0,
        batch_size: int = 32,
        n_classes: int | None = None,
        calibration_data: str | Path | None = None,
        search_data: str | Path | None = None,
        confirm_data: str | Path | None = None,
    ) -> None:
        try:
            import PIL  # noqa: F401
        except ImportError:
            raise InputError("task=image_folder needs Pillow, which is not installed here. Run: pip install pillow") from None
        of_timm = str(preprocessing).startswith(TIMM)
        folder = None if preprocessing is None or of_timm else Path(preprocessing).expanduser()
        sources = named_files((calibration_data, search_data, confirm_data), Path(path).expanduser())
        listed = read_once(sources, lambda source: _of_folders(source, folder) if source.is_dir() else _of_table(source, folder))
        if of_timm:
            prepare = Preprocessing.of_timm(str(preprocessing).removeprefix(TIMM))
        elif folder is not None:
            prepare = Preprocessing.read(folder)
        else:
            prepare = _given(size, short_side, mean or IMAGENET_MEAN, std or IMAGENET_STD)
        if folder is None or not (folder / "config.json").is_file():
            _check_same_classes(listed)
        lengths = {source: len(files) for source, (files, _) in listed.items()}
        sizes = default_sizes(sources, lengths, (n_calibration, n_search, n_confirm))
        drawn = draw_by_source(sources, lengths, sizes, seed)
        calibration, search, confirm = (
            (torch.stack([prepare(files[i]) for i in index]), classes[torch.from_numpy(index)])
            for (files, classes), index in ((listed[sources[split]], drawn[split]) for split in SPLITS)
        )
        n_classes = max(n_classes or 0, *(int(classes.max()) + 1 for _, classes in listed.values()))
        origins = {split: source.name for split, source in sources.items()}
        super().__init__(calibration, search, confirm, n_classes=n_classes, batch_size=batch_size, origins=origins)


def _given(size: int, short_side: int | None, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
    if len(mean) != len(std) or len(mean) not in (1, 3) or min(std) <= 0:
        raise InputError(f"mean and std must have 1 or 3 numbers each, std above 0; got {list(mean)} and {list(std)}.")
    if size < 1 or (short_side is not None and short_side < size):
        raise InputError(f"size must be at least 1 and short_side at least size; got {size} and {short_side}.")
    return Preprocessing((size, size), short_side or round(size * 256 / 224), tuple(mean), tuple(std))


def _class_names(source: Path) -> list[str]:
    return sorted(child.name for child in source.iterdir() if child.is_dir())


def _check_same_classes(sources: Collection[Path]) -> None:
    """Raise `InputError` where folders of folders number their classes in different ways."""
    named = {source: _class_names(source) for source in sources if source.is_dir()}
    for source, names in named.items():
        first = next(iter(named))
        if names != named[first]:
            differ = sorted(set(names) ^ set(named[first]))[0]
            raise InputError(
                f"{source} and {first} must have folders of the same classes, which are numbered by name; '{differ}' is in one "
                "of them. Give the missing folder, or tables with numbers."
            )


def _of_folders(source: Path, folder: Path | None) -> tuple[list[Path], Tensor]:
    """The images of a folder of folders, and the class of each."""
    names = _class_names(source)
    pairs = [(file, name) for name in names for file in sorted((source / name).rglob("*")) if file.suffix.lower() in ENDINGS]
    if not pairs:
        raise InputError(
            f"{source} has no images ({', '.join(ENDINGS)}) in folders of a class each. Give such a folder, or a table with the "
            "columns image and label."
        )
    labels = np.array([name for _, name in pairs])
    if folder is not None and (folder / "config.json").is_file():
        return [file for file, _ in pairs], class_numbers(labels, folder, source)
    return [file for file, _ in pairs], torch.tensor([names.index(name) for name in labels])


def _of_table(source: Path, folder: Path | None) -> tuple[list[Path], Tensor]:
    """The same of a table."""
    table = read_columns(source, {"image": "", "label": ""})
    files = [source.parent / str(name) for name in table["image"]]
    if absent := [file for file in files if not file.is_file()]:
        raise InputError(f"{len(absent):,} of {len(files):,} images of {source} are absent, as {absent[0]}.")
    return files, class_numbers(table["label"].to_numpy(), folder or source.parent, source)


def _pair(size: Any) -> tuple[int, int]:
    return (int(size["height"]), int(size["width"])) if isinstance(size, Mapping) else (int(size), int(size))
