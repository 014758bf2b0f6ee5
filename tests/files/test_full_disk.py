"""A disk that is full at any write: one sentence, no temporaries, and what was measured is there when the run goes on."""

import errno
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext

import pandas as pd
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mpsearch import files
from mpsearch.cli.build import build_object
from mpsearch.cli.commands import report, search, sensitivity, solve
from mpsearch.errors import InputError

MEASURED = ["measured_ms", "measured_ms_low", "measured_ms_high"]
WORDS = ["scheme=[w4,w8]", "quantizer=clip_search", "metric=weight_mse", "n_trials=3", "n_seeds=1"]


class Disk:
    """Stands in for `os` in `mpsearch.files`: after `left` operations a last write stores half of its data, then all fail."""

    def __init__(self, left=10**9, number=errno.ENOSPC):
        self.left, self.number, self.n, self.is_torn = left, number, 0, False

    def __getattr__(self, name):
        return getattr(os, name)

    def _check(self):
        if self.n >= self.left:
            raise OSError(self.number, os.strerror(self.number))
        self.n += 1

    def write(self, descriptor, data):
        if self.n >= self.left and not self.is_torn and len(data) > 1:
            self.is_torn = True
            return os.write(descriptor, data[: len(data) // 2])
        self._check()
        return os.write(descriptor, data)

    def fsync(self, descriptor):
        self._check()
        os.fsync(descriptor)

    def replace(self, source, target):
        self._check()
        os.replace(source, target)


@pytest.fixture
def commands(tiny, tmp_path, monkeypatch, undrawn):
    """`commands(search, folder, disk)` runs a command on a tiny network."""
    with initialize_config_module("mpsearch.conf", version_base="1.3"):
        settings = OmegaConf.to_container(compose("search", WORDS))
    monkeypatch.setattr("mpsearch.pipeline.evaluators.LATENCY_SECONDS", 0.001)

    def build(key, **extra):
        made = {"model": tiny.net, "task": functools.partial(tiny.task, n=12)}
        return made[key]() if key in made else build_object(settings, key, **extra)

    def run(command, folder, disk=None, **own):
        monkeypatch.setattr(files, "os", os)
        with files.locked(folder) if command in (search, sensitivity) else nullcontext():  # as the command line does
            monkeypatch.setattr(files, "os", disk or os)
            command({**settings, **own}, build, folder)

    return run


def without_times(folder, name):
    table = pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False)
    return table.drop(columns=["seconds", "crc", *MEASURED], errors="ignore")


def assert_sound(folder):
    """No temporary and no torn row."""
    assert not list(folder.rglob("*.tmp"))
    for file in folder.glob("*.csv"):
        assert file.stat().st_size == 0 or file.read_bytes().endswith(b"\n"), file


@pytest.mark.filterwarnings("ignore:Quantized weights cannot be kept")
def test_a_search_stopped_at_every_write_goes_on_to_the_same_tables(commands, tmp_path):
    """Each attempt has room for a little more than the one before; together they fail at every operation there is."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    commands(search, whole)
    left, n_stopped, rows = 0, 0, 0
    while True:
        disk = Disk(left)
        try:
            commands(search, stopped, disk)
            break
        except InputError as error:
            sentence = str(error)
        assert "no space is left on the disk. Free some space, then run the command again." in sentence
        assert "\n" not in sentence
        assert_sound(stopped)
        n_stopped += 1
        table = stopped / "evaluations.csv"
        now = len(table.read_bytes().splitlines()) if table.exists() else 0
        assert now >= rows, "nothing measured is lost"
        left, rows = left + 1 if now == rows else 1, now
    assert n_stopped > 20
    for name in ("sensitivity", "evaluations", "front", "uniform", "confirm"):
        pd.testing.assert_frame_equal(without_times(whole, name), without_times(stopped, name))


@pytest.fixture
def finished(commands, tmp_path):
    """The folder of a search that is done."""
    commands(search, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("command", "own"),
    [
        (report, {}),
        (sensitivity, {}),
        (solve, {"budget": {"bits": 8}, "max_drop": None}),
    ],
)
@pytest.mark.filterwarnings("ignore:Quantized weights cannot be kept")
def test_a_command_stopped_at_every_write_says_so(commands, finished, tmp_path, command, own):
    start = tmp_path / "start"
    if command is sensitivity:
        start.mkdir()
    else:
        shutil.copytree(finished, start)
    n_stopped = 0
    for left in range(200):
        shutil.rmtree(tmp_path / "now", ignore_errors=True)
        now = shutil.copytree(start, tmp_path / "now")
        before = {path: path.read_bytes() for path in (now / "evaluations.csv", now / "sensitivity.csv") if path.exists()}
        try:
            commands(command, now, Disk(left), **own)
            break
        except InputError as error:
            sentence = str(error)
        assert "no space is left on the disk" in sentence
        n_stopped += 1
        assert_sound(now)
        assert all(path.read_bytes().startswith(content) for path, content in before.items())
        if command is not sensitivity:
            commands(report, now)
    assert 5 < n_stopped < 199


@pytest.mark.filterwarnings("ignore:Quantized weights cannot be kept")
def test_a_folder_that_vanishes_is_named(commands, tmp_path):
    folder = tmp_path / "run"

    class Vanishing(Disk):
        def _check(self):
            self.n += 1
            if self.n > self.left:
                shutil.rmtree(folder, ignore_errors=True)

    for left in (0, 30, 60):
        with pytest.raises(
            InputError, match=r"cannot be written: the file or its folder does not exist \(any more\)\. Restore it"
        ):
            commands(search, folder, Vanishing(left))
        assert not folder.exists() or assert_sound(folder) is None


@pytest.mark.parametrize("limit", [1_000, 20_000])
@pytest.mark.thin(2)
def test_a_limit_on_the_size_of_files_is_one_sentence_and_exit_code_2(tmp_path, limit):
    """The limit of the operating system, in a process of its own: on config.yaml, and on what is written later."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = "import sys, torch; torch.set_num_threads(1); from mpsearch.cli import main; sys.argv[0] = 'mpsearch'; main()"
    words = ["sensitivity", "scheme=[w4]", "quantizer=clip_search", "metric=weight_mse", "hydra.run.dir=run"]
    ended = subprocess.run(
        [sys.executable, "-B", "-c", code, *words], cwd=tmp_path, preexec_fn=limited, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("mpsearch: ")]
    assert len(said) == 1
    assert "cannot be written: the file would exceed the largest size that the file system or this process may write" in said[0]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_cannot_be_made_is_named(mpsearch, tmp_path):
    (tmp_path / "taken").touch()
    code, said = mpsearch("sensitivity", "hydra.run.dir=taken/run")
    assert (code, said) == (2, "mpsearch: taken/run cannot be used: a part of its path is not a folder. Give another folder.\n")
