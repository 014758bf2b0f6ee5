"""Examples in the documents run, and their links resolve."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module

from mpsearch.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md"


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


@pytest.mark.parametrize("path", [README, CONTRIBUTING, ROOT / ".github" / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_to_files_resolve(path: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (ROOT / link.partition("#")[0]).exists()]
    assert missing == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, but for the number of trials."""
    (source,) = blocks(README, "python")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    fewer = source.replace("n_trials=50", "n_trials=8")
    assert fewer != source
    exec(compile(fewer, README, "exec"), names)
    assert names["path"] == Path("exported") / "allocation.json"
    assert isinstance(names["quantized"], torch.nn.Module)
    assert len(names["result"].front) > 0
    assert (tmp_path / "reports" / "digits" / "evaluations.csv").is_file()


def commands() -> list[list[str]]:
    """The words of each command in the README's blocks, and of each option in its table of options."""
    lines = [line for block in blocks(README, "") for line in block.splitlines() if line.startswith("mpsearch ")]
    _, _, table = README.read_text(encoding="utf-8").partition("| option of `search` | examples |\n")
    options = re.findall(r"`([^`]+)`", table.partition("\n\n")[0])
    return [shlex.split(line, comments=True)[1:] for line in lines] + [
        ["search", *shlex.split(option.replace("\\|", "|"))] for option in options
    ]


def test_every_command_of_the_readme_composes() -> None:
    assert len(commands()) > 15
    assert {command for command, *_ in commands()} <= set(COMMANDS)
    with initialize_config_module("mpsearch.conf", version_base="1.3"):
        for command, *words in commands():
            assert compose(command, overrides=words) is not None


def test_the_command_on_a_model_of_ones_own_runs(mpsearch, undrawn, tmp_path: Path) -> None:
    (words,) = [words for words in commands() if "model=custom" in words]
    (tmp_path / "my_pkg.py").write_text("import torch\n\n\ndef build_net():\n    return torch.nn.Linear(64, 3).eval()\n")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.standard_normal((90, 64), dtype=np.float32), y=rng.integers(3, size=90))
    code, errors = mpsearch(*words, "n_trials=3")
    assert code == 0, errors
    (run,) = (tmp_path / "reports").iterdir()
    assert (run / "report.md").is_file()


def test_the_example_of_a_choice_works(mpsearch, tmp_path: Path) -> None:
    """The quantizer of CONTRIBUTING.md, in a package of one's own and a folder given by `--config-dir`."""
    (source,) = blocks(CONTRIBUTING, "python")
    (config,) = blocks(CONTRIBUTING, "yaml")
    (tmp_path / "own_choices").mkdir()
    (tmp_path / "own_choices" / "fixed_clip.py").write_text(source)
    (tmp_path / "conf" / "quantizer").mkdir(parents=True)
    assert config.startswith("_target_: mpsearch.quantizers.")
    (tmp_path / "conf" / "quantizer" / "fixed_clip.yaml").write_text(config.replace("mpsearch.quantizers", "own_choices"))
    code, errors = mpsearch("sensitivity", "--config-dir=conf", "quantizer=fixed_clip", "scheme=[w4]", "metric=weight_mse")
    assert code == 0, errors
    code, errors = mpsearch("sensitivity", "--config-dir=conf", "quantizer=fixed_clip", "quantizer.ratio=2", "scheme=[w4]")
    assert code == 2
    assert "ratio must be in (0, 1]; got 2" in errors
