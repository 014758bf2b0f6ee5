"""Draw pages of English text for the text detector of the package rapidocr-onnxruntime, and put its network next to them.

    pip install --no-deps rapidocr-onnxruntime
    python scripts/ocr_pages.py pages
    MPSEARCH_OCR=pages mpsearch search experiment=ocr_detector

`pages.npz` holds float32 `[n, 3, 320, 320]`, scaled to -1 to 1 as the detector takes them: text of Python's own documentation in
the fonts of matplotlib, in random sizes and colours, slightly turned, blurred and with noise.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import shutil
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mpsearch.models.packaged import packaged

SIZE = 320  # pixels; a multiple of 32, as the detector needs
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono")
NETWORK = "models/ch_PP-OCRv4_det_infer.onnx"


def page(rng: np.random.Generator, words: list[str]) -> NDArray[np.float32]:
    """A page, float32 `[3, SIZE, SIZE]`."""
    dark, light = rng.integers(0, 90, 3), rng.integers(160, 256, 3)
    ink, paper = (dark, light) if rng.random() < 0.8 else (light, dark)
    image = Image.new("RGB", (SIZE, SIZE), tuple(paper.tolist()))
    draw = ImageDraw.Draw(image)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    y = int(rng.integers(4, 40))
    while y < SIZE - 20:
        height = int(rng.integers(11, 34))
        font = ImageFont.truetype(folder / f"{rng.choice(FONTS)}.ttf", height)
        start = int(rng.integers(len(words) - 12))
        x = int(rng.integers(4, 60))
        draw.text((x, y), " ".join(words[start : start + int(rng.integers(1, 7))]), tuple(ink.tolist()), font)
        y += int(height * rng.uniform(1.2, 2.5))
    turned = image.rotate(rng.normal(0, 2), Image.Resampling.BILINEAR, fillcolor=tuple(paper.tolist()))
    pixels = np.asarray(turned.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8))), np.float32)
    pixels = np.clip(pixels + rng.normal(0, rng.uniform(0, 8), pixels.shape), 0, 255)
    return (pixels.transpose(2, 0, 1) / 127.5 - 1).astype(np.float32)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-n", type=int, default=192, help="pages (default: 192)")
    args = parser.parse_args()
    network = packaged("rapidocr_onnxruntime", NETWORK, "--no-deps rapidocr-onnxruntime")
    args.folder.mkdir(parents=True, exist_ok=True)
    words = " ".join(pydoc_data.topics.topics.values()).split()
    rng = np.random.default_rng(0)
    np.savez(args.folder / "pages.npz", x=np.stack([page(rng, words) for _ in range(args.n)]))
    shutil.copyfile(network, args.folder / "detector.onnx")
    print(f"{args.folder}: pages.npz with {args.n} pages, detector.onnx")


if __name__ == "__main__":
    main()
