"""Build the API reference as HTML: `python scripts/build_reference.py FOLDER`, after `pip install -e '.[docs]'`.

The page of `mpsearch.runtimes` gets a table of what each profile runs and how its files are tested. A warning of pdoc (an import
that fails, an annotation or a link that does not resolve) is an error.
"""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import mpsearch
import mpsearch.runtimes
from mpsearch.layer import LayerSpec
from mpsearch.registry import names, resolve

LAYERS = {"linear": (256, 256), "embedding": (256, 256), "conv1d": (32, 32, 3), "conv2d": (32, 32, 3, 3)}
EXCLUDED = ("__main__", "cli", "conf")  # the command has --help
PRIVATE = ("!mpsearch.models._onnx_converters",)  # needs packages that have no part in the reference


def runtime_table() -> str:
    """Markdown: the layers that each runtime runs in each scheme, by its profile; and its files' tests, by the contract tests."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.exporters.test_contract import cases

    runtimes = {name: resolve("runtime", name) for name in names("runtime")}
    lines = ["| scheme | " + " | ".join(runtimes) + " |", "|---" * (len(runtimes) + 1) + "|"]
    verified = []
    for name, runtime in runtimes.items():
        exporter = resolve("exporter", runtime.exporter)
        tested = ", contract tests" if (runtime.exporter, name) in cases() else ""
        verified.append(f"exporter={runtime.exporter}, opened by {exporter.runtime or 'mpsearch'}{tested}")
    lines.append("| *verified by* | " + " | ".join(verified) + " |")
    for scheme in names("scheme"):
        cells = []
        for runtime in runtimes.values():
            layers = [LayerSpec("layer", kind, shape, 1, "layer", ("layer",)) for kind, shape in LAYERS.items()]
            cells.append(", ".join(la.kind for la in layers if runtime.runs(la, resolve("scheme", scheme))) or "no")
        lines.append(f"| `{scheme}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def build(folder: Path) -> None:
    """Write one page for each public module of mpsearch into `folder`."""
    warnings.simplefilter("error")
    about = (
        "What the profiles run, by scheme, in rows of whole groups. Contract tests (`tests/exporters/test_contract.py`) decode "
        "the files by the reader that is named and compare weights bit for bit, losses, and bytes:"
    )
    mpsearch.runtimes.__doc__ = f"{mpsearch.runtimes.__doc__}\n\n{about}\n\n{runtime_table()}\n"
    for name in mpsearch.__all__:  # pdoc does not see names that are loaded when first used
        setattr(mpsearch, name, getattr(mpsearch, name))
    pdoc.render.configure(docformat="numpy")
    package = Path(mpsearch.__file__).parent  # an editable installation's __path__ holds the checkout too, for conf/
    modules = [f"mpsearch.{module.name}" for module in pkgutil.iter_modules([str(package)]) if module.name not in EXCLUDED]
    pdoc.pdoc("mpsearch", *modules, *PRIVATE, output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
