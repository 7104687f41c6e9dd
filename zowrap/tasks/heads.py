"""Find out which head a checkpoint has, by the tensors in its file, and what its classes are.

A configuration may name no class (``architectures``), or one that the weights are not of. The names and shapes of the
tensors are those of one class of transformers; where they agree with the class that is named, nothing is built.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zowrap.errors import ZOError, list_some
from zowrap.storage import safetensors
from zowrap.storage.atomic import read_json
from zowrap.storage.base_options import read_base_options
from zowrap.storage.safetensors import (
    ADAPTER,
    ADAPTER_CONFIG,
    INDEX,
    WEIGHTS,
    adapter_file,
    adapters_folder,
    weight_files,
)
from zowrap.tasks.labels import are_numbers
from zowrap.tasks.loading import Source, build_empty, find_file

log = logging.getLogger("zowrap")

Shapes = dict[str, tuple[int, ...]]

# How the tensors of a head begin: for classes of texts (some classes of tokens have the same), and for words.
_CLASSIFIERS = ("classifier", "pre_classifier", "classification_head", "score", "logits_proj", "sequence_summary")
_WORDS = ("lm_head", "embed_out", "cls", "vocab_transform", "vocab_projector", "generator_lm_head", "pred_layer")
_OF_TOKENS = ("qa_outputs", "discriminator_predictions")

_SEQUENCE, _CAUSAL = "ForSequenceClassification", ("ForCausalLM", "LMHeadModel")
_MASKED = ("ForMaskedLM", "ForPreTraining")
_AUTO_CLASSES = (
    *("AutoModelForSequenceClassification", "AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForPreTraining"),
    *("AutoModelForTokenClassification", "AutoModelForQuestionAnswering", "AutoModelForMultipleChoice"),
    *("AutoModelForNextSentencePrediction", "AutoModelForSeq2SeqLM", "AutoModel"),
)
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Checkpoint:
    """The class that a checkpoint is of.

    Attributes:
        name: a class of transformers; None if it cannot be told.
        why: a clause that says how it is known.
    """

    name: str | None
    why: str

    @property
    def kind(self) -> str:
        """``"sequence"``, ``"causal"``, ``"masked"``, ``"base"``, ``"unknown"``, or ``"other"`` for other heads."""
        name = self.name
        if name is None:
            return "unknown"
        if name.endswith(_SEQUENCE):
            return "sequence"
        if name.endswith(_CAUSAL):
            return "causal"
        if name.endswith(_MASKED):
            return "masked"
        return "other" if "For" in name else "base"


def identify(source: Source) -> Checkpoint:
    """Identify the class of a checkpoint by its file, or by its configuration if the file cannot be read.

    It is done once for a source: it may read the header of every file, and build models of all classes without weights.
    """
    if source.checkpoint is None:
        source.checkpoint = _identify(source)
    return source.checkpoint


def _identify(source: Source) -> Checkpoint:
    named = source.architectures[0] if source.architectures else None
    if adapter_file(source.name).is_file():
        return _identify_adapters(source, named)
    by_name = Checkpoint(named, f"the checkpoint is a {named}")
    shapes = read_shapes(source)
    if not shapes or (named is not None and _agrees(by_name, shapes, source)):
        return by_name
    found = _find_class(source, shapes)
    if found is None or found == named:
        return by_name
    said = "does not name its class" if named is None else f"calls it a {named}"
    log.warning("%s holds the weights of a %s, though its configuration %s", source.name, found, said)
    return Checkpoint(found, f"the checkpoint holds the weights of a {found}")


def read_shapes(source: Source) -> Shapes:
    """Read the names and shapes of a checkpoint's tensors; empty if they are not here or cannot be read."""
    found: Shapes = {}
    try:
        for file in _list_files(source):
            found.update(safetensors.read_shapes(file))
    except (ZOError, OSError):  # loading the weights will say why
        return {}
    return found


def _list_files(source: Source) -> list[Path]:
    path = Path(source.name).expanduser()
    if path.is_dir():
        return weight_files(path)
    if source.empty:  # its weights are not needed, and not fetched for this
        return []
    index = find_file(source.name, INDEX)
    names = [WEIGHTS] if index is None else sorted(set(read_json(index)["weight_map"].values()))
    files = [find_file(source.name, name) for name in names]
    return [Path(file) for file in files if file is not None] if all(files) else []


def _agrees(named: Checkpoint, shapes: Shapes, source: Source) -> bool:
    """Whether the head in a file can be that of the class that the configuration names."""
    roots = {name.split(".")[0] for name in shapes}
    classes, words = not roots.isdisjoint(_CLASSIFIERS), not roots.isdisjoint(_WORDS)
    if named.kind == "sequence":
        return classes
    if named.kind == "causal":
        return not classes
    if named.kind == "masked":
        return words or "predictions" in " ".join(roots)
    if named.kind == "other":
        return True
    return (
        named.name is not None
        and not classes
        and not words
        and roots.isdisjoint(_OF_TOKENS)
        and not _has_prefix(source, shapes)
    )


def _has_prefix(source: Source, shapes: Shapes) -> bool:
    """Whether a file's names have the prefix that a model has inside of a class with a head."""
    prefix = _base_prefix(source)
    return bool(prefix) and any(name.startswith(prefix) for name in shapes)


def _base_prefix(source: Source) -> str:
    """How the names of a model's tensors begin inside of a class with a head, such as ``"bert."``; else empty."""
    from transformers import AutoModel

    kind: Any = AutoModel._model_mapping.get(type(source.config), None)
    prefix = getattr(kind, "base_model_prefix", "")
    return f"{prefix}." if prefix else ""


def _find_class(source: Source, shapes: Shapes) -> str | None:
    """The class of transformers whose tensors a file holds; None if none or several fit equally well."""
    fits: dict[str, int] = {}
    prefix = _base_prefix(source)
    for kind in _list_classes(source):
        try:
            model = build_empty(source, kind, torch.float32)
        except Exception:  # a configuration that this class does not take
            continue
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        fits[kind.__name__] = _count_misfits(shapes, expected, tied)
        if "For" not in kind.__name__:  # by itself, or out of a class with a head
            inside = {f"{prefix}{name}": shape for name, shape in expected.items()}
            fits[kind.__name__] = min(fits[kind.__name__], _count_misfits(shapes, inside, tied))
    best = min(fits.values(), default=len(shapes))
    found = [name for name, misfits in fits.items() if misfits == best]
    if len(found) > 1:  # a head that shares the embedding has no tensors of its own
        found = [name for name in found if "For" in name or name.endswith("LMHeadModel")]
    return found[0] if len(found) == 1 and best < len(shapes) else None


def _count_misfits(shapes: Shapes, expected: Shapes, tied: set[str]) -> int:
    missing = sum(name not in shapes and name not in tied for name in expected)
    return missing + sum(expected.get(name) != shape for name, shape in shapes.items())


def _list_classes(source: Source) -> list[Any]:
    """The classes of transformers for a configuration, each once."""
    import transformers

    found: dict[str, Any] = {}
    for auto in _AUTO_CLASSES:
        kinds = getattr(transformers, auto)._model_mapping.get(type(source.config), None) or ()
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            found.setdefault(kind.__name__, kind)
    names = list(found)
    # An encoder's language model and its causal twin have the same weights; the configuration says which it is.
    if any(name.endswith("ForMaskedLM") for name in names):
        drop = "ForMaskedLM" if getattr(source.config, "is_decoder", False) else _CAUSAL
        names = [name for name in names if not name.endswith(drop)]
    return [found[name] for name in names]


def _identify_adapters(source: Source, base: str | None) -> Checkpoint:
    """The class that adapters were tuned on: by the head beside them, else by their settings and the base's class."""
    path = adapters_folder(source.name)
    known = Checkpoint(base, f"the adapters stand on a {base}")
    try:
        names = safetensors.read_shapes(path / ADAPTER)
        roots = {name.removeprefix(_PEFT_PREFIX).split(".")[0] for name in names}
        task = read_json(path / ADAPTER_CONFIG).get("task_type")
    except (ZOError, OSError, AttributeError):
        return known
    if task == "SEQ_CLS" or (task is None and known.kind != "other" and not roots.isdisjoint(_CLASSIFIERS)):
        return Checkpoint(_SEQUENCE, "the adapters are for a classification head")
    if task == "CAUSAL_LM":
        return Checkpoint(_CAUSAL[0], "the adapters are for a causal language model")
    return known


# --- the classes of a trained head -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbering:
    """The classes of a task in the order of its head.

    Attributes:
        labels: the names.
        numbered: whether a row may give a number.
        numbers: the number in the data for each label, None for one that has none; by default its index.
    """

    labels: list[str]
    numbered: bool
    numbers: list[int | None] | None = None


def name_classes(source: Source) -> list[str]:
    """The names of the classes of a trained head, in its order; ``LABEL_0`` and so on where it has none."""
    names = [str(name) for _, name in sorted((getattr(source.config, "id2label", None) or {}).items())]
    if adapter_file(source.name).is_file():  # the configuration is the base's, whose head may be of other classes
        count = read_base_options(source.name).get("num_labels") or len(names)
        return names if count == len(names) else [f"LABEL_{i}" for i in range(count)]
    return names


def match_labels(
    found: Sequence[str],
    numbers: set[int],
    own: Sequence[str],
    source: Source,
    keep: bool,
) -> Numbering | None:
    """Match the labels in the data with the classes of a trained head, whose own numbering wins and is told.

    Args:
        found: the labels in the data.
        numbers: the same as numbers, if all are numbers or booleans; else empty.
        own: the head's classes in its order.
        keep: a new head is no answer.

    Returns:
        None where the data needs a new head, with other classes.

    Raises:
        ZOError: it is not clear which of its classes a label means; or, with ``keep``, it has no such class.
    """
    lower = [name.lower() for name in own]
    data = {name.lower(): name for name in found}
    if data.keys() <= set(lower) and len(set(lower)) == len(lower):
        return Numbering([data.get(name.lower(), name) for name in own], are_numbers(own))
    unnamed = list(own) == [f"LABEL_{i}" for i in range(len(own))]
    if numbers:
        return _match_numbers(found, numbers, own, source, keep, unnamed)
    common = [data[name] for name in lower if name in data]
    if not common and len(found) == len(own):
        log.warning(
            "the head of %s %s: they are taken to be, in this order, the data's labels %s (--labels gives another "
            "order)",
            source.name,
            f"has {len(own)} classes without names" if unnamed else f"has the classes {_list(own)}",
            _list(found),
        )
        return Numbering(list(found), False)
    if keep or (common and len(found) == len(own)):
        raise _mismatch(found, own, source)
    return None


def _match_numbers(
    found: Sequence[str], numbers: set[int], own: Sequence[str], source: Source, keep: bool, unnamed: bool
) -> Numbering | None:
    """The same for labels that are numbers: a number means the same class whatever other numbers there are."""
    indices = set(range(len(own)))
    if unnamed and numbers <= indices:
        if len(numbers) < len(own):
            log.info("the labels are the numbers of the %d classes of %s, from 0", len(own), source.name)
        return Numbering([_name_number(i, found) for i in sorted(indices)], True)
    carried = _read_carried(own)
    if carried is not None and set(carried) != indices:
        if numbers <= set(carried):
            log.warning(
                "the labels are read as %s names its classes: %s; to give positions from 0, name them with --labels %s",
                source.name,
                ", ".join(f"{number} is {name!r}" for number, name in zip(carried, own, strict=True)),
                ",".join(own),
            )
            return Numbering(list(own), True, list(carried))
        if numbers <= set(carried) | indices:
            raise ZOError(
                f"the labels {_list(found)} can be positions from 0 or the numbers in the names of the classes of "
                f"{source.name} ({_list(own)}): --labels {','.join(own)} reads them as positions"
            )
    elif not unnamed and numbers <= indices:
        log.info(
            "the labels are the numbers of the classes of %s: %s",
            source.name,
            ", ".join(f"{i} is {name!r}" for i, name in enumerate(own)),
        )
        return Numbering(list(own), True)
    if keep:
        raise _mismatch(found, own, source)
    if len(found) == len(own):
        log.warning(
            "the labels %s are not the numbers of the classes of %s, 0 to %d: they are taken to be these classes in "
            "this order (--labels gives another order)",
            _list(found),
            source.name,
            len(own) - 1,
        )
        return Numbering(list(found), True)
    return None


def match_given(given: Sequence[str], own: Sequence[str], source: Source, keep: bool) -> Numbering | None:
    """The same where the user names the labels: numbers in the data are positions in ``given``.

    Raises:
        ZOError: the names contradict those of the head; or, with ``keep``, it has another number of classes.
    """
    lower, data = [name.lower() for name in own], {name.lower(): i for i, name in enumerate(given)}
    if len(given) == len(data) and data.keys() <= set(lower) and (keep or len(given) == len(own)):
        labels = [given[data[name.lower()]] if name.lower() in data else name for name in own]
        numbers = [data.get(name) for name in lower]
        return Numbering(labels, True, None if numbers == list(range(len(own))) else numbers)
    if len(given) != len(own):
        if keep:
            raise ZOError(
                f"--labels names {len(given)} labels, and the head of {source.name} has {len(own)} classes "
                f"({_list(own)}): name all of them, in this order"
            )
        return None
    if any(name.lower() in lower and lower.index(name.lower()) != i for i, name in enumerate(given)):
        raise ZOError(
            f"--labels {','.join(given)} contradicts the head of {source.name}, whose classes are in this order: "
            f"{_list(own)}"
        )
    return Numbering(list(given), True)


def _name_number(number: int, found: Sequence[str]) -> str:
    """The name of a number as the data writes it: booleans are 0 and 1."""
    names = {"false": 0, "true": 1}
    return next((name for name in found if names.get(name) == number), str(number))


def _read_carried(own: Sequence[str]) -> list[int] | None:
    """The number in the name of each class, as in ``1 star`` to ``5 stars``; None unless each has one of its own."""
    found = [re.findall(r"\d+", name) for name in own]
    if any(len(each) != 1 for each in found):
        return None
    numbers = [int(each[0]) for each in found]
    return numbers if len(set(numbers)) == len(numbers) else None


def _mismatch(found: Sequence[str], own: Sequence[str], source: Source) -> ZOError:
    return ZOError(
        f"the data's labels {_list(found)} are not the {len(own)} classes of the head of {source.name} ({_list(own)}): "
        "--labels gives the names that the data has for these classes, in this order"
    )


def _list(names: Sequence[str]) -> str:
    return list_some(map(repr, names))
