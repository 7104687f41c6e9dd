"""Generated Triton, kept as files: Triton reads a kernel's source from where it was defined."""

from __future__ import annotations

import hashlib
import importlib.util
from typing import Any

from zowrap import cache
from zowrap.files import write_text

_HEAD = '''"""Written by zowrap; may be deleted."""

import triton
import triton.language as tl


'''


def kernel(source: str) -> Any:
    """The function ``kernel`` of a piece of Triton, compiled when it is first launched."""
    text = _HEAD + source
    name = f"zowrap_{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"
    path = cache.folder() / "triton" / f"{name}.py"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.kernel
