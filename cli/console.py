"""Print for people on stderr and for programs one JSON object on stdout."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from zowrap.errors import ZOWarning
from zowrap.version import __version__

_result_stream: Any = None  # the real stdout while a command runs with --json


class Interrupted(Exception):
    """A run that stopped on a signal with everything saved.

    Attributes:
        record: what the run came to, for ``--json``.
    """

    def __init__(self, sentence: str, record: dict[str, Any]) -> None:
        super().__init__(sentence)
        self.record = record


def json_asked(args: Sequence[str]) -> bool:
    """Whether ``--json`` stands among the arguments (read before they are parsed: parsing may fail)."""
    return "--json" in args


@contextlib.contextmanager
def stdout_for_result(as_json: bool) -> Iterator[None]:
    """While a command runs with ``--json``, whatever else is written to stdout goes to stderr.

    Also at the level of file descriptors: a compiler started by torch writes there, not to ``sys.stdout``.
    """
    global _result_stream
    if not as_json:
        yield
        return
    before, real = _result_stream, cast(IO[str], sys.stdout)
    descriptor = None
    with contextlib.ExitStack() as stack:
        if real is sys.__stdout__:
            with contextlib.suppress(OSError, ValueError):
                real.flush()
                descriptor = os.dup(real.fileno())
                os.dup2(sys.stderr.fileno(), real.fileno())
        _result_stream = (
            real if descriptor is None else stack.enter_context(os.fdopen(os.dup(descriptor), "w", encoding="utf-8"))
        )
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            yield
        finally:
            if descriptor is not None:
                os.dup2(descriptor, real.fileno())
                os.close(descriptor)
            _result_stream = before


def result(record: dict[str, Any], as_json: bool, lines: Sequence[str] = ()) -> None:
    """Print what a command found: ``record`` as one JSON object, or ``lines`` for people."""
    if as_json:
        stream = _result_stream or sys.stdout
        print(json.dumps(_finite(record)), file=stream, flush=True)
        return
    for line in lines:
        print(line, flush=True)


def _finite(value: Any) -> Any:
    """NaN and infinities as null: JSON has no word for them and strict readers refuse Python's."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def say(text: str) -> None:
    """One line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def begin(model: str, *files: object) -> None:
    """The first line of a command that takes its time, before what takes seconds to import.

    It says of a model that is not on this machine where it will be looked for: a mistyped path shows.
    """
    place = model if Path(model).expanduser().exists() else f"{model} from the hub"
    say(f"zowrap {__version__}: loading torch, then {' and '.join([place, *map(str, files)])}")


def fail(sentence: str, as_json: bool, code: int = 130) -> int:
    """Report a failure: one sentence on stderr, or ``{"error": …}`` on stdout. Returns ``code``."""
    if as_json:
        result({"error": sentence}, True)
    else:
        say(f"error: {sentence}")
    return code


class _OneLine(logging.Handler):
    """Log records as ``warning: …`` lines, each text once."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text in self.seen:
            return
        self.seen.add(text)
        say(text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}")


def quiet_libraries() -> None:
    """Hush progress bars and chatter of the libraries below; our own log and warnings become plain lines.

    Called by a command before it imports transformers. ``ZOWRAP_DEBUG=1`` leaves everything as it is.
    """
    if os.environ.get("ZOWRAP_DEBUG"):
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Some report optional kernels on every import, the hub each retry: a failure itself is told by us.
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    log = logging.getLogger("zowrap")
    if not any(isinstance(handler, _OneLine) for handler in log.handlers):
        log.addHandler(_OneLine())
        log.setLevel(logging.INFO)
        log.propagate = False
    handler = next(h for h in log.handlers if isinstance(h, _OneLine))
    handler.seen.clear()
    _one_line_warnings(handler)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _one_line_warnings(handler: _OneLine) -> None:
    """Our warnings as lines; those of libraries are for their developers and stay out."""

    def show(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> None:
        if issubclass(category, ZOWarning):
            handler.handle(logging.LogRecord("zowrap", logging.WARNING, filename, 0, str(message), None, None))

    warnings.showwarning = show
