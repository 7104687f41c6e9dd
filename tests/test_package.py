"""The package as installed: lean imports, optional parts left alone, no pickle, no machine paths."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [p for folder in ("zowrap", "passes", "cli") for p in (ROOT / folder).rglob("*.py")]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_importing_zowrap_imports_no_torch() -> None:
    assert run("import zowrap, sys; print('torch' in sys.modules, zowrap.__version__)").startswith("False 0.")


WITHOUT = """
import importlib.util, sys
blocked = ("bitsandbytes", "peft", "datasets", "pyarrow", "matplotlib", "tensorboard")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(name)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] in blocked else find_spec(name, *a)
sys.meta_path.insert(0, Blocker())
import torch, zowrap
from torch import nn
zm = zowrap.zo_wrap(nn.Linear(3, 1), loss_fn=lambda m, b: m(b["x"]).square().mean(), engine="eager")
print(zm.step(x=torch.ones(2, 3)).skipped.item(), zowrap.ZOTrainer.__name__, zowrap.rules.meazo().name)
"""


def test_zowrap_works_without_bitsandbytes_and_the_extras() -> None:
    """Everything but quantised models, Parquet, adapters and pictures runs on the base install."""
    assert run(WITHOUT).split() == ["False", "ZOTrainer", "meazo"]


def test_the_public_names_exist_and_are_documented() -> None:
    import zowrap

    for name in zowrap.__all__:
        assert getattr(zowrap, name).__doc__ if not name.startswith("__") else True, name
    with pytest.raises(AttributeError, match="nosuch"):
        zowrap.nosuch  # noqa: B018


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sources_are_readable_and_safe(path: Path) -> None:
    """Every module says what it is; nothing unpickles or evaluates what it read."""
    text = path.read_text(encoding="utf-8")
    assert text.lstrip().startswith('"""') or not text.strip(), "no docstring"
    forbidden = r"(?<![.\w])(eval|exec)\(|pickle\.(load|dump|Unpickler|Pickler)|import marshal|(?<!_)torch\.save\("
    assert not re.search(forbidden, text)
    for line in text.splitlines():
        if "torch.load(" in line:
            assert "weights_only=True" in line, line
