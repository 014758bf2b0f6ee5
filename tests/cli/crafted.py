"""Run folders made to run code or to write files when mpsearch reads them: each case changes the saved config of a real run.

Whatever a case runs leaves the file `Evil.canary` behind, so that a test sees it.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

SECRET = "a-secret-of-the-environment"


class _Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


@dataclass(frozen=True)
class Evil:
    """The files of an attacker in `folder`, and the file that shows that one of them was run."""

    folder: Path
    canary: Path

    def write(self) -> None:
        """Pickles of all kinds, and a module that is run where it is imported."""
        touch = _Touch(self.canary)
        (self.folder / "evil.pkl").write_bytes(pickle.dumps(touch))
        np.save(self.folder / "evil.npy", np.array([touch], dtype=object), allow_pickle=True)
        torch.save(touch, self.folder / "evil.pt")
        (self.folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(self.canary)!r}).touch()\nname = 'x'\n")

    @property
    def command(self) -> str:
        return f"touch '{self.canary}'"

    @property
    def code(self) -> str:
        return f"open({str(self.canary)!r}, 'w').close()"

    def file(self, suffix: str) -> str:
        return str(self.folder / f"evil.{suffix}")

    @property
    def node(self) -> dict[str, Any]:
        """The plainest attack that Hydra's own list of forbidden targets lets pass."""
        return {"_target_": "pandas.read_pickle", "filepath_or_buffer": self.file("pkl")}


Case = Callable[[dict[str, Any], Evil], str | None]  # changes the config, or returns the text of another one
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    """Register a function as a case."""
    return functools.partial(CASES.setdefault, name)


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key."""
    *parents, last = key.split(".")
    for parent in parents:
        if config.get(parent) is None:
            config[parent] = {}
        config = config[parent]
    config[last] = value


def _node(name: str, key: str, node: Callable[[Evil], Any]) -> None:
    @case(name)
    def change(config: dict[str, Any], evil: Evil) -> None:
        put(config, key, node(evil))


# What a `_target_` outside the registries does, where every command looked: in a scheme.
CALLS: dict[str, Callable[[Evil], dict[str, Any]]] = {
    "pandas.read_pickle": lambda e: {"_args_": [e.file("pkl")]},
    "pandas.io.pickle.read_pickle": lambda e: {"filepath_or_buffer": e.file("pkl")},
    "mpsearch.reporting.tables.pd.io.pickle.read_pickle": lambda e: {"filepath_or_buffer": e.file("pkl")},
    "mpsearch.reporting.tables.pd.read_pickle": lambda e: {"_args_": [e.file("pkl")]},
    "mpsearch.tasks.cifar10.pickle.load": lambda e: {
        "_args_": [{"_target_": "builtins.open", "file": e.file("pkl"), "mode": "rb"}]
    },
    "pickle.load": lambda e: {"_args_": [{"_target_": "io.open", "file": e.file("pkl"), "mode": "rb"}]},
    "joblib.load": lambda e: {"filename": e.file("pkl")},
    "numpy.load": lambda e: {"file": e.file("npy"), "allow_pickle": True},
    "mpsearch.runs.run.np.load": lambda e: {"file": e.file("npy"), "allow_pickle": True},
    "torch.load": lambda e: {"f": e.file("pt"), "weights_only": False},
    "torch.serialization.load": lambda e: {"f": e.file("pt"), "weights_only": False},
    "mpsearch.models.efficientnet.torch.load": lambda e: {"f": e.file("pt"), "weights_only": False},
    "shutil.copy": lambda e: {"src": e.file("py"), "dst": str(e.canary)},
    "shutil.move": lambda e: {"src": e.file("py"), "dst": str(e.canary)},
    "urllib.request.urlretrieve": lambda e: {"url": f"file://{e.file('py')}", "filename": str(e.canary)},
    "os.system": lambda e: {"command": e.command},
    "posix.system": lambda e: {"command": e.command},
    "mpsearch.cli.os.system": lambda e: {"command": e.command},
    "mpsearch.executors.local.os.mkdir": lambda e: {"path": str(e.canary)},
    "os.makedirs": lambda e: {"name": str(e.canary)},
    "builtins.eval": lambda e: {"_args_": [e.code]},
    "builtins.exec": lambda e: {"_args_": [e.code]},
    "builtins.open": lambda e: {"file": str(e.canary), "mode": "w"},
    "subprocess.Popen": lambda e: {"args": ["touch", str(e.canary)]},
    "subprocess.check_output": lambda e: {"_args_": [["touch", str(e.canary)]]},
    "runpy.run_path": lambda e: {"path_name": e.file("py")},
    "logging.FileHandler": lambda e: {"filename": str(e.canary)},
    "numpy.savetxt": lambda e: {"fname": str(e.canary), "X": [1, 2]},
    "pathlib.Path.touch": lambda e: {"_args_": [{"_target_": "pathlib.Path", "_args_": [str(e.canary)]}]},
    "mpsearch.runs.run.write_atomically": lambda e: {
        "file": {"_target_": "pathlib.Path", "_args_": [str(e.canary)]},
        "content": "x",
    },
    "mpsearch.cli.arguments.save": lambda e: {"settings": {}, "path": {"_target_": "pathlib.Path", "_args_": [str(e.canary)]}},
    "hydra.utils.instantiate": lambda e: {"_recursive_": False, "config": e.node},
    "hydra.utils.call": lambda e: {"_recursive_": False, "config": e.node},
    "hydra.utils.get_method": lambda e: {"path": "evil.name"},
    "hydra.utils.get_object": lambda e: {"path": "evil.name"},
    "importlib.import_module": lambda e: {"name": "evil"},
    "mpsearch.schemes.base.importlib.import_module": lambda e: {"name": "evil"},
    "evil.name": lambda e: {},
    "functools.reduce": lambda e: {"_args_": [{"_target_": "hydra.utils.get_method", "path": "os.system"}, [e.command, 0]]},
}
for target, arguments in CALLS.items():
    _node(target, "scheme.zz", lambda e, t=target, a=arguments: {"_target_": t, **a(e)})  # type: ignore[misc]

# The same where only some commands looked.
PLACES = (
    *("model", "task", "quantizer", "equalizer", "metric", "sampler", "runtime", "executor", "cost.zz", "quantizer_of.w2"),
    *("exporter", "pick", "study", "confirm", "zz"),
)
for key in PLACES:
    _node(f"{key} is a node", key, lambda e: e.node)
INSIDE = (
    "scheme.w2.bits",
    "scheme.w2.input.scale",
    "model.zz",
    "task.n_calibration",
    "quantizer.damping",
    "n_trials",
    "budget.bits",
)
for key in INSIDE:
    _node(f"{key} is a node", key, lambda e: e.node)
_node("a list holds a node", "task.batch_size", lambda e: [1, [e.node]])
_node("a partial sampler", "sampler", lambda e: {**e.node, "_partial_": True})
_node("a partial scheme", "scheme.zz", lambda e: {"_target_": "functools.partial", "_args_": [e.node]})
_node("outliers of a node", "scheme.zz", lambda e: {"_target_": "mpsearch.schemes.outliers.Outliers", "dense": e.node})
_node("arguments by position", "scheme.w2._args_", lambda e: [e.node])
_node("a target that is a node", "scheme.zz", lambda e: {"_target_": e.node})
_node("a target in capitals", "scheme.zz", lambda e: {"_target_": "OS.system", "command": e.command})

# What Hydra itself would build, and the mirror.
_node("hydra.callbacks", "hydra.callbacks.zz", lambda e: e.node)
_node(
    "hydra.job_logging",
    "hydra.job_logging",
    lambda e: {"version": 1, "handlers": {"zz": {"()": "os.system", "command": e.command}}, "root": {"handlers": ["zz"]}},
)
_node(
    "hydra.hydra_logging",
    "hydra.hydra_logging",
    lambda e: {"version": 1, "handlers": {"zz": {"()": "os.system", "command": e.command}}, "root": {"handlers": ["zz"]}},
)
_node("hydra.launcher", "hydra", lambda e: {"mode": "MULTIRUN", "launcher": e.node})
_node("hydra.sweeper", "hydra", lambda e: {"mode": "MULTIRUN", "sweeper": e.node})
_node("hydra.run.dir", "hydra", lambda e: {"run": {"dir": str(e.canary)}})
_node("study.mirror of a resolver", "study.mirror", lambda e: f"sqlite:///${{oc.env:HOME}}/../{e.canary}")


@case("defaults of an attacker")
def _(config: dict[str, Any], evil: Evil) -> None:
    (evil.folder / "conf").mkdir()
    (evil.folder / "conf/zz.yaml").write_text(yaml.safe_dump({"scheme": {"zz": evil.node}}))
    config["defaults"] = ["zz", "_self_"]
    config["hydra"] = {"searchpath": [f"file://{evil.folder}/conf"]}


for resolver in ("${oc.env:SECRET}", "${oc.decode:'${oc.env:SECRET}'}", "x${oc.env:SECRET}"):
    _node(f"the interpolation {resolver}", "pin", lambda e, r=resolver: [r])  # type: ignore[misc]


def _text(name: str, text: Callable[[Evil], str]) -> None:
    @case(name)
    def change(config: dict[str, Any], evil: Evil) -> str:
        return yaml.safe_dump(config) + text(evil)


_text("a tag that calls", lambda e: f'zz: !!python/object/apply:os.system ["{e.command}"]\n')
_text("a tag that makes", lambda e: f"zz: !!python/object/new:subprocess.Popen [[touch, '{e.canary}']]\n")
_text("a tag that evaluates", lambda e: f'zz: !!python/object/apply:builtins.eval ["{e.code}"]\n')
_text("a tag that imports", lambda e: "zz: !!python/module:evil\n")
_text("a tag that names", lambda e: "zz: !!python/name:evil.name\n")
_text("a path by a tag", lambda e: "zz: !!python/object/apply:pathlib.PosixPath [a]\n")


def bombs() -> Iterator[tuple[str, str]]:
    """Texts that are short and would take all memory, or all of the stack, when they are read."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(12)]
    yield "a billion laughs", "\n".join(lines) + "\n"
    yield "a list in itself", "zz: &a [*a]\n"
    yield "deep nesting", "zz: " + "[" * 20_000 + "]" * 20_000 + "\n"
    yield "deep mappings", "zz: " + "{a: " * 20_000 + "}" * 20_000 + "\n"
    yield "merged keys", "zz: &a {b: 1}\nzy: {<<: *a}\n"


for name, bomb in bombs():
    _text(name, lambda e, b=bomb: b)  # type: ignore[misc]
