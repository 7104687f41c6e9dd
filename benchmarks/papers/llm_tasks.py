"""Define the tasks of the papers' language-model tables: the source of the records, and their prompts.

The prompts are those that the MeZO paper (2305.17333) lists in its appendix: for causal models the OPT prompts, for
masked ones the RoBERTa prompts with one label word at the mask. Three kinds of example:

- ``classification``: the same candidates for every example; trained on the candidates' likelihoods;
- ``choice``: candidates of its own; trained as language modelling on the right one, scored by mean log-likelihood;
- ``answer``: free text; trained as language modelling, scored by token F1 of what is generated.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zowrap.errors import ZOError
from zowrap.tasks.rows import read_rows

Record = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A prompt and what may follow it.

    Attributes:
        prompt: the text before the candidate, without a space at its end. For a masked model it contains ``{mask}``.
        candidates: continuations or label words, without the space before them.
        gold: index of the right candidate.
        answers: of kind ``answer`` and of choices with several right ones, the texts that count as right.
    """

    prompt: str
    candidates: tuple[str, ...] = ()
    gold: int = 0
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class LlmTask:
    """A task of the tables.

    Attributes:
        kind: see the module.
        hub: name and configuration of the data set on the hub.
        example: a record as an example.
        test_split: the hub's split that the test examples are drawn from; the training split gives the others.
        dev: how many development examples the papers take from the training split.
    """

    kind: str
    hub: tuple[str, str | None]
    example: Callable[[Record], Example]
    test_split: str = "validation"
    dev: int = 500


YES_NO = ("Yes", "No")


def _label(record: Record, names: Sequence[str], field: str = "label") -> int:
    """The number of the record's label, given as a number or as a name."""
    value = record[field]
    return names.index(value) if isinstance(value, str) else int(value)


def _text(record: Record, *names: str) -> str:
    """The first of the named columns that the record has: hub and local files name them differently."""
    for name in names:
        if name in record:
            return str(record[name]).strip()
    raise ZOError(f"a record has none of the columns {', '.join(names)}")


def _sst2(record: Record) -> Example:
    text = _text(record, "sentence", "text")
    return Example(f"{text} It was", ("terrible", "great"), _label(record, ("negative", "positive")))


def _rte(record: Record) -> Example:
    prompt = f'{record["premise"]}\nDoes this mean that "{record["hypothesis"]}" is true? Yes or No?\n'
    return Example(prompt, YES_NO, _label(record, ("entailment", "not_entailment")))


def _cb(record: Record) -> Example:
    prompt = f'Suppose {record["premise"]} Can we infer that "{record["hypothesis"]}"? Yes, No, or Maybe?\n'
    return Example(prompt, ("Yes", "No", "Maybe"), _label(record, ("entailment", "contradiction", "neutral")))


def _boolq(record: Record) -> Example:
    question = str(record["question"])
    question = question[:1].upper() + question[1:] + ("" if question.endswith("?") else "?")
    return Example(f"{record['passage']} {question}\n", YES_NO, 1 - _label(record, ("False", "True")))


def _wsc(record: Record) -> Example:
    pronoun, noun = record["span2_text"], record["span1_text"]
    question = f'In the previous sentence, does the pronoun "{pronoun.lower()}" refer to {noun}? Yes or No?\n'
    return Example(f"{record['text']}\n{question}", YES_NO, 1 - _label(record, ("False", "True")))


def _wic(record: Record) -> Example:
    question = f'Does the word "{record["word"]}" have the same meaning in these two sentences? Yes, No?\n'
    prompt = f"{question}{record['sentence1']}\n{record['sentence2']}\n"
    return Example(prompt, YES_NO, 1 - _label(record, ("False", "True")))


def _multirc(record: Record) -> Example:
    question = (
        f'Question: {record["question"]}\nI found this answer "{record["answer"]}". Is that correct? Yes or No?\n'
    )
    return Example(f"{record['paragraph']}\n{question}", YES_NO, 1 - _label(record, ("False", "True")))


def _copa(record: Record) -> Example:
    """``The man turned on the faucet so`` + ``water flowed from the spout.``"""
    joined = {"effect": "so", "cause": "because"}[record["question"]]
    choices = (record["choice1"], record["choice2"])
    prompt = f"{record['premise'].strip().rstrip('.')} {joined}"
    return Example(prompt, tuple(choice[:1].lower() + choice[1:] for choice in choices), int(record["label"]))


def _record(record: Record) -> Example:
    passage = record["passage"].replace("\n@highlight\n", "\n- ")
    filled = tuple(record["query"].replace("@placeholder", entity) for entity in record["entities"])
    answers = tuple(record["query"].replace("@placeholder", entity) for entity in record["answers"])
    return Example(f"{passage}\n-", filled, filled.index(answers[0]) if answers else 0, answers)


def _squad(record: Record) -> Example:
    prompt = f"Title: {record['title']}\nContext: {record['context']}\nQuestion: {record['question']}\nAnswer:"
    return Example(prompt, answers=tuple(record["answers"]["text"]))


def _drop(record: Record) -> Example:
    prompt = f"Passage: {record['passage']}\nQuestion: {record['question']}\nAnswer:"
    return Example(prompt, answers=tuple(record["answers_spans"]["spans"]))


_GLUE, _SUPER = "nyu-mll/glue", "aps/super_glue"
CAUSAL = {
    "sst2": LlmTask("classification", (_GLUE, "sst2"), _sst2),
    "rte": LlmTask("classification", (_SUPER, "rte"), _rte),
    "cb": LlmTask("classification", (_SUPER, "cb"), _cb, dev=100),
    "boolq": LlmTask("classification", (_SUPER, "boolq"), _boolq),
    "wsc": LlmTask("classification", (_SUPER, "wsc.fixed"), _wsc, dev=100),
    "wic": LlmTask("classification", (_SUPER, "wic"), _wic),
    "multirc": LlmTask("classification", (_SUPER, "multirc"), _multirc),
    "copa": LlmTask("choice", (_SUPER, "copa"), _copa, dev=100),
    "record": LlmTask("choice", (_SUPER, "record"), _record),
    "squad": LlmTask("answer", ("rajpurkar/squad", None), _squad),
    "drop": LlmTask("answer", ("ucinlp/drop", None), _drop),
}

# --- masked models: one word at the mask --------------------------------------------------------------------------

_TREC = ("abbreviation", "description", "entity", "human", "location", "number")
_TREC_WORDS = ("Expression", "Description", "Entity", "Human", "Location", "Number")
_NLI = ("entailment", "neutral", "contradiction")


def _masked_sst2(record: Record) -> Example:
    text = _text(record, "sentence", "text")
    return Example(f"{text} It was {{mask}} .", ("terrible", "great"), _label(record, ("negative", "positive")))


def _masked_sst5(record: Record) -> Example:
    words = ("terrible", "bad", "okay", "good", "great")
    names = ("very negative", "negative", "neutral", "positive", "very positive")
    return Example(f"{_text(record, 'sentence', 'text')} It was {{mask}} .", words, _label(record, names))


def _masked_nli(record: Record) -> Example:
    prompt = f"{record['premise']} ? {{mask}} , {record['hypothesis']}"
    return Example(prompt, ("Yes", "Maybe", "No"), _label(record, _NLI))


def _masked_rte(record: Record) -> Example:
    prompt = f"{record['premise']} ? {{mask}} , {record['hypothesis']}"
    return Example(prompt, YES_NO, _label(record, ("entailment", "not_entailment")))


def _masked_trec(record: Record) -> Example:
    field = "coarse_label" if "coarse_label" in record else "label"
    return Example(f"{{mask}} : {_text(record, 'text')}", _TREC_WORDS, _label(record, _TREC, field))


MASKED = {
    "sst2": LlmTask("classification", (_GLUE, "sst2"), _masked_sst2),
    "sst5": LlmTask("classification", ("SetFit/sst5", None), _masked_sst5, test_split="test"),
    "snli": LlmTask("classification", ("stanfordnlp/snli", None), _masked_nli, test_split="test"),
    "mnli": LlmTask("classification", (_GLUE, "mnli"), _masked_nli, test_split="validation_matched"),
    "rte": LlmTask("classification", (_SUPER, "rte"), _masked_rte),
    "trec": LlmTask("classification", ("SetFit/TREC-QC", None), _masked_trec, test_split="test"),
}


# --- splits -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    train: list[Example]
    dev: list[Example]
    test: list[Example]


def draw(task: LlmTask, name: str, data_dir: Path, sizes: tuple[int, int, int], per_class: int | None) -> Splits:
    """Train, dev and test examples, drawn by a fixed shuffle as the papers do it.

    Args:
        data_dir: local files ``<name>/train.jsonl`` and ``dev.jsonl`` (or ``test.jsonl``) are taken where they are;
            otherwise the hub is asked.
        sizes: numbers of training, dev and test examples.
        per_class: of masked models k: so many training and as many dev examples of each class, in place of ``sizes``.
    """
    train, test = _examples(task, name, data_dir)
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(test)
    if per_class is None:
        dev = min(sizes[1], task.dev, len(train) // 2)
        return Splits(train[dev : dev + sizes[0]], train[:dev], test[: sizes[2]])
    chosen: list[list[Example]] = [[], []]
    for gold in sorted({example.gold for example in train}):
        same = [example for example in train if example.gold == gold]
        count = min(per_class, len(same) // 2)
        chosen[0] += same[:count]
        chosen[1] += same[count : 2 * count]
    return Splits(chosen[0], chosen[1], test[: sizes[2]])


def _examples(task: LlmTask, name: str, data_dir: Path) -> tuple[list[Example], list[Example]]:
    local = data_dir / name
    if (local / "train.jsonl").is_file():
        test = local / "dev.jsonl"
        files = (local / "train.jsonl", test if test.is_file() else local / "test.jsonl")
        records = [[row.values for row in read_rows(str(file))] for file in files]
    else:
        records = [_hub(task, split) for split in ("train", task.test_split)]
    try:
        train, test_examples = ([task.example(record) for record in part] for part in records)
    except KeyError as error:
        raise ZOError(f"the records of {name} have no column {error}") from error
    return train, test_examples


def _hub(task: LlmTask, split: str) -> list[Record]:
    path, configuration = task.hub
    try:
        import datasets

        table = datasets.load_dataset(path, configuration, split=split)
    except ImportError as error:
        raise ZOError("data sets of the hub need the datasets package: pip install 'zowrap[data]'") from error
    except Exception as error:  # the hub raises many kinds; each becomes one sentence
        raise ZOError(f"{path} is not in the data folder, and the hub did not give it ({error})") from error
    # Unlabelled records carry −1.
    return [dict(record) for record in table if record.get("label", 0) != -1]
