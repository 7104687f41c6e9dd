"""``zowrap inspect``: what would move, how, and at what cost."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from zowrap.errors import ZOError

from .console import quiet_libraries, result
from .options import Dtype, Json, Plugin, Trust, option, takes


@dataclasses.dataclass
class InspectOptions:
    model: Annotated[str, typer.Argument(help="A model directory, a run, or a hub name.", show_default=False)]
    rule: Annotated[str, option("--rule", "Update rule.")] = "meazo"
    direction: Annotated[str | None, option("--direction", "Law of the directions; by default the rule's own.")] = None
    queries: Annotated[int | None, option("--queries", "Directions per step; by default the rule's own.")] = None
    blocks: Annotated[list[str], option("--blocks", "'layer', or name patterns. Repeatable.")] = dataclasses.field(
        default_factory=list
    )
    trainable: Annotated[list[str], option("--trainable", "Name pattern of what moves. Repeatable.")] = (
        dataclasses.field(default_factory=list)
    )
    engine: Annotated[str | None, option("--engine", "compiled or eager.")] = None
    plugin: Plugin = dataclasses.field(default_factory=list)
    programs: Annotated[bool, option("--programs", "Capture a step and print the program after each pass.")] = False
    dtype: Dtype = None
    trust_remote_code: Trust = False
    json: Json = False


@takes(InspectOptions)
def inspect_model(context: typer.Context, options: InspectOptions) -> None:
    """Say which parameters of a model move, in which blocks, and what a step costs."""
    quiet_libraries()
    from zowrap.tasks import choose_dtype, open_source
    from zowrap.wrap import zo_wrap

    source = open_source(options.model, options.trust_remote_code)
    dtype, _ = choose_dtype(options.dtype, source)
    zm = zo_wrap(
        _load(source, dtype),
        options.rule,
        direction=options.direction,
        queries=options.queries,
        blocks=blocks_of(options.blocks),
        trainable=options.trainable or None,
        engine=options.engine,
    )
    if options.programs:
        zm.accumulate(**_example(zm.model, source))
        zm.discard()
    report = zm.inspect()
    record = {"model": options.model, **report.as_dict()}
    lines = [str(report)]
    if options.programs:
        record["programs"] = {name: [list(pair) for pair in history] for name, history in report.programs.items()}
        for name, history in report.programs.items():
            for made_by, text in history:
                lines += ["", f"# {name}, after {made_by}", text]
    result(record, options.json, lines)


def blocks_of(values: list[str]) -> str | list[str] | None:
    """``--blocks`` as ``zo_wrap`` takes it: nothing, ``"layer"``, or a list of patterns."""
    if not values:
        return None
    return "layer" if values == ["layer"] else list(values)


def _example(model: Any, source: Any) -> dict[str, Any]:
    """A batch of two short rows that the model's own loss takes."""
    import torch

    ids = torch.arange(2 * 8).reshape(2, 8) % max(2, min(len(source.tokenizer), 100))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return {**batch, "labels": torch.zeros(2, dtype=torch.long)}
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")):
        return {**batch, "labels": ids.clone()}
    raise ZOError(f"--programs needs a model with a loss of its own, and {name} has none")


def _load(source: Any, dtype: Any) -> Any:
    """The model as the class that its configuration names."""
    import transformers

    from zowrap.tasks.loading import load

    for name in source.architectures:
        if hasattr(transformers, name):
            return load(source, getattr(transformers, name), dtype)
    if getattr(source.config, "auto_map", None):
        return load(source, transformers.AutoModel, dtype)
    raise ZOError(f"{source.name} names no architecture that transformers knows")
