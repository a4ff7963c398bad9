"""`import tombola` teaches transformers to load shrunk models, without importing it: that happens when it is first used."""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

WATCHED = "transformers.models.auto.configuration_auto"  # whoever loads a model by an Auto class has imported it


class _AfterImport(Loader):
    """A loader that registers shrunk models as soon as the module that it loads is there."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module.__spec__.loader = self.loader  # type: ignore[union-attr]
        _register()


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)  # once; the search goes on without it
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _AfterImport(spec.loader)
        return spec


def _register() -> None:
    from tombola.shrunk import register

    register()


def teach() -> None:
    """Registers shrunk models now if transformers' Auto classes are loaded, and else when they are."""
    if WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
