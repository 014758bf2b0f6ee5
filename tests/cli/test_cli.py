"""The entry point: commands, sentences and exit codes, run folders, resuming, completion; with stand-ins for the commands."""

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mpsearch import cli
from mpsearch.cli.saved_config import saved
from mpsearch.errors import InputError, run_option
from mpsearch.files import locked

# A fresh interpreter in which a command prints what it was given instead of working.
DRIVER = """
import json, sys, types, mpsearch.cli
fake = types.ModuleType("mpsearch.cli.commands")
def show(settings, build, folder):
    print(json.dumps({"settings": settings, "folder": str(folder), "torch": "torch" in sys.modules}))
for name in ("search", "sensitivity", "report", "export"):
    setattr(fake, name, show)
sys.modules["mpsearch.cli.commands"] = mpsearch.cli.commands = fake
from mpsearch.cli import main
sys.argv[0] = "mpsearch"
main()
"""


def shell(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    known = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    return subprocess.run(
        [sys.executable, "-c", DRIVER, *words], cwd=cwd, env=known | environment, capture_output=True, text=True, timeout=60
    )


@dataclass
class Call:
    """What a command was handed."""

    command: str
    settings: dict[str, Any]
    build: Any
    folder: Path


@dataclass
class Ended:
    """How `main` ended."""

    code: int
    out: str
    err: str


class Door:
    """Calls `main` in this process, with commands that note their call and then do what the test wants."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Call] = []
        self.compared: list[tuple[list[Path], Path]] = []
        self.then: Any = lambda call: None
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def note(self, command: str, settings: dict[str, Any], build: Any, folder: Path) -> None:
        self.calls.append(Call(command, settings, build, folder))
        self.then(self.calls[-1])

    def __call__(self, *words: str) -> Ended:
        self.monkeypatch.setattr(sys, "argv", ["mpsearch", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = self.capsys.readouterr()
        return Ended(code, out, err)

    @property
    def last(self) -> Call:
        return self.calls[-1]


@pytest.fixture
def door(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Door:
    opened = Door(capsys, monkeypatch)
    commands = types.ModuleType("mpsearch.cli.commands")
    for name in cli.COMMANDS:
        setattr(commands, name, functools.partial(opened.note, name))
    commands.compare = lambda folders, target: opened.compared.append((folders, target))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mpsearch.cli.commands", commands)
    monkeypatch.setattr(cli, "commands", commands, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.chdir(tmp_path)
    return opened


@pytest.fixture
def my_pkg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's own in the working directory."""
    path = tmp_path / "my_pkg.py"
    path.write_text(
        "from mpsearch.errors import InputError\n"
        "def net(width, depth=2): return ('net', width, depth)\n"
        "def takes(**given): return given\n"
        "def nothing(): return 'nothing'\n"
        "def bug(): raise RuntimeError('a bug')\n"
        "def no_file(): raise FileNotFoundError('no such weights')\n"
        "def picky(n=1):\n    if n < 0: raise InputError(f'n must be 0 or more; got {n}.')\n    return n\n"
    )
    monkeypatch.delitem(sys.modules, "my_pkg", raising=False)
    return path


def test_help_lists_every_command_without_imports(tmp_path: Path) -> None:
    for words in ([], ["--help"], ["-h"]):
        ended = shell(*words, cwd=tmp_path)
        assert ended.returncode == 0
        assert all(f"\n  {name} " in ended.stdout for name in cli.COMMANDS)
    probe = "import sys, mpsearch.cli; print([m for m in ('torch', 'hydra', 'omegaconf', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path).stdout.strip() == "[]"


def test_module_is_the_same_door(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-m", "mpsearch", "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0
    assert ended.stdout.startswith("mpsearch")


def test_search_in_a_process_of_its_own(tmp_path: Path) -> None:
    ended = shell("search", "n_trials=7", "budget.bits=3", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert not told["torch"]
    assert (told["settings"]["n_trials"], told["settings"]["budget"]["bits"], told["settings"]["run"]) == (7, 3, None)
    folder = Path(told["folder"])
    assert folder.parent == tmp_path / "reports"
    assert folder.name.startswith("search-digits-2")
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "config.yaml"]


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    ended = shell("search", "model=resnt20", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("mpsearch: There is no model 'resnt20'. Did you mean 'resnet20'")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "reports").exists()


def test_search_help_names_what_there_is_to_choose(tmp_path: Path) -> None:
    ended = shell("search", "--help", cwd=tmp_path)
    assert ended.returncode == 0
    assert "quantizer: adaround, clip_search, coordinate_descent, entropy, gptq, hqq, kronecker_descent," in ended.stdout
    assert "n_trials: 100" in ended.stdout
    assert re.search(r"^n_seeds: 20 +# initial trials", ended.stdout, re.MULTILINE), "settings with their meanings"
    assert not (tmp_path / "reports").exists()


MISTAKES = {
    ("serach",): "There is no command 'serach'. Did you mean 'search' or 'watch'?",
    ("model=digits",): "There is no command 'model=digits'. There is: export, finetune, hardware, report, search, sensitivity, ",
    ("search", "n_trails=3"): "There is no key 'n_trails'. Did you mean 'n_trials'",
    ("search", "modle=digits"): "There is no key 'modle'. Did you mean 'model'",
    ("search", "budget.bit=3"): "There is no key 'budget.bit'. Did you mean 'budget.bits'",
    ("search", "model=digits", "model.foo=3"): "An argument of your own is added by +model.foo=VALUE.",
    ("search", "scheme=[w2,w9]"): "There is no scheme 'w9'. Did you mean 'w8'",
    ("search", "scheme.w5.group_size=32"): "'w5' is not among this run's schemes",
    ("search", "scheme=[]"): "scheme must be given",
    ("search", "sampler=tpee"): "There is no sampler 'tpee'. Did you mean 'tpe'?",
    ("search", "quantizer_of.w2=percentle"): "There is no quantizer 'percentle'. Did you mean 'percentile'?",
    ("search", "quantizer_of.w7=percentile"): "quantizer_of.w7: this run has no scheme 'w7'.",
    ("search", "quantizer_of=percentile"): "a quantizer for one scheme is written quantizer_of.w2=percentile",
    ("search", "n_trials=1", "n_trials=2"): "'n_trials' is given twice",
    ("search", "n_trials=1,2"): "n_trials has several values: write 'n_trials=[1,2]' for a list, or add --multirun",
    ("search", "+n_trials=1"): "An item is already at 'n_trials'",
    ("search", "n_trials=many"): "n_trials must be an integer of at least 0; got 'many'.",
    ("search", "seed=-1"): "seed must be an integer of at least 0",
    ("search", "max_seconds=0"): "max_seconds must be a number above 0",
    ("search", "bias_correction=perhaps"): "bias_correction must be true or false",
    ("search", "resnet20"): "'resnet20' cannot be read: what is changed is written key=value.",
    ("search", "pin=[a"): "'pin=[a' cannot be read. Quote special characters",
    ("search", "pin=fc:w8"): "pin must be a list of texts, 'pin=[\"…\",\"…\"]'; got 'fc:w8'.",
    ("search", "share=[3]"): "share must be a list of texts, 'share=[\"…\",\"…\"]'; got '[3]'.",
    ("search", "shar=[]"): "There is no key 'shar'. Did you mean 'share'",
    ("search", "model=custom"): "model._target_ must be given: model._target_=PACKAGE.NAME",
    ("search", "task=cifar10"): "task.data_dir must be given: task.data_dir=PATH",
    ("search", "--config-dir", "nowhere"): "nowhere' not found",
    ("search", "--config-name", "serch"): "There is no config 'serch'. Did you mean 'search'",
    ("search", "run=reports/none"): "There is no run folder",
    ("search", "run="): "run must be given: run=PATH",
    ("sensitivity", "sampler=tpe"): "mpsearch sensitivity has no use for 'sampler'.",
    ("report",): "run must be given: run=PATH",
    ("report", "--multirun"): "--multirun starts many",
    ("export",): "run must be given: run=PATH",
    ("export", "run=nowhere"): "There is no run folder",
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
@pytest.mark.thin(3)
def test_a_mistake_is_one_sentence(words: tuple[str, ...], door: Door, tmp_path: Path) -> None:
    ended = door(*words)
    assert ended.code == 2
    assert ended.err.startswith("mpsearch: ")
    assert MISTAKES[words] in ended.err
    assert ended.err.count("\n") == 1
    assert not door.calls
    assert not [path for path in tmp_path.rglob("*") if path.name != "reports"], "a mistake leaves no folder behind"
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_settings_are_plain_and_saved(door: Door) -> None:
    assert door("search", "scheme=[w4,w8]", 'pin=["conv1:w8","layer3.*:w4|w8"]', "scheme.w4.group_size=32").code == 0
    settings, folder = door.last.settings, door.last.folder
    assert type(settings) is dict
    assert type(settings["scheme"]["w4"]) is dict
    assert list(settings["scheme"]) == ["w4", "w8"]
    assert settings["scheme"]["w4"]["group_size"] == 32
    assert settings["pin"] == ["conv1:w8", "layer3.*:w4|w8"]
    assert folder.is_absolute()
    assert saved(folder) == settings


def test_a_setting_of_null_is_that_of_the_run_or_null(door: Door) -> None:
    assert door("search", "seed=3", "hydra.run.dir=reports/a").code == 0
    assert door("finetune", "run=reports/a").code == 0
    settings = door.last.settings
    assert (settings["seed"], settings["device"], settings["batches"]) == (3, "cpu", None)


def test_quick_successive_runs_do_not_collide(door: Door) -> None:
    for _ in range(3):
        assert door("sensitivity").code == 0
    assert len({call.folder for call in door.calls}) == 3
    assert all((call.folder / "config.yaml").exists() for call in door.calls)


def test_a_run_is_not_overwritten(door: Door) -> None:
    assert door("search", "hydra.run.dir=reports/a", "seed=1").code == 0
    ended = door("search", "hydra.run.dir=reports/a", "seed=2")
    assert ended.code == 2
    assert "already holds a run" in ended.err
    assert saved(Path("reports/a"))["seed"] == 1


def test_multirun_goes_on_after_a_mistake(door: Door) -> None:
    ended = door("search", "seed=5", "-m", "n_trials=3,many,4")
    assert ended.code == 2
    assert [call.settings["n_trials"] for call in door.calls] == [3, 4]
    assert "#0: seed=5 n_trials=3" in ended.out
    folders = [call.folder for call in door.calls]
    assert [folder.name for folder in folders] == ["0", "2"]
    assert len({folder.parent for folder in folders}) == 1
    assert folders[0].parent.name.startswith("search-multirun-")
    assert door.compared == [(folders, folders[0].parent)], "a sweep ends with the comparison of its runs"


def test_several_runs_are_compared(door: Door, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert door("report", "run=[a, b]").code == 0
    ((folders, target),) = door.compared
    assert folders == [tmp_path / "a", tmp_path / "b"]
    assert target.parent == Path("reports")
    ended = door("report", "run=[a,c]")
    assert ended.code == 2
    assert "There is no run folder 'c'" in ended.err


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_mistake_in_a_process_of_a_launcher_is_told(launcher: str, tmp_path: Path) -> None:
    package = f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher"
    pytest.importorskip(package, reason=f"the launcher {launcher} is not installed")
    words = ["-m", "mpsearch", "search", "--multirun", f"hydra/launcher={launcher}", "seed=1,-1"]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(
        [sys.executable, *words, "n_trials=3", "n_seeds=0"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert ended.returncode == 2
    assert "mpsearch: seed must be an integer of at least 0; got -1." in ended.stderr
    (folder,) = (tmp_path / "reports").iterdir()
    assert (folder / "0" / "report.md").exists()
    assert not (folder / "1").exists()


def test_quantizer_of_names_become_nodes(door: Door) -> None:
    for words in (
        ["quantizer_of.w2=percentile", "quantizer_of.w3=round_to_nearest"],
        ["quantizer_of={w2: percentile, w3: round_to_nearest}"],
    ):
        assert door("search", *words).code == 0
        nodes = door.last.settings["quantizer_of"]
        assert list(nodes) == ["w2", "w3"]
        assert nodes["w2"]["_target_"] == "mpsearch.quantizers.percentile.Percentile"
    assert door("search", "--multirun", "quantizer_of.w2=percentile,clip_search").code == 0
    assert [len(call.settings["quantizer_of"]["w2"]) for call in door.calls[-2:]] == [2, 3]


def test_config_dir_adds_options_and_configs(door: Door, tmp_path: Path) -> None:
    (tmp_path / "mine/quantizer").mkdir(parents=True)
    (tmp_path / "mine/quantizer/spiral.yaml").write_text("_target_: my_pkg.takes\nsteps: 4\n")
    (tmp_path / "mine/my.yaml").write_text("defaults: [search, quantizer@quantizer_of.w3: spiral, _self_]\nn_trials: 11\n")
    assert door("search", "--config-dir", "mine", "quantizer_of.w2=spiral").code == 0
    assert door.last.settings["quantizer_of"]["w2"]["steps"] == 4
    assert "Did you mean 'spiral'?" in door("search", "--config-dir", "mine", "quantizer_of.w2=spirl").err
    assert door("search", "--config-dir", "mine", "--config-name", "my").code == 0
    assert (door.last.settings["n_trials"], list(door.last.settings["quantizer_of"])) == (11, ["w3"])
    assert "Did you mean 'n_trials'" in door("search", "--config-dir", "mine", "--config-name", "my", "n_trals=1").err
    run = door.last.folder
    assert "trust=true" in door("search", f"run={run}").err, "it names code of the user's"
    assert door("search", f"run={run}", "trust=true").code == 0, "what came from a config directory lies in the saved config"
    assert door.last.settings["quantizer_of"]["w3"]["steps"] == 4


class TestBuild:
    def outcome(self, door: Door, *words: str) -> Any:
        built = []
        door.then = lambda call: built.append(call.build("model"))
        ended = door("search", "model=custom", *words)
        return built[0] if built else ended

    def test_builds_and_takes_extra_arguments_as_they_are(self, door: Door, my_pkg: Path) -> None:
        extra = Call("x", {}, None, my_pkg)  # a dataclass, which Hydra would take for a config
        door.then = lambda call: door.calls.append(call.build("model", other=extra))
        assert door("search", "model=custom", "model._target_=my_pkg.takes", "+model.width=3").code == 0
        assert door.calls[-1] == {"width": 3, "other": extra}
        assert door.calls[-1]["other"] is extra

    def test_partial_waits(self, door: Door, my_pkg: Path) -> None:
        assert self.outcome(door, "model._target_=my_pkg.net", "+model._partial_=true")(width=4) == ("net", 4, 2)

    def test_dotted_keys(self, door: Door, my_pkg: Path) -> None:
        built = []
        door.then = lambda call: built.append(call.build("scheme.w4"))
        assert door("search", "scheme.w4._target_=my_pkg.takes").code == 0
        assert built[0] == {"bits": 4, "group_size": "channel", "symmetric": True, "scale_dtype": "float16", "input": None}

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (["model._target_=nopkg.net"], "model (nopkg.net) cannot be imported: No module named 'nopkg'"),
            (["model._target_=my_pkg.absent"], "model (my_pkg.absent) cannot be imported"),
            (["model._target_=my_pkg.net"], "model.width must be given: +model.width=VALUE"),
            (
                ["model._target_=my_pkg.net", "+model.width=1", "+model.dpth=3"],
                "model has no argument 'dpth'. Did you mean 'depth'",
            ),
            (["model._target_=my_pkg.nothing", "+model.x=3"], "model has no argument 'x'."),
            (["model._target_=my_pkg.no_file"], "model (my_pkg.no_file) cannot be built: no such weights"),
            (["model._target_=my_pkg.picky", "+model.n=-1"], "mpsearch: n must be 0 or more; got -1."),
            (["~model"], "model must be given"),
        ],
    )
    def test_mistakes(self, words: list[str], sentence: str, door: Door, my_pkg: Path) -> None:
        if words == ["~model"]:
            door.then = lambda call: call.build("model")
            ended = door("search", "hydra.run.dir=reports/a", "~model")
        else:
            ended = self.outcome(door, *words)
        assert ended.code == 2
        assert sentence in ended.err
        assert ended.err.count("\n") == 1
        assert not list(Path("reports").iterdir())

    def test_a_bug_keeps_its_traceback(self, door: Door, my_pkg: Path) -> None:
        with pytest.raises(RuntimeError, match="a bug"):
            self.outcome(door, "model._target_=my_pkg.bug")


def test_a_commands_own_errors(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(call: Call) -> None:
        raise InputError("too\nsmall")

    door.then = fail
    ended = door("search")
    assert (ended.code, ended.err) == (2, "mpsearch: too small\n")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(InputError, match="too"):
        door("search")


def test_interrupted(door: Door) -> None:
    def interrupt(call: Call) -> None:
        raise KeyboardInterrupt

    door.then = interrupt
    ended = door("search", "hydra.run.dir=reports/a")
    assert ended.code == 130
    assert ended.err == "mpsearch: interrupted. Resume with: mpsearch search run=reports/a\n"
    assert door("sensitivity").err == "mpsearch: interrupted.\n"


def test_terminated(door: Door) -> None:
    """As an interrupt, with a hint that holds what the saved config does not."""
    before = signal.getsignal(signal.SIGTERM)
    door.then = lambda call: os.kill(os.getpid(), signal.SIGTERM)
    ended = door("search", "hydra.run.dir='reports/a b'", "study.mirror=sqlite:///t.db")
    assert ended.code == 143
    again = "mpsearch search 'run=reports/a b' study.mirror=sqlite:///t.db"
    assert ended.err == f"mpsearch: terminated. Resume with: {again}\n"
    assert "study.mirror is not saved" in ended.out
    assert signal.getsignal(signal.SIGTERM) is before
    door.then = lambda call: None
    assert door(*shlex.split(again)[1:]).code == 0
    assert door.last.settings["study"]["mirror"] == "sqlite:///t.db"
    assert door("search", "run=reports/a b").code == 0
    assert door.last.settings["study"]["mirror"] is None


@pytest.mark.parametrize("executor", ["in_process", "local", "dask", "ray"])
def test_trials_in_flight_do_not_depend_on_the_executor(executor: str, door: Door) -> None:
    assert door("search", f"executor={executor}", *["executor.address=tcp://a:1"] * (executor == "dask")).code == 0
    assert door.last.settings["study"]["in_flight"] == 4


class TestRun:
    @pytest.fixture
    def run(self, door: Door) -> Path:
        assert (
            door("search", "hydra.run.dir=reports/a", "n_trials=7", "seed=3", "quantizer_of.w2=percentile", "scheme=[w2,w8]").code
            == 0
        )
        return door.last.folder

    def test_goes_on_with_the_saved_config(self, run: Path, door: Door, tmp_path: Path) -> None:
        before = door.last.settings
        for word in ("run=reports/a", "run='reports/a/'", f"run={run}"):
            assert door("search", word).code == 0
            assert door.last.folder == run
            assert door.last.settings == before | {"run": str(run)}
            assert saved(run) == before
        assert [path.name for path in (tmp_path / "reports").iterdir()] == ["a"]

    def test_what_may_differ_is_kept(self, run: Path, door: Door) -> None:
        assert door("search", "run=reports/a", "n_trials=9", "max_seconds=2.5", "device=cuda").code == 0
        assert door("search", "run=reports/a").code == 0
        assert [door.last.settings[key] for key in ("n_trials", "max_seconds", "device", "seed")] == [9, 2.5, "cuda", 3]

    @pytest.mark.slow
    def test_another_executor_has_none_of_the_old_ones_arguments(self, run: Path, door: Door) -> None:
        first = "mpsearch.executors.in_process.InProcess"
        assert door.last.settings["executor"] == {"_target_": first, "threads": None}
        for words, target, given in (
            (["executor=local", "executor.workers=3"], "local.Local", {"workers": 3, "threads": 1}),
            (["executor.workers=4"], "local.Local", {"workers": 4, "threads": 1}),
            (
                ["executor.threads=2", "executor=dask", "executor.address=tcp://a:1"],
                "dask.Dask",
                {"address": "tcp://a:1", "threads": 2},
            ),
            (["trust=true"], "dask.Dask", {"address": "tcp://a:1", "threads": 2}),
            (["executor=in_process"], "in_process.InProcess", {"threads": None}),
        ):
            assert door("search", "run=reports/a", *words).code == 0
            assert door.last.settings["executor"] == {"_target_": f"mpsearch.executors.{target}", **given}
            assert saved(run)["executor"] == door.last.settings["executor"]
        assert "There is no executor 'locl'" in door("search", "run=reports/a", "executor=locl").err
        assert "executor.address must be given" in door("search", "run=reports/a", "executor=dask").err
        assert "There is no key 'executor.workers'" in door("search", "run=reports/a", "executor.workers=2").err

    def test_a_second_process_is_refused_and_changes_nothing(self, run: Path, door: Door) -> None:
        def contents() -> dict[Path, tuple[bytes, int]]:
            return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("reports").rglob("*") if path.is_file()}

        before, n_calls = contents(), len(door.calls)
        with locked(run):
            for words in (["run=reports/a", "n_trials=9", "executor=local"], ["hydra.run.dir=reports/a"]):
                ended = door("search", *words)
                assert ended.code == 2
                assert "Another process is at work" in ended.err
            assert contents() == before
            assert len(door.calls) == n_calls
            for command in ("report", "export"):
                assert door(command, "run=reports/a").code == 0, "they read, and do not wait"
            with locked(run.with_name("b")):
                assert "Another process is at work" in door("search", "hydra.run.dir=reports/b").err
            assert run.with_name("b").is_dir(), "what another process has begun is not removed"

    def test_what_may_not_differ(self, run: Path, door: Door) -> None:
        for word in ("seed=4", "model=resnet20", "equalizer=awq", "quantizer_of.w2=clip_search", "+x=1"):
            ended = door("search", "run=reports/a", word)
            assert ended.code == 2
            may = "n_trials, max_seconds, device, executor, study.mirror, confirm.n_points, confirm.finetune_steps, "
            may += "verify can."
            assert f"'{word.partition('=')[0].lstrip('+')}' cannot change when a run is resumed; {may}" in ended.err
        assert "--multirun" in door("search", "run=reports/a", "--multirun").err
        assert "n_trials must be" in door("search", "run=reports/a", "n_trials=x").err
        assert saved(run)["n_trials"] == 7

    def test_shows_the_saved_config(self, run: Path, door: Door) -> None:
        assert "\nseed: 3\n" in door("search", "--cfg", "job", "run=reports/a", "device=cuda").out

    @pytest.mark.parametrize(
        "name",
        [
            "it's (1), a=${oc.env:HOME}",
            *(
                pytest.param(name, marks=pytest.mark.slow)
                for name in (
                    *("it's (1), a=b", "${oc.env:HOME}", "~tilde", "~", "null", "a\\b", "a\\", "a\\\\'b", "${", "\\${x}"),
                    *("a b  c", "'a'", '"a"', "'", "a,b", "[a]", "{a: b}", "$HOME", "%s", "éß漢", "-x", "a:b", "=", "\t", "?"),
                )
            ),
        ],
    )
    def test_strange_names(self, name: str, run: Path, door: Door, tmp_path: Path) -> None:
        strange = run.rename(run.with_name(name))
        for command in ("search", "report", "export", "solve", "finetune"):
            for word in (f"run={strange}", f"run=reports/{name}"):
                ended = door(command, word)
                assert (ended.code, ended.err) == (0, "")
                assert (door.last.folder, door.last.settings["run"]) == (strange, str(strange))
        assert [path.name for path in (tmp_path / "reports").iterdir()] == [name]
        os.chdir("reports")
        assert door("search", f"run=./{name}").code == 0
        assert door.last.folder == strange
        told = shlex.split(f"mpsearch report {run_option(strange)}")[1:]
        assert door(*told).code == 0
        assert door.last.folder == strange

    @pytest.mark.parametrize("command", ["search", "report", "export"])
    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (None, "has no config.yaml"),
            (b"a: [1\n", "cannot be read"),
            (b"\x00\xff", "cannot be read"),
            (b"", "is not the config of a run"),
            (b"- 1", "is not the config of a run"),
            (b"a: 1", "is not the config of a run"),
        ],
    )
    def test_no_run(self, command: str, content: bytes | None, sentence: str, door: Door, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        if content is not None:
            (tmp_path / "a/config.yaml").write_bytes(content)
        ended = door(command, "run=a")
        assert ended.code == 2
        assert sentence in ended.err
        assert ended.err.count("\n") == 1

    def test_a_sensitivity_run_is_no_search(self, door: Door) -> None:
        assert door("sensitivity", "hydra.run.dir=s").code == 0
        assert "is no run of mpsearch search" in door("search", "run=s").err
        assert door("report", "run=s").code == 0

    def test_report_and_export_see_the_settings_of_the_run(self, run: Path, door: Door, tmp_path: Path) -> None:
        before = saved(run)
        assert door("report", "run=reports/a").code == 0
        assert door.last.settings == before | {"run": str(run)}
        assert door("export", "run=reports/a", "pick.max_bytes=120kB", "pick.bits=3.2", "device=cuda").code == 0
        assert door.last.settings["pick"] == {
            "max_bytes": "120kB",
            "bits": 3.2,
            "max_ms": None,
            "max_drop": None,
            "min_quality": None,
            "max_quality": None,
            "point": None,
        }
        assert "exporter" not in door.last.settings, "the run's runtime says"
        assert (door.last.settings["device"], door.last.settings["seed"]) == ("cuda", 3)
        assert saved(run) == before
        assert door("export", "run=reports/a", "exporter=packed").code == 0
        assert door.last.settings["exporter"] == {"_target_": "mpsearch.exporters.packed.Packed"}
        assert "Did you mean 'pick.max_bytes'" in door("export", "run=reports/a", "max_bytes=1").err
        assert [path.name for path in (tmp_path / "reports").iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("mpsearch ", "search sensitivity hardware solve finetune report watch export verify"),
        ("mpsearch s", "search sensitivity solve"),
        ("mpsearch search bud", "budget."),
        ("mpsearch search budget.by", "budget.bytes="),
        ("mpsearch search model=resnet2", "model=resnet20"),
        ("mpsearch  search n_trials=3 quantizer=p", "quantizer=percentile"),
        ("mpsearch export pick.max_b", "pick.max_bytes="),
        ("mpsearch nothing x", ""),
        ("mpsearch search a==3 b", ""),
    ],
)
def test_completion(line: str, offered: str, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    ended = door("-sc", "query=bash")
    assert (ended.out.strip(), ended.err) == (offered, "")


def test_completion_script_is_for_mpsearch(tmp_path: Path) -> None:
    for words in (["search", "-sc", "install=bash"], ["-sc", "install=bash"]):
        ended = shell(*words, cwd=tmp_path)
        assert ended.returncode == 0
        assert ended.stdout.rstrip().endswith("-F hydra_bash_completion mpsearch")
