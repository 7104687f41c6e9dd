"""Import the files and modules that the user names with ``--plugin``, so that they register their rules.

Only the command line can name them: what a run, a checkpoint or a journal names is never imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from zowrap.errors import ZOError
from zowrap.names import python_file


def import_plugins(plugins: Sequence[str]) -> None:
    """Import the modules or Python files that ``--plugin`` names, each of which registers rules.

    One that was imported before is not imported again.

    Raises:
        ZOError: there is no such file or module, it raises an error, or it registers no rule.
    """
    for plugin in plugins:
        file = python_file(plugin)
        name = plugin if file is None else f"zowrap_plugin_{file.stem}"
        known = sys.modules.get(name)
        if known is None or (file is not None and Path(str(known.__file__)).resolve() != file.resolve()):
            _import_plugin(plugin, name, None if file is None else file.resolve())


def _import_plugin(plugin: str, name: str, file: Path | None) -> None:
    from zowrap.rules.registry import REGISTRY

    before = dict(REGISTRY)
    try:
        if file is None:
            importlib.import_module(name)
        else:
            _run_file(name, file)
        if before == REGISTRY:
            raise ZOError("it registers no rule (call zowrap.rules.register in it)")
    except Exception as error:
        REGISTRY.clear()
        REGISTRY.update(before)
        sys.modules.pop(name, None)
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ZOError(f"--plugin {plugin}: there is no file or module of that name") from error
        said = str(error) if isinstance(error, ZOError) else f"{type(error).__name__}: {error}"
        raise ZOError(f"--plugin {plugin} cannot be used: {said}") from error


def _run_file(name: str, file: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ZOError("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
