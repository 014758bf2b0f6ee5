"""The words of the command line as Hydra takes them: what its grammar does not know is translated before it starts.

`run=` names a run's folder with its saved config, `quantizer_of.w2=x` is a choice from a config group, and the shell's completion
passes a line that holds the command. Nothing is composed here.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpsearch.cli.saved_config import FILE, primary, require_trust, saved
from mpsearch.errors import InputError
from mpsearch.registry import must_be_given

# What may differ from the saved config when a run is resumed; anything else would change what its trials mean.
RESUMABLE = (
    "n_trials",
    "max_seconds",
    "device",
    "executor",
    "study.mirror",
    "confirm.n_points",
    "confirm.finetune_steps",
    "verify",
)

READING = ("report", "watch")  # build nothing that a saved config names


@dataclass(frozen=True)
class Arguments:
    """A command line: `overrides` and flags for Hydra, and the folder and the saved config of the run that it names."""

    overrides: list[str]
    run: Path | None = None
    config: dict[str, Any] | None = None
    resumed: bool = False
    runs: list[Path] = field(default_factory=list)  # of a comparison
    own_code: bool = False  # names the user's own classes, which may lie in the working directory


def complete(words: list[str], commands: Collection[str]) -> list[str]:
    """Hydra's shell script knows no commands: complete them here, cut a complete one out of the line, and pass on."""
    if not any(word.startswith("query=") for word in words):
        return ["search", *words]  # install= and uninstall= print the same script for every command
    line = os.environ.get("COMP_LINE", "")
    typed = line.split()[1:]
    if not typed or (len(typed) == 1 and not line.endswith(" ")):
        print(" ".join(name for name in commands if name.startswith(typed[0] if typed else "")))
        return []
    if typed[0] not in commands:
        return []
    os.environ["COMP_LINE"] = re.sub(r"^(\s*\S+)\s+\S+", r"\1", line)
    return [typed[0], *words]


def prepare(command: str, words: list[str]) -> Arguments:
    """The words for Hydra. Raises `InputError` where a saved config names code that is not mpsearch's own and is not trusted."""
    overrides: list[str] = []
    flags: list[str] = []
    keys: list[str] = []
    run = None
    names_run = any(word.startswith("run=") for word in words)
    for word in words:
        key, equals, value = word.partition("=")
        key = key.lstrip("+")
        if not equals or word.startswith(("-", "~")):
            (overrides if word.startswith("~") else flags).append(word)
            continue
        if key in keys:
            raise InputError(f"'{key}' is given twice; give it once.")
        keys.append(key)
        if key == "run" and command == "report" and value[:1] + value[-1:] == "[]" and not Path(value).is_dir():
            return Arguments([], runs=[_required(part.strip()) for part in value[1:-1].split(",")])
        if key == "run":
            run = _folder(value)
        elif key == "quantizer_of":
            pairs = [pair.split(":") for pair in value.strip("{} ").split(",") if pair.strip()]
            if any(len(pair) != 2 for pair in pairs):
                raise InputError(f"'{word}' cannot be read: a quantizer for one scheme is written quantizer_of.w2=percentile.")
            overrides += [f"+quantizer@quantizer_of.{scheme.strip()}={name.strip()}" for scheme, name in pairs]
        elif key == "executor" and names_run:
            overrides.append(f"+executor={value}")  # a choice in the place of what was saved
        elif word == "refiner=null":
            overrides.append("~refiner")  # Hydra takes no null for a choice that has a default
        elif match := re.fullmatch(r"quantizer_of\.([^.]+)", key):
            overrides.append(f"+quantizer@quantizer_of.{match[1]}={value}")
        else:
            overrides.append(word)
    is_sweep = any(word == "-m" or (len(word) > 3 and "--multirun".startswith(word)) for word in words)
    if is_sweep and (run or command in ("solve", "finetune", "report", "export", "verify", "watch")):
        raise InputError("run= names one run, and --multirun starts many. Leave one of them out.")
    if run is None:
        return Arguments([*overrides, *flags], own_code=True)  # Hydra's parser knows no flag among the overrides
    return _of_saved(command, words, run, keys, overrides, flags)


def _of_saved(command: str, words: list[str], run: Path, keys: list[str], overrides: list[str], flags: list[str]) -> Arguments:
    """The words for Hydra where a run is named; `keys` are those that were given."""
    config = saved(run)
    if "executor" in keys:  # another one, with none of the old one's arguments
        config.pop("executor", None)
    trusted = any(re.fullmatch(r"\+*trust=true", word, re.IGNORECASE) for word in words)
    if command not in READING and not trusted:
        require_trust(config, run, command, words)
    own_code = command not in READING and (
        trusted or any("_target_" in w or w.startswith(("--config-", "-cd", "-cp")) for w in words)
    )
    folder = [f"run={quoted(run)}", "hydra.run.dir=."]  # a folder may be named ${, which Hydra's own records cannot hold
    if command != "search":
        return Arguments([*folder, *overrides, *flags], run, config, own_code=own_code)
    if "n_trials" not in config:
        raise InputError(f"'{run}' is no run of mpsearch search, so there is nothing to resume.")
    if missing := sorted(primary(command) - config.keys() - {"executor", "refiner"}):
        raise InputError(f"'{run / FILE}' was saved by another version of mpsearch: it lacks {', '.join(missing)}.")
    for key in keys:
        if key not in ("run", "trust", *RESUMABLE) and not key.startswith(("hydra", "executor.")):
            raise InputError(
                f"'{key}' cannot change when a run is resumed; {', '.join(RESUMABLE)} can. Start a new run without run=."
            )
    overrides = [word for word in overrides if not re.match(r"\+*trust=", word)]
    if config["study"].get("mirror") and "study.mirror" not in keys:
        print("mpsearch: study.mirror is not taken from a saved config; give it again to write the mirror.", file=sys.stderr)
    config["study"]["mirror"] = None
    # The saved config takes the place of search.yaml, which is why --cfg job shows it too.
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="saved", node=config)
    hydra = ["hydra.job.name=search", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    return Arguments([*folder, *hydra, *overrides, *flags, "--config-name", "saved"], run, config, True, own_code=own_code)


def quoted(path: Path) -> str:
    """A path in Hydra's grammar, as OmegaConf reads it: a backslash there is one only before a quote or before `${`."""
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", str(path))
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


def _required(value: str) -> Path:
    """The folder of one of several runs."""
    folder = _folder(value)
    if folder is None or not folder.is_dir():
        raise InputError(f"There is no run folder '{value}'.")
    return folder


def _folder(value: str) -> Path | None:
    """The folder of `run=`; quotes round it belong to the name only where such a folder exists."""
    if not os.path.isdir(value) and len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    if not value:
        raise InputError(must_be_given("run"))
    return None if value == "null" else Path(os.path.expanduser(value)).absolute()
