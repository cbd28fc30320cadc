"""Import ``sparse_compile`` from this source tree where it is not installed.

The folder ``passes/`` stands at the top of the repository and is ``sparse_compile.passes``: an installation
knows that from ``pyproject.toml``, and Python alone does not.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


class PassesFinder(MetaPathFinder):
    """Finds ``sparse_compile.passes`` in ``passes/``."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "sparse_compile.passes":
            return None
        folder = ROOT / "passes"
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def prepare() -> None:
    """Call before the first import of ``sparse_compile``; changes nothing where it is installed."""
    if importlib.util.find_spec("sparse_compile") is None:
        sys.path.append(str(ROOT))
    # Last, behind the finder of an installation.
    sys.meta_path.append(PassesFinder())
