"""Enters our parts into transformers the moment a process imports it, and not before.

`import moesaic` must stay quick, so it imports neither torch nor transformers. Each table of
transformers that ours are entered into is in one module: if that is imported already, they are
entered at once; else a finder waits for it, lets it load, enters them and is gone.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Module of transformers that is waited for: our module whose `register` is then called.
_AWAITED = {
    "transformers.models.auto.configuration_auto": "moesaic.models.auto",
    "transformers.integrations.moe": "moesaic.models.experts_function",
}


def install() -> None:
    """Register now with the modules that are imported, else when they are."""
    waited = {finder.awaited for finder in sys.meta_path if isinstance(finder, _Finder)}
    for name in _AWAITED:
        if name in sys.modules:
            _register(name)
        elif name not in waited:
            sys.meta_path.insert(0, _Finder(name))


def _register(name: str) -> None:
    importlib.import_module(_AWAITED[name]).register()


class _Finder(MetaPathFinder):
    def __init__(self, awaited: str) -> None:
        self.awaited = awaited

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module must not remember this detour: its source is found through its loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register(module.__name__)
