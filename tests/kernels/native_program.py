"""The compiled kernels as a program of their own, for instruction sets that this machine lacks and for sanitizers.

Instruction sets, their flags and their sources are read from `CMakeLists.txt`, so that what is built here is what ships. The
program (`native/run_kernels.cpp`) is the shell with a stand-in for nanobind; a `Program` takes the place of the compiled module.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

KERNELS = Path(__file__).parents[2] / "mpsearch" / "kernels"
NATIVE = Path(__file__).parent / "native"


def read_cmake() -> tuple[dict[str, list[str]], list[str], list[str], list[str]]:
    """The flags of each instruction set, its sources, those of the shell, and the flags of all kernels."""
    text = re.sub(r"#.*", "", (KERNELS / "CMakeLists.txt").read_text())
    variables = dict(re.findall(r"(?m)^\s*set\((\w+) ([^)]*)\)", text))
    sets = {
        name: re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], flags).split()
        for name, flags in re.findall(r"(?m)^\s*add_instruction_set\((\w+)([^)]*)\)", text)
    }
    kernels = re.search(r"add_library\(kernels_\$\{name\} OBJECT ([^)]*)\)", text)
    shell = re.search(r"nanobind_add_module\(([^)]*)\)", text)
    assert kernels
    assert shell
    return sets, kernels[1].split(), re.findall(r"\S+\.cpp", shell[1]), variables["kernel_flags"].split()


def build(compiler: str, folder: Path, names: tuple[str, ...], flags: list[str], adapt: Callable[[list[str]], list[str]]) -> Path:
    """Compile the shell and the instruction sets `names` into one program; `adapt` changes the flags of a set."""
    sets, sources, shell_sources, kernel_flags = read_cmake()
    common = [compiler, "-std=c++20", *kernel_flags, *flags, "-c"]
    shell = [f"-I{NATIVE}", f"-I{KERNELS / 'cpu'}", *(f"-DMPSEARCH_HAS_{name}" for name in names)]
    jobs = [(KERNELS / source, [f"-DMPSEARCH_ISA={name}", *adapt(sets[name])]) for name in names for source in sources]
    jobs += [(source, shell) for source in [*(KERNELS / source for source in shell_sources), NATIVE / "run_kernels.cpp"]]
    objects = [str(folder / f"{i}.o") for i in range(len(jobs))]
    program = folder / "run_kernels"
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job, to: _run([*common, *job[1], str(job[0]), "-o", to]), jobs, objects))
    _run([compiler, *flags, *objects, "-o", str(program), "-pthread"])
    return program


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


_address_of = torch.Tensor.data_ptr


class Program:
    """A running program: its functions take what the compiled module's take, addresses being those of `tensors`."""

    def __init__(self, command: list[str]) -> None:
        self.tensors: dict[int, torch.Tensor] = {}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __getattr__(self, name: str) -> Callable:
        return functools.partial(self.call, name)

    def address_of(self, tensor: torch.Tensor) -> int:
        """Takes the place of `torch.Tensor.data_ptr`: the address, by which a call will find the tensor."""
        address = _address_of(tensor)
        self.tensors[address] = tensor
        return address

    def backends(self) -> list[str]:
        return self._call("backends").split()

    def call(self, name: str, *arguments: float) -> int:
        return int(self._call(name, *arguments) or 0)

    def _call(self, name: str, *arguments: float) -> str:
        request = [f"{name}\n".encode(), struct.pack("<q", len(arguments))]
        tensors = []
        for argument in arguments:
            if isinstance(argument, float):
                request.append(struct.pack("<cd", b"d", argument))
            elif argument and argument in self.tensors:
                size = self.tensors[argument].nbytes
                tensors.append((argument, size))
                request += [struct.pack("<cq", b"b", size), ctypes.string_at(argument, size)]
            else:
                request.append(struct.pack("<cq", b"i", argument))
        try:
            self.process.stdin.write(b"".join(request))
            self.process.stdin.flush()
            result = self.process.stdout.readline()
        except BrokenPipeError:
            result = b""
        if not result:
            raise RuntimeError(f"{name}{arguments} ended the program: {self.process.stderr.read().decode()}")
        for address, size in tensors:
            ctypes.memmove(address, self.process.stdout.read(size), size)
        return result.decode().strip()

    def close(self) -> None:
        with self.process:  # closes its pipes and waits
            pass
