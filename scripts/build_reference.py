"""Build the API reference as HTML: `python scripts/build_reference.py FOLDER`, after `pip install -e '.[docs]'`.

A warning of pdoc (an import that fails, an annotation or a link that does not resolve) is an error.
"""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import mpsearch

EXCLUDED = ("__main__", "cli", "conf")  # the command has --help


def build(folder: Path) -> None:
    """Write one page for each public module of mpsearch into `folder`."""
    warnings.simplefilter("error")
    for name in mpsearch.__all__:  # pdoc does not see names that are loaded when first used
        setattr(mpsearch, name, getattr(mpsearch, name))
    pdoc.render.configure(docformat="numpy")
    package = Path(mpsearch.__file__).parent  # an editable installation's __path__ holds the checkout too, for conf/
    modules = [f"mpsearch.{module.name}" for module in pkgutil.iter_modules([str(package)]) if module.name not in EXCLUDED]
    pdoc.pdoc("mpsearch", *modules, output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
