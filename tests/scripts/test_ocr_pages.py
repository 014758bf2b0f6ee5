"""The pages for the text detector: drawn, and written with the network of the package."""

import importlib.util
import sys
from pathlib import Path

import numpy as np

PATH = Path(__file__).parents[2] / "scripts" / "ocr_pages.py"


def test_pages_and_network_are_written(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("ocr_pages", PATH)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    network = tmp_path / "packages" / "rapidocr_onnxruntime" / script.NETWORK
    network.parent.mkdir(parents=True)
    (tmp_path / "packages" / "rapidocr_onnxruntime" / "__init__.py").write_text("")
    network.write_bytes(b"a network")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setattr(sys, "argv", ["ocr_pages", str(tmp_path / "pages"), "-n", "4"])
    script.main()
    assert (tmp_path / "pages" / "detector.onnx").read_bytes() == b"a network"
    pages = np.load(tmp_path / "pages" / "pages.npz")["x"]
    assert (pages.dtype, pages.shape) == (np.float32, (4, 3, 320, 320))
    assert -1 <= pages.min() < pages.max() <= 1
    assert all(page.std() > 0.05 for page in pages), "there is text"
    assert not np.array_equal(pages[0], pages[1])
