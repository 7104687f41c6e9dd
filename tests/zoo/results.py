"""The committed results of the zoo: ``tests/zoo/results.json``, and the page ``docs/models.md`` made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.zoo.tiny import TASKS

FILE = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TITLES = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "seq2seq": "Encoder–decoders",
    "classes": "Sequence classification",
    "tokens": "Token classification",
    "answers": "Extractive question answering",
    "images": "Image classification",
}
CHECKS = ("eager", "compiled", "inductor")


def read() -> dict[str, Any]:
    """The results: ``versions``, and for each family what :data:`CHECKS` came to.

    A check that held is a dictionary (``{}`` or ``{"programs": 1}``), one that did not is a sentence, one that was not
    made is missing. A family without a tiny model has only ``left_out``, the reason.
    """
    if not FILE.is_file():
        return {"versions": {}, "families": {}}
    return json.loads(FILE.read_text(encoding="utf-8"))


def write(results: dict[str, Any]) -> None:
    results["families"] = dict(sorted(results["families"].items(), key=lambda entry: _order(entry[0])))
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in results["families"].items())
    text = f'{{\n "versions": {json.dumps(results["versions"])},\n "families": {{\n{lines}\n }}\n}}\n'
    FILE.write_text(text, encoding="utf-8")


def holding(check: str) -> list[str]:
    """The families for which a check held."""
    return [name for name, entry in read()["families"].items() if isinstance(entry.get(check), dict)]


def one_of_each_type(names: list[str]) -> list[str]:
    """The first of the families of each model type."""
    return list({name.split(":")[1]: name for name in reversed(names)}.values())[::-1]


def page(results: dict[str, Any]) -> str:
    """The text of ``docs/models.md``."""
    families = results["families"]
    made = {name: entry for name, entry in families.items() if "left_out" not in entry}
    counts = {check: sum(isinstance(entry.get(check), dict) for entry in made.values()) for check in CHECKS}
    lines = [
        "# Models",
        "",
        f"{len(made)} tiny models with random weights, made from the configuration classes of transformers "
        f"{results['versions'].get('transformers')} (torch {results['versions'].get('torch')}). "
        "`python -m tests.zoo` checks them and writes this page.",
        "",
        f"- **eager** ({counts['eager']}): the loss is the model's own, both points of a step have the losses of "
        "copies moved by hand, and a saved model loads with the same weights and loss.",
        f"- **compiled** ({counts['compiled']}): the captured programs have the eager engine's losses on batches of "
        "two sizes. The number of programs stands beside it: 1 serves every size.",
        f"- **machine code** ({counts['inductor']}): the same, compiled by Inductor.",
        "",
        "An empty cell was not tried. If the compiled engine refuses a model, `zo_wrap` says so and uses the eager "
        "engine.",
        "",
    ]
    notes: list[str] = []
    for task in TASKS:
        rows = [(name.split(":")[1], entry) for name, entry in made.items() if name.startswith(f"{task}:")]
        if not rows:
            continue
        lines += [f"## {TITLES[task]}", "", "| model type | eager | compiled | machine code |", "|---|---|---|---|"]
        for kind, entry in rows:
            cells = [_cell(entry.get(check), notes) for check in CHECKS]
            lines.append(f"| {kind} | {' | '.join(cells)} |")
        lines.append("")
    if notes:
        lines += ["## Notes", "", *(f"{number}. {note}" for number, note in enumerate(notes, start=1)), ""]
    left = [(name, entry["left_out"]) for name, entry in families.items() if "left_out" in entry]
    if left:
        lines += ["## Not tried", "", "No tiny model could be made of these from their configuration class alone.", ""]
        lines += [f"- {name.replace(':', ' ')}: {reason}" for name, reason in left]
        lines.append("")
    return "\n".join(lines)


def _order(name: str) -> tuple[int, str]:
    task, kind = name.split(":")
    return TASKS.index(task), kind


def _cell(found: Any, notes: list[str]) -> str:
    if found is None:
        return ""
    if isinstance(found, str):
        if found not in notes:
            notes.append(found)
        return f"no ({notes.index(found) + 1})"
    return f"yes, {found['programs']}" if "programs" in found else "yes"
