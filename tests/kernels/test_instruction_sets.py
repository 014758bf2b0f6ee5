"""Every instruction set that ships is run, also those that this machine lacks: the other tests' cases, on programs built here.

    sanitized   baseline and AVX2, under the address and undefined-behaviour sanitizers    needs GCC's libasan, libubsan
    simde       AVX-512 and AVX-512-VNNI, their instructions emulated with AVX2            needs SIMDe: libsimde-dev
    qemu        NEON with and without dotprod, the processor emulated                      needs g++-aarch64-linux-gnu, qemu-user

The names are Debian's packages; a test without its tools is skipped and says so.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import native_program
import pytest
import test_backends
import test_conv
import test_embedding
import test_feedback
import test_half_quadratic
import test_joint
import test_pack
import test_products
import test_quantize
import test_rotation
import torch
from native_program import NATIVE, Program

from mpsearch import kernels
from mpsearch.kernels import backends

pytestmark = pytest.mark.slow

SETS = {"sanitized": ("baseline", "avx2"), "simde": ("avx512", "avx512vnni"), "qemu": ("neon", "neondotprod")}


def need(*tools: str) -> None:
    for tool in tools:
        if not (shutil.which(tool) or Path(tool).is_file()):
            pytest.skip(f"{tool} is missing")


def need_avx2() -> None:
    if platform.machine() != "x86_64" or "avx2" not in kernels.available_backends():
        pytest.skip("this processor lacks AVX2")


def build_sanitized(folder: Path) -> list[str]:
    need("g++")
    need_avx2()
    for name in ("libasan.so", "libubsan.so"):
        need(subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip())
    flags = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return [str(native_program.build("g++", folder, SETS["sanitized"], flags, lambda flags: flags))]


def build_simde(folder: Path) -> list[str]:
    need("g++", "/usr/include/simde/x86/avx512.h")
    need_avx2()

    def emulated(flags: list[str]) -> list[str]:
        """Without the flags for AVX-512: the header is told of them and takes their place."""
        beyond = [flag for flag in flags if flag.startswith("-mavx512")]
        defines = [f"-DEMULATE_{flag.removeprefix('-m').upper()}" for flag in beyond]
        return [*(flag for flag in flags if flag not in beyond), *defines, "-include", str(NATIVE / "simde_avx512.h")]

    flags = ["-O0", "-D__builtin_cpu_supports(feature)=true"]  # what is emulated is there
    return [str(native_program.build("g++", folder, SETS["simde"], flags, emulated))]


def build_qemu(folder: Path) -> list[str]:
    need("aarch64-linux-gnu-g++", "qemu-aarch64")
    program = native_program.build("aarch64-linux-gnu-g++", folder, SETS["qemu"], ["-O2", "-static"], lambda flags: flags)
    return ["qemu-aarch64", "-cpu", "max", str(program)]


BUILD: dict[str, Callable[[Path], list[str]]] = {"sanitized": build_sanitized, "simde": build_simde, "qemu": build_qemu}


@pytest.fixture(scope="session", params=SETS)
def command(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How to run the program with the kernels of `SETS[param]`."""
    return BUILD[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture
def names(command: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """The instruction sets of a program that takes the place of the compiled module everywhere."""
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")  # the worker pool is never destroyed
    program = Program(command)
    names = tuple(program.backends())
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: program.data_ptr(tensor))
    monkeypatch.setattr(backends, "compiled", program)
    monkeypatch.setattr(backends, "address_of", program.address_of)
    monkeypatch.setattr(backends, "COMPILED", names)
    for module in (test_conv, test_feedback, test_half_quadratic, test_joint, test_products, test_quantize, test_rotation):
        monkeypatch.setattr(module, "COMPILED", names)
    yield names
    program.close()


def test_no_instruction_set_ships_unrun() -> None:
    assert set(native_program.read_cmake()[0]) == {name for names in SETS.values() for name in names}


def test_detection(command: list[str], names: tuple[str, ...]) -> None:
    """A program finds the sets that it was built with; on a processor without dotprod only those that run there."""
    assert names in SETS.values()
    if command[0] == "qemu-aarch64":
        program = Program(["qemu-aarch64", "-cpu", "cortex-a53", *command[3:]])
        assert program.backends() == ["neon"]
        program.close()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes(names: tuple[str, ...], bits: int, symmetric: bool) -> None:
    test_quantize.test_min_max(bits, symmetric, torch.float16 if bits % 2 else torch.float32)
    test_quantize.test_clip_search(bits, symmetric, "per_row")
    test_quantize.test_magnitudes(10.0 ** -(bits * 5), symmetric)


@pytest.mark.parametrize("case", test_feedback.CASES)
def test_rounding_with_feedback(names: tuple[str, ...], case: tuple[int, int, int, int, int]) -> None:
    test_feedback.test_backends_equal_the_reference(*case)


@pytest.mark.parametrize("case", test_half_quadratic.CASES)
def test_half_quadratic_fitting(names: tuple[str, ...], case: tuple) -> None:
    test_half_quadratic.test_backends_equal_the_reference(case)


@pytest.mark.parametrize("case", test_joint.CASES)
def test_rounding_jointly(names: tuple[str, ...], case: tuple[int, int, int, int]) -> None:
    test_joint.test_backends_equal_the_reference(*case)


def test_rotation_by_a_hadamard_matrix(names: tuple[str, ...]) -> None:
    for columns in test_rotation.COLUMNS:
        for back in (False, True):
            test_rotation.test_backends_equal_the_reference(columns, back)


def test_rounding(names: tuple[str, ...]) -> None:
    test_quantize.test_zeros_stay_zeros(test_quantize.SIGNED_RATIOS)
    test_quantize.test_ties_round_to_even()


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing(names: tuple[str, ...], bits: int) -> None:
    for name in names:
        with kernels.use_backend(name):
            for numel in test_pack.SIZES:
                test_pack.test_round_trip(name, bits, numel)
            test_pack.test_dequantize_equals_the_reference(name, bits, bits % 2 == 0, torch.float16)


@pytest.mark.parametrize("bits", range(1, 9))
def test_matrix_products(names: tuple[str, ...], bits: int) -> None:
    for scale_dtype in (torch.float16, torch.float32):
        test_products.test_layout(bits, scale_dtype)
        test_products.test_unpacking_gives_back_what_was_packed(bits, scale_dtype)
    test_products.test_backends_agree(bits, symmetric=bits % 2 == 1)  # symmetric at 1 bit, where the zero point is 0.5


@pytest.mark.parametrize("bits", range(1, 9))
def test_largest_sums(names: tuple[str, ...], bits: int) -> None:
    test_products.test_extreme_codes_do_not_overflow(bits)


def test_inputs(names: tuple[str, ...]) -> None:
    test_products.test_bias(4)
    test_products.test_input_scale()
    test_products.test_inputs_of_few_bits()
    for name in names:
        test_products.test_input_values(name)


def test_threads(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in names:
        test_backends.test_thread_counts_agree(name, lambda n: monkeypatch.setattr(torch, "get_num_threads", lambda: n))


@pytest.mark.parametrize("bits", range(1, 9))
def test_convolutions(names: tuple[str, ...], bits: int) -> None:
    for geometry in test_conv.GEOMETRIES:
        test_conv.test_backends_agree(bits, geometry)


@pytest.mark.parametrize("bits", [1, 7, 8])
def test_largest_sums_of_convolutions(names: tuple[str, ...], bits: int) -> None:
    for geometry in test_conv.LONG:
        test_conv.test_extreme_codes_do_not_overflow(bits, geometry)


def test_inputs_of_convolutions(names: tuple[str, ...]) -> None:
    for name in names:
        for i in (0, 1, 5):
            test_conv.test_input_values(name, test_conv.GEOMETRIES[i])


@pytest.mark.parametrize("bits", range(1, 9))
def test_embeddings(names: tuple[str, ...], bits: int) -> None:
    test_embedding.test_rows_are_those_of_dequantize(bits, symmetric=bits % 2 == 1)
