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


_data_ptr = torch.Tensor.data_ptr


class Program:
    """A running program: its functions take what the compiled module's take, addresses being those of `tensors` and `structs`."""

    def __init__(self, command: list[str]) -> None:
        self.tensors: dict[int, torch.Tensor] = {}
        self.structs: dict[int, ctypes.Structure] = {}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __getattr__(self, name: str) -> Callable:
        return functools.partial(self.call, name)

    def data_ptr(self, tensor: torch.Tensor) -> int:
        """Takes the place of `torch.Tensor.data_ptr`: the address, by which a call will find the tensor."""
        address = _data_ptr(tensor)
        self.tensors[address] = tensor
        return address

    def address_of(self, arguments: ctypes.Structure) -> int:
        """Takes the place of `ctypes.addressof`."""
        address = ctypes.addressof(arguments)
        self.structs[address] = arguments
        return address

    def backends(self) -> list[str]:
        return self._call("backends", b"", []).split()

    def call(self, name: str, backend: int, address: int, n_threads: int) -> None:
        arguments = self.structs.pop(address)
        pointers = [
            (getattr(type(arguments), field).offset, value)
            for field, kind, *_ in arguments._fields_
            if kind is ctypes.c_void_p and (value := getattr(arguments, field)) and self.tensors[value].nbytes
        ]
        request = [packed_numbers(backend, n_threads, ctypes.sizeof(arguments)), bytes(arguments), packed_numbers(len(pointers))]
        sizes = [(value, self.tensors[value].nbytes) for _, value in pointers]
        for (offset, value), (_, size) in zip(pointers, sizes, strict=True):
            request += [packed_numbers(offset, size), ctypes.string_at(value, size)]
        self._call(name, b"".join(request), sizes)

    def _call(self, name: str, request: bytes, tensors: list[tuple[int, int]]) -> str:
        try:
            self.process.stdin.write(f"{name}\n".encode() + request)
            self.process.stdin.flush()
            result = self.process.stdout.readline()
        except BrokenPipeError:
            result = b""
        if not result:
            raise RuntimeError(f"{name} ended the program: {self.process.stderr.read().decode()}")
        for address, size in tensors:
            ctypes.memmove(address, self.process.stdout.read(size), size)
        return result.decode().strip()

    def close(self) -> None:
        with self.process:  # closes its pipes and waits
            pass


def packed_numbers(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)
