"""Prepare a model for a task of the language-model tables, and score its answers.

Training is ``ZOTrainer``'s on the library's own tasks, wherever there is one: classification by label words and
language modelling on prompt and completion. The benchmark adds what the library has no task for: a word at the mask of
a masked language model, and the scoring of candidates and of generated answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.papers.llm_tasks import Example, LlmTask, Splits
from zowrap.errors import ZOError
from zowrap.loss import evaluation
from zowrap.loss.module import IGNORED
from zowrap.tasks.batches import iterate_batches
from zowrap.tasks.classification import Classification
from zowrap.tasks.forms import Form
from zowrap.tasks.loading import Source, load_model
from zowrap.tasks.resolve import resolve
from zowrap.tasks.rows import Row

NEW_TOKENS = 50  # of a generated answer, as in the MeZO paper


@dataclass
class Prepared:
    """Everything that training and scoring need.

    Attributes:
        score: the metric on the test examples at the model's present weights, in per cent.
        metric: its name.
    """

    model: nn.Module
    train: Any
    dev: Any
    collator: Any
    loss_fn: Any
    score: Callable[[], float]
    metric: str


def is_masked(source: Source) -> bool:
    """Whether the checkpoint is a masked language model, by its architecture.

    Raises:
        ZOError: it is neither that nor a causal language model.
    """
    name = source.architectures[0] if source.architectures else ""
    if name.endswith("ForMaskedLM"):
        return True
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return False
    raise ZOError(
        f"{source.name} is neither a causal nor a masked language model ({name or 'it names no architecture'}): "
        "the tables are of these"
    )


def prepare(
    source: Source, task: LlmTask, splits: Splits, dtype: torch.dtype, seed: int, length: int, lora: bool
) -> Prepared:
    """Tokenise, load the weights, and put adapters on them if ``lora``."""
    if task.kind != "classification":
        prepared = _language_modelling(source, task, splits, dtype, seed, length)
        prepared.model = with_lora(prepared.model) if lora else prepared.model
        return prepared
    prepared = (_masked if is_masked(source) else _words)(source, splits, dtype, seed, length)
    form: Any = prepared.model
    form.module = with_lora(form.module) if lora else form.module
    return prepared


def with_lora(model: nn.Module) -> nn.Module:
    """Adapters as in the MeZO paper: rank 8, α 16, on the queries and values of the attention."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ZOError("--tuning lora needs peft: pip install 'zowrap[peft]'") from error
    targets = (
        ["query", "value"] if any(name.endswith("query") for name, _ in model.named_modules()) else ["q_proj", "v_proj"]
    )
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))


def _rows(examples: Sequence[Example], values: Callable[[Example], dict[str, Any]]) -> list[Row]:
    return [Row(values(example), f"example {number}", number) for number, example in enumerate(examples)]


# --- classification -----------------------------------------------------------------------------------------------


def _words(source: Source, splits: Splits, dtype: torch.dtype, seed: int, length: int) -> Prepared:
    words = splits.train[0].candidates
    parts = [
        _rows(part, lambda example: {"text": example.prompt, "label": example.candidates[example.gold]})
        for part in (splits.train, splits.dev, splits.test)
    ]
    template = "{text} {label}"
    task, _ = resolve(
        "classification", parts[0], source, head="words", labels=words, template=template, max_length=length
    )
    return _classification(task, task.build(source, dtype, seed), source, parts)


def _masked(source: Source, splits: Splits, dtype: torch.dtype, seed: int, length: int) -> Prepared:
    from transformers import AutoModelForMaskedLM

    mask = source.tokenizer.mask_token
    words = splits.train[0].candidates
    parts = [
        _rows(part, lambda e: {"text": e.prompt.format(mask=mask), "label": e.candidates[e.gold]})
        for part in (splits.train, splits.dev, splits.test)
    ]
    window = min(length, source.window or length)
    task = Classification("sequence", list(words), "{text}", "text", "label", window)  # for its tokens and its counts
    ids = [source.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    if any(len(each) != 1 for each in ids):
        raise ZOError(f"the label words {', '.join(words)} are not one token each for {source.name}")
    module = load_model(source, AutoModelForMaskedLM, dtype, seed)
    model = MaskedForm(module, torch.tensor([each[0] for each in ids]), source.tokenizer.mask_token_id).eval()
    return _classification(task, model, source, parts)


def _classification(task: Any, model: nn.Module, source: Source, parts: Sequence[list[Row]]) -> Prepared:
    train, dev, test = (task.examples(part, source) for part in parts)
    collator = task.collator(source)

    def score() -> float:
        return (
            100
            * evaluation.evaluate(model, _on(model, iterate_batches(test, collator, 16)), task.loss_fn, task.metrics)[
                "accuracy"
            ]
        )

    return Prepared(model, train, dev, collator, task.loss_fn, score, "accuracy")


class MaskedForm(Form):
    """A masked language model as a classifier: the scores are the logits of the label words at the mask.

    Args:
        module: with a masked-LM head.
        word_ids: int64 ``[labels]``, one token for each label.
        mask_id: the mask's token id; it occurs once in every row.
    """

    word_ids: Tensor

    def __init__(self, module: nn.Module, word_ids: Tensor, mask_id: int) -> None:
        super().__init__(module)
        self.register_buffer("word_ids", word_ids, persistent=False)
        self.mask_id = mask_id

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = self._call(input_ids=input_ids, attention_mask=attention_mask).logits
        # A sum over the one position of the mask: a gather whose size does not depend on the data.
        at = (input_ids == self.mask_id).to(logits.dtype).unsqueeze(-1)
        return (logits.index_select(-1, self.word_ids) * at).sum(1).float()


# --- choices and answers ------------------------------------------------------------------------------------------


def _language_modelling(
    source: Source, task: LlmTask, splits: Splits, dtype: torch.dtype, seed: int, length: int
) -> Prepared:
    if is_masked(source):
        raise ZOError(f"{source.name} is a masked language model: choices and answers need a causal one")

    def right(example: Example) -> str:
        return example.candidates[example.gold] if example.candidates else example.answers[0]

    rows = [
        _rows(part, lambda example: {"prompt": example.prompt, "completion": f" {right(example)}"})
        for part in (splits.train, splits.dev)
    ]
    lm, _ = resolve("lm", rows[0], source, max_length=length)
    model = lm.build(source, dtype, seed)
    train, dev = (lm.examples(part, source) for part in rows)
    choice = task.kind == "choice"

    def score() -> float:
        ask = _chosen if choice else _answered
        return 100 * fmean(ask(model, source, lm, example) for example in splits.test)

    return Prepared(model, train, dev, lm.collator(source), None, score, "accuracy" if choice else "F1")


@torch.no_grad()
def _chosen(model: nn.Module, source: Source, lm: Any, example: Example) -> float:
    """1 if the candidate with the highest mean log-likelihood of its tokens is right."""
    rows = _rows([example] * len(example.candidates), lambda e: {"prompt": e.prompt})
    for row, candidate in zip(rows, example.candidates, strict=True):
        row.values["completion"] = f" {candidate}"
    found = lm.examples(rows, source)
    if len(found) < len(rows):
        raise ZOError(f"a candidate of {example.prompt[-40:]!r} does not fit into --max-length")
    batch = next(_on(model, iterate_batches(found, lm.collator(source), len(rows))))
    scores = mean_likelihood(model, batch)
    texts = example.answers or (example.candidates[example.gold],)
    return float(example.candidates[int(scores.argmax())] in texts)


def mean_likelihood(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean log-likelihood of each row's label tokens, float32 ``[rows]``."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    wanted = batch["labels"][:, 1:]
    counted = wanted != IGNORED
    each = logits.log_softmax(-1).gather(-1, wanted.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return (each * counted).sum(1) / counted.sum(1)


@torch.no_grad()
def _answered(model: Any, source: Source, lm: Any, example: Example) -> float:
    """F1 of the words of a greedily generated answer, the best over the right answers."""
    tokenizer = source.tokenizer
    ids = tokenizer(example.prompt, verbose=False)["input_ids"]
    ids = ids[:-1] if ids and ids[-1] == tokenizer.sep_token_id else ids
    prompt = torch.tensor([ids[-(lm.max_length - NEW_TOKENS) :]], device=next(model.parameters()).device)
    made = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
    )
    text = tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True).split("\n")[0]
    return max(f1(text, answer) for answer in example.answers)


def f1(said: str, right: str) -> float:
    """Harmonic mean of precision and recall over words, as SQuAD counts them."""
    a, b = _plain_words(said), _plain_words(right)
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def _plain_words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    letters = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()


def _on(model: nn.Module, found: Any) -> Any:
    """The batches on the model's device."""
    device = next(model.parameters()).device
    return ({name: tensor.to(device) for name, tensor in batch.items()} for batch in found)
