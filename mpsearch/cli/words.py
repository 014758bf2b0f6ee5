"""The user's words as Hydra needs them: what its grammar does not know is translated before it starts.

`run=` leads to a run's folder and the config saved in it, `quantizer_of.w2=x` is a choice from a config group, and the shell's
completion has a command in the line. Nothing here composes a config; that is Hydra's, afterwards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

from mpsearch.cli.refusals import must_be_given, one_line
from mpsearch.errors import InputError
from mpsearch.files import write_atomically

# What may differ from the saved config when a run goes on; anything else would change what its trials mean.
RESUMABLE = ("n_trials", "max_seconds", "device", "executor", "study.mirror", "confirm.finetune_steps")


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


def prepare(command: str, words: list[str]) -> tuple[list[str], bool]:
    """The words for Hydra, and whether they go on with a run that was interrupted."""
    overrides: list[str] = []
    flags: list[str] = []
    keys: list[str] = []
    run = None
    for word in words:
        key, equals, value = word.partition("=")
        key = key.lstrip("+")
        if not equals or word.startswith(("-", "~")):
            (overrides if word.startswith("~") else flags).append(word)
            continue
        if key in keys:
            raise InputError(f"'{key}' is given twice; give it once.")
        keys.append(key)
        if key == "run":
            if not _unquoted(value):
                raise InputError(must_be_given("run"))
            run = None if value == "null" else Path(_unquoted(value)).expanduser().absolute()
        elif key == "quantizer_of":
            pairs = [pair.split(":") for pair in value.strip("{} ").split(",") if pair.strip()]
            if any(len(pair) != 2 for pair in pairs):
                raise InputError(f"'{word}' cannot be read: a quantizer for one scheme is written quantizer_of.w2=percentile.")
            overrides += [f"+quantizer@quantizer_of.{scheme.strip()}={name.strip()}" for scheme, name in pairs]
        elif key == "executor" and run is not None:
            overrides.append(f"+executor={value}")  # a choice in the place of what was saved
        elif match := re.fullmatch(r"quantizer_of\.([^.]+)", key):
            overrides.append(f"+quantizer@quantizer_of.{match[1]}={value}")
        else:
            overrides.append(word)
    is_sweep = any(word == "-m" or (len(word) > 3 and "--multirun".startswith(word)) for word in words)
    if is_sweep and (run or command in ("solve", "finetune", "report", "export")):
        raise InputError("run= names one run, and --multirun starts many. Leave one of them out.")
    if run is None:
        return [*overrides, *flags], False  # Hydra's parser knows no flag among the overrides
    config = saved(run)
    if command != "search":
        return [_run_option(run), *overrides, *flags], False
    if "n_trials" not in config:
        raise InputError(f"'{run}' is no run of mpsearch search, so there is nothing to go on with.")
    for key in keys:
        if key not in ("run", *RESUMABLE) and not key.startswith(("hydra", "executor.")):
            raise InputError(
                f"'{key}' cannot change when a run goes on; {', '.join(RESUMABLE)} can. Start a new run without run=."
            )
    if "executor" in keys:  # another one, with none of the old one's arguments
        del config["executor"]
    # The saved config takes the place of search.yaml, which is why --cfg job shows it too.
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="saved", node=config)
    hydra = ["hydra.job.name=search", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    folder = [_run_option(run), _run_option(run, "hydra.run.dir")]
    return [*folder, *hydra, *overrides, *flags, "--config-name", "saved"], True


def saved(run: Path) -> dict[str, Any]:
    """The config that a run was made with."""
    from omegaconf import OmegaConf

    path = run / "config.yaml"
    if not run.is_dir():
        raise InputError(f"There is no run folder '{run}'.")
    if not path.is_file():
        raise InputError(f"'{run}' has no config.yaml, so it is no run of mpsearch.")
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        raise InputError(f"'{path}' cannot be read, so the run cannot be used: {one_line(error)}") from error
    if not isinstance(config, dict) or not {"model", "task", "scheme"} <= config.keys():
        raise InputError(f"'{path}' is not the config of a run: model, task or scheme is missing.")
    return cast(dict[str, Any], config)


def save(settings: dict[str, Any], path: Path) -> None:
    """Writes the config of a run: whole or not at all."""
    from omegaconf import OmegaConf

    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(settings)))


def _run_option(run: Path, key: str = "run") -> str:
    """`run='...'` in Hydra's grammar."""
    return f"{key}='" + str(run).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
