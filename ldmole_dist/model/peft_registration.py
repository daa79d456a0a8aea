"""Register LD-MoLE with PEFT as soon as a process has imported both packages.

PEFT must know the method before `AutoPeftModelForCausalLM.from_pretrained` reads an LD-MoLE adapter. Importing PEFT here would
make `import ldmole_dist` and every `ldmole` command as slow as importing torch. If PEFT is not imported yet, a finder is
added to `sys.meta_path` instead; when PEFT is imported, the finder registers the method right after PEFT's own code has run.

This module imports neither torch nor PEFT. It is not in `tuner/`, because importing that package imports PEFT.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def register_with_peft() -> None:
    """Register LD-MoLE with PEFT: now if PEFT is already imported, otherwise after its import. Further calls have no effect."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def _register() -> None:
    # If the package is already being imported, it registers itself at the end of its import. Importing it here could then
    # find a partly initialized module or, if another thread imports it and waits for PEFT, deadlock.
    if "ldmole_dist.tuner" not in sys.modules:
        importlib.import_module("ldmole_dist.tuner")


class _PeftFinder:
    """Finder for `sys.meta_path` that gets PEFT's spec from the other finders and wraps the loader in this spec.

    Every other module is left to the other finders.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:  # None: a namespace package, such as any folder called peft
                    wrapped: Any = _RegisteringLoader(spec.loader, self)
                    spec.loader = wrapped
                return spec
        return None


class _RegisteringLoader:
    """Loader that runs PEFT's original loader, then registers LD-MoLE and removes the finder.

    An exception raised by PEFT's code is passed on, and the finder stays, so that a later import registers LD-MoLE.
    """

    def __init__(self, loader: Any, finder: _PeftFinder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        # Tools may call other methods of a loader, such as get_source, on a spec that is not executed.
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # Restore the original loader first, so that PEFT's code and later inspection see no difference.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
