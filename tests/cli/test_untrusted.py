"""A run folder from elsewhere is data: whatever its config names, no command runs it unless the user says `trust=true`."""

import ast
import importlib
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import without_figures
from crafted import CASES, SECRET, Evil, put
from hydra.utils import get_object

from mpsearch import cli
from mpsearch.cli.saved_config import packaged, require_trust, saved

COMMANDS = {
    "report": (),
    "export": (),
    "verify": (),
    "solve": ("budget.bits=5",),
    "finetune": ("epochs=1", "batches=1"),
    "search": ("n_trials=5",),
}
REGISTRIES = {
    *(
        "models",
        "tasks",
        "schemes",
        "quantizers",
        "refiners",
        "equalizers",
        "metrics",
        "costs",
        "samplers",
        "runtimes",
        "executors",
        "exporters",
    ),
}
QUICK = ("n_trials=3", "n_seeds=2", "scheme=[w2,w8]", "quantizer=round_to_nearest", "metric=weight_mse", "task.n_calibration=50")


def run_main(*words: str) -> int:
    """The exit code of a command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mpsearch", *words])
        patch.setattr(sys, "path", [*sys.path])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, as a search leaves it."""
    folder = tmp_path_factory.mktemp("real") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        assert run_main("search", *QUICK, f"hydra.run.dir={folder}") == 0
    return folder


@pytest.fixture
def evil(real: Path, undrawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evil:
    """A copy of it, with the files of an attacker, as the working directory."""
    folder = tmp_path / "run"
    shutil.copytree(real, folder)
    made = Evil(folder, tmp_path / "canary")
    made.write()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SECRET", SECRET)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return made


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What `report` would draw: figures take seconds, and are the same for every case."""
    module = importlib.import_module("mpsearch.reporting.report")
    seen: list[object] = []

    def note(result: object, folder: Path, picked: object, confirmed: object = None, every_figure: bool = False) -> Path:
        seen.append(result)
        return folder / "report.md"

    monkeypatch.setattr(module, "write_report", note)
    return seen


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on stderr."""
    out, err = capsys.readouterr()
    assert SECRET not in out + err
    assert err.startswith("mpsearch: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", CASES)
@pytest.mark.thin(9)
def test_a_crafted_folder_runs_nothing(name: str, evil: Evil, drawn: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    file = evil.folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    text = CASES[name](config, evil)
    file.write_text(yaml.safe_dump(config) if text is None else text)
    before = contents(evil.folder)
    for command, words in COMMANDS.items():
        code = run_main(command, "run=.", *words)
        assert not evil.canary.exists(), f"{command} ran something"
        if command == "report" and code == 0:
            assert drawn
            assert SECRET not in "".join(capsys.readouterr())
        else:
            assert code == 2, command
            assert "config.yaml" in told(capsys) or command == "report"
        assert contents(evil.folder) == before


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 40


@pytest.mark.slow
def test_a_saved_mirror_is_not_written_to(evil: Evil, capsys: pytest.CaptureFixture[str]) -> None:
    file = evil.folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    put(config, "study.mirror", f"sqlite:///{evil.canary}")
    file.write_text(yaml.safe_dump(config))
    assert run_main("search", "run=.") == 0
    assert not evil.canary.exists()
    assert "study.mirror is not taken from a saved config" in capsys.readouterr().err
    assert run_main("search", "run=.", f"study.mirror=sqlite:///{evil.canary}") == 0
    assert evil.canary.exists(), "the user named it"
    assert saved(evil.folder)["study"]["mirror"] is None


@pytest.mark.slow
def test_a_class_of_the_users_needs_trust(
    evil: Evil, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence holds the command that builds it, quoted; without it, the working directory is not imported from."""
    (evil.folder / "mine.py").write_text(f"from mpsearch.models.digits import digits\n{evil.code}\n")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    file = evil.folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["model"] = {"_target_": "mine.digits"}
    file.write_text(yaml.safe_dump(config))
    words = ("export", "run=./", "pick.max_bytes=1 MB")
    assert run_main(*words) == 2
    assert not evil.canary.exists()
    sentence = told(capsys)
    assert "model._target_='mine.digits'" in sentence
    command = shlex.split(sentence.partition(" type: ")[2])
    assert command == ["mpsearch", *words, "trust=true"]
    for refused in ("trust=false", "trust=True1"):
        assert run_main(*words, refused) == 2
        assert not evil.canary.exists()
        capsys.readouterr()
    assert run_main(*command[1:]) == 0
    assert evil.canary.exists()


def test_trust_is_never_taken_from_a_saved_config(evil: Evil, capsys: pytest.CaptureFixture[str]) -> None:
    file = evil.folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config |= {"trust": True, "sampler": evil.node}
    file.write_text(yaml.safe_dump(config))
    for command in ("search", "export"):
        assert run_main(command, "run=.") == 2
        assert "trust=true" in told(capsys)
        assert not evil.canary.exists()


def test_trust_does_not_configure_hydra(evil: Evil, capsys: pytest.CaptureFixture[str]) -> None:
    file = evil.folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    put(config, "hydra.callbacks.zz", evil.node)
    file.write_text(yaml.safe_dump(config))
    assert run_main("search", "run=.", "trust=true") == 2
    assert "hydra" in told(capsys)
    assert not evil.canary.exists()


def test_a_saved_cluster_is_not_connected_to(evil: Evil, capsys: pytest.CaptureFixture[str]) -> None:
    """A Dask scheduler and its clients exchange pickles."""
    file = evil.folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        config["executor"] = {"_target_": "mpsearch.executors.dask.Dask", "address": address, "threads": 1}
        file.write_text(yaml.safe_dump(config))
        assert run_main("search", "run=.") == 2
        assert f"executor.address='{address}'" in told(capsys)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert run_main("search", "run=.", "executor=in_process") == 0


def test_every_packaged_target_is_defined_where_it_says() -> None:
    """The table holds nothing but classes and functions of the registries, of Optuna's samplers too."""
    targets = {target for values in packaged().values() for target in values.get("_target_", ())}
    assert len(targets) > 50
    for target in targets:
        found = get_object(target)
        if target.startswith("optuna.samplers."):
            assert found.__module__.startswith("optuna.samplers.")
        else:
            assert f"{found.__module__}.{found.__qualname__}" == target
            assert target.split(".")[1] in REGISTRIES
    assert {key for values in packaged().values() for key in values} == {"_target_", "_partial_"}


@pytest.mark.parametrize("folder", ["resnet20_cifar10", "resnet20_cifar10_wa"])
def test_the_committed_runs_need_no_trust(folder: str, drawn: list[object]) -> None:
    run = Path(__file__).parents[2] / "reports" / folder
    require_trust(saved(run), run, "export", [])


INSTALLED = (
    *(
        "torch",
        "numpy",
        "pandas",
        "hydra",
        "omegaconf",
        "yaml",
        "optuna",
        "matplotlib",
        "scipy",
        "rich",
        "safetensors",
        "sklearn",
    ),
    *("timm", "gguf", "distributed", "ray", "psycopg", "joblib", "antlr4", "tqdm"),
)
STANDARD = ("functools", "shlex", "difflib", "pathlib", "json", "csv", "random", "pickle", "typing", "dataclasses", "mpsearch")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["report", "solve"])
def test_nothing_is_imported_from_the_folder(command: str, evil: Evil) -> None:
    """`run=.` inside the folder, whose modules have the names of those that mpsearch imports, and of some that it may lack.

    `python -m` itself imports from there before mpsearch runs, so that only the console script is safe from all names.
    """
    is_script = command == "solve"
    for name in (*INSTALLED, *(STANDARD if is_script else ())):
        (evil.folder / f"{name}.py").write_text(evil.code)
    (evil.folder / "hydra_plugins").mkdir()
    (evil.folder / "hydra_plugins/evil.py").write_text(evil.code)
    (evil.folder / "matplotlibrc").write_text("backend: module://evil\n")
    launch = ["-P", "-c", LAUNCH] if is_script else ["-m", "mpsearch"]
    ended = subprocess.run([sys.executable, *launch, command, "run=."], cwd=evil.folder, capture_output=True, text=True)
    assert not evil.canary.exists(), ended.stderr
    assert ended.returncode == (2 if is_script else 0), ended.stderr
    assert ("Nothing to solve" in ended.stderr) == is_script


LAUNCH = "import sys; from mpsearch.cli import main; sys.argv[0] = 'mpsearch'; main()"
WORKER = """
import sys, types, mpsearch.cli
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
commands = types.ModuleType("mpsearch.cli.commands")
def search(settings, build, folder):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        print([sys.path, pool.submit(eval, "__import__('sys').path").result()])
commands.search = search
sys.modules["mpsearch.cli.commands"] = mpsearch.cli.commands = commands
from mpsearch.cli import main
sys.argv[0] = "mpsearch"
if __name__ == "__main__":
    main()
"""


def test_workers_do_not_import_from_the_working_directory_first(tmp_path: Path) -> None:
    evil = Evil(tmp_path, tmp_path / "canary")
    for name in ("multiprocessing", "pickle", "socket", "torch", "numpy"):
        (tmp_path / f"{name}.py").write_text(evil.code)
    ended = subprocess.run([sys.executable, "-P", "-c", WORKER, "search"], cwd=tmp_path, capture_output=True, text=True)
    assert not evil.canary.exists(), ended.stderr
    here, worker = ast.literal_eval(ended.stdout)
    assert here[-1] == worker[-1] == str(tmp_path), "a class of the user's is found, after all that is installed"
    assert str(tmp_path) not in here[:-1] + worker[:-1]
    assert "" not in worker
