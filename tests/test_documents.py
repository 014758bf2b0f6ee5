"""Examples in the documents run, and their links resolve."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md"


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", [README, CONTRIBUTING, ROOT / ".github" / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_to_files_resolve(path: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (ROOT / link.partition("#")[0]).exists()]
    assert missing == []


def test_the_example_of_a_choice_works(mpsearch, tmp_path: Path) -> None:
    """The quantizer of CONTRIBUTING.md, in a package of one's own and a folder given by `--config-dir`."""
    (source,) = blocks(CONTRIBUTING, "python")
    (config,) = blocks(CONTRIBUTING, "yaml")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "fixed_clip.py").write_text(source)
    (tmp_path / "conf" / "quantizer").mkdir(parents=True)
    assert config.startswith("_target_: mpsearch.quantizers.")
    (tmp_path / "conf" / "quantizer" / "fixed_clip.yaml").write_text(config.replace("mpsearch.quantizers", "own"))
    code, errors = mpsearch("sensitivity", "--config-dir=conf", "quantizer=fixed_clip", "scheme=[w4]", "metric=weight_mse")
    assert code == 0, errors
    code, errors = mpsearch("sensitivity", "--config-dir=conf", "quantizer=fixed_clip", "quantizer.ratio=2", "scheme=[w4]")
    assert code == 2
    assert "ratio must be in (0, 1]; got 2" in errors
