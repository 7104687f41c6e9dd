"""``python -m tests.zoo [PATTERN …] [--checks eager,compiled,inductor]``: check tiny models and renew the results.

Without patterns, all families are checked. What is not checked keeps its committed result; docs/models.md is written
anew in any case (``--checks ""`` does nothing else).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported


def main() -> int:
    """Returns 1 if a check that held in the committed results fails now, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="names like causal:llama, with * and ?")
    parser.add_argument("--checks", default="eager,compiled", help="by default eager,compiled")
    parser.add_argument("--each-type", action="store_true", help="one family of each model type")
    options = parser.parse_args()
    quiet()

    import torch
    import transformers

    from tests.support.choosing import choose_names
    from tests.zoo import results, tiny

    torch.set_num_threads(1)
    kept = results.read()
    kept["versions"] = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    names = choose_names(parser, tiny.families(), options.patterns, "family")
    if options.each_type:
        made = [name for name in names if "left_out" not in kept["families"].get(name, {})]
        names = results.one_of_each_type(made)
    lost = 0
    for check in filter(None, options.checks.split(",")):
        for name in names:
            entry = kept["families"].setdefault(name, {})
            began, before = time.monotonic(), entry.get(check)
            found = run(check, name)
            if isinstance(found, tiny.NotMade):
                kept["families"][name] = {"left_out": str(found)}
            else:
                entry.pop("left_out", None)
                entry[check] = found
            lost += isinstance(before, dict) and not isinstance(found, dict)
            print(f"{time.monotonic() - began:6.1f} s  {check} {name}: {found or 'holds'}", flush=True)
            results.write(kept)
    results.PAGE.write_text(results.page(kept), encoding="utf-8")
    print(f"{lost} checks that held before fail now" if lost else "all checks that held before hold")
    return 1 if lost else 0


def run(check: str, name: str) -> Any:
    """The result of one check as the file keeps it; a ``NotMade`` if there is no such model."""
    import pytest

    from tests.support.uncompiled import compile_nothing
    from tests.zoo import checks, tiny

    try:
        tiny.try_out(name)
        if check == "eager":
            with tempfile.TemporaryDirectory() as folder:
                checks.check_eager(name, Path(folder))
            return {}
        with pytest.MonkeyPatch.context() as patch:
            if check == "compiled":
                compile_nothing(patch)
            return checks.check_compiled(name)
    except tiny.NotMade as reason:
        return reason
    except Exception as error:  # whatever a model or the product raises is the result
        sentence = (str(error) or type(error).__name__).strip().splitlines()[0]
        return sentence[:240]


def quiet() -> None:
    """Silence what transformers reports on random weights."""
    import logging

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
