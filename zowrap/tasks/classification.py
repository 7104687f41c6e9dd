"""Define classification tasks: choose the form that fits the checkpoint, tokenise rows and compute metrics."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError, nearest
from zowrap.names import FORMS
from zowrap.step.parameters import canonical_name
from zowrap.storage.safetensors import LABEL_VECTORS, adapter_file, open_safetensors, read_metadata
from zowrap.tasks import templates
from zowrap.tasks.batches import Collator, Example, Examples, truncate
from zowrap.tasks.encoder import SENTENCE_TRANSFORMER, Encoder, default_encoder, kind_of_encoder
from zowrap.tasks.encoding import check_vocabulary, find_single, list_types, unknown_token
from zowrap.tasks.heads import identify
from zowrap.tasks.labels import label_index
from zowrap.tasks.loading import Source, check_complete, load_model
from zowrap.tasks.rows import Row, read_text

log = logging.getLogger("zowrap")

TEMPLATES = {"sequence": "{text}", "words": "{text}\nLabel: {label}", "sentence": "{text}", "vectors": "{text}"}


def choose_form(source: Source, head: str = "auto") -> tuple[str, str]:
    """Choose the form for a checkpoint by the head in its file, and explain the choice.

    Raises:
        ZOError: ``head`` is unknown, no form fits, or the form would drop a head that was trained for something else.
    """
    if head != "auto":
        if head not in FORMS:
            raise ZOError(f"unknown --head {head!r}{nearest(head, [*FORMS, 'auto'])}")
        return head, "as asked with --head"
    if read_saved_labels(Path(source.name) / LABEL_VECTORS) is not None:
        return "vectors", f"{source.name} holds label vectors"
    checkpoint = identify(source)
    name, why, kind = checkpoint.name, checkpoint.why, checkpoint.kind
    if kind == "sequence":
        return "sequence", f"{why}: it has a classification head"
    if kind_of_encoder(*source.places) == SENTENCE_TRANSFORMER:
        return "sentence", f"{source.name} is a sentence encoder ({name}): texts are compared with label names"
    if kind == "causal":
        return "words", f"{why}: labels are scored as words after the text"
    if getattr(source.config, "is_encoder_decoder", False):
        raise ZOError(
            f"{source.name} is an encoder-decoder ({name}), and classification needs an encoder, a causal language "
            "model or a classification head: --head sequence adds a new head"
        )
    if kind == "masked":
        return "sequence", f"{why}: it gets a new classification head, freshly initialised"
    if kind == "base":
        return "sentence", f"{why}, an encoder without a head: texts are compared with label names"
    said = f"is a {name}, whose head is for something else" if name else "does not say which class it is of"
    raise ZOError(
        f"{source.name} {said}: --head sequence adds a new classification head, --head sentence compares texts with "
        "label names, --head words scores labels with a causal language model"
    )


@dataclass
class Classification:
    """A classification task: everything that ``zowrap eval RUN`` needs apart from the weights.

    Attributes:
        form: one of :data:`FORMS`.
        labels: the names, in the order of their numbers.
        template: renders a row as text; ``{text}`` stands for ``text_column``, other fields for their columns.
        text_column, label_column: names in the data.
        max_length: the largest number of tokens in a row, including the label's words.
        pooling: of a sentence encoder whose folder says nothing of it, a name of :data:`POOLINGS`.
        numbered: whether a row may give the number of its label instead of its name.
        numbers: the number of each label in the data, None for one that has none; by default they count from 0.
        pair_column: the column of a second text, which the tokenizer joins with the first as the model was trained.
    """

    form: str
    labels: list[str]
    template: str
    text_column: str
    label_column: str
    max_length: int
    pooling: str = "mean"
    numbered: bool = False
    numbers: list[int | None] | None = None
    pair_column: str | None = None
    kind: str = "classification"

    def __post_init__(self) -> None:
        if len(self.labels) < 2:
            raise ZOError(
                f"classification needs at least two labels, and there is only {', '.join(map(repr, self.labels))}"
            )
        if len(set(self.labels)) != len(self.labels):
            raise ZOError("--labels names the same label twice")
        if self.numbers is not None and len(self.numbers) != len(self.labels):
            raise ZOError(f"there are {len(self.labels)} labels and {len(self.numbers)} numbers for them")
        if self.pair_column is not None and self.form != "sequence":
            raise ZOError(
                f"--text-pair-column is for a classification head, and not for --head {self.form}: put both texts "
                "into one with --template"
            )
        split = templates.parse_with_label if self.form == "words" else templates.parse_text_only
        self._parts = split(self.template)

    def record(self) -> dict[str, Any]:
        """The task as JSON types; ``Classification(**record)`` restores it."""
        return asdict(self)

    # --- rows → examples --------------------------------------------------------------------------------------

    def text(self, row: Row) -> str:
        """Render a row as text, without the label's words."""

        def value(field: str) -> str:
            if field == "text":
                return read_text(row, self.text_column)
            return read_text(row, field, "--template")

        return templates.render(self._parts, value)

    def check(self, rows: Sequence[Row]) -> None:
        """Raise :class:`ZOError` for the first row whose text or label cannot be used."""
        for row in rows:
            self.text(row)
            if self.pair_column is not None:
                read_text(row, self.pair_column, "--text-pair-column")
            self._label(row)

    def _label(self, row: Row) -> int:
        return label_index(row, self.label_column, self.labels, self.numbered, self.numbers)

    def examples(self, rows: Sequence[Row], source: Source) -> Examples:
        """Tokenise rows to ``{"input_ids": [int], "labels": int}``, truncating texts (a prompt from its left).

        Rows of two texts also get ``"token_type_ids": [int]`` if the tokenizer makes them, rows of one if it marks
        tokens with them (:func:`zowrap.tasks.encoding.list_types`): types that are all 0 are the model's default.

        Raises:
            ZOError: a label or a token is not known, or a form that knows no types would have to leave them out.
        """
        labels = [self._label(row) for row in rows]
        if self.pair_column is not None:
            return self._pairs(rows, labels, source)
        prompt = self._prompt(source)
        texts = [prompt + self.text(row) for row in rows]
        words = self.form == "words"
        if words:
            # The space before the label belongs to its words: most vocabularies have tokens that begin with a space.
            texts = [text.rstrip(" ") for text in texts]
        room = self.max_length - (self.label_words(source)[0].shape[1] if words else 0)
        if room < 1:
            raise ZOError(f"--max-length {self.max_length} leaves no room for the text before the label's words")
        tokenizer = source.tokenizer
        names = ("input_ids", "token_type_ids") if self._needs_types(source) else ("input_ids",)
        encoded = tokenizer(texts, verbose=False)
        items: list[Example] = []
        kept: list[Row] = []
        truncated = dropped = 0
        for i, (row, text, label) in enumerate(zip(rows, texts, labels, strict=True)):
            whole = list(encoded["input_ids"][i])
            single = find_single(tokenizer, text, whole)
            item = {name: list(encoded[name][i])[single] for name in names}
            ids = _strip_end(item["input_ids"], tokenizer) if words else item["input_ids"]
            if len(ids) > room:
                truncated += 1
                if words:
                    ids, _ = truncate(ids, [-100] * len(ids), room, tokenizer.bos_token_id)
                elif len(ids) < len(whole):  # the text has special tokens of its own
                    item = {name: each[:room] for name, each in item.items()}
                else:  # the tokenizer knows which special tokens must stay
                    cut = tokenizer(text, truncation=True, max_length=room, verbose=False)
                    item = {name: list(cut[name]) for name in names}
            item = {"input_ids": ids} if words else item
            if not item["input_ids"]:
                dropped += 1
                continue
            items.append({**item, "labels": label})
            kept.append(row)
        check_vocabulary(kept, (item["input_ids"] for item in items), source)
        return Examples(items, truncated, dropped, [row.index for row in kept])

    def _pairs(self, rows: Sequence[Row], labels: Sequence[int], source: Source) -> Examples:
        """Tokenise two texts of each row together, with the separator and the token types of the tokenizer."""
        assert self.pair_column is not None
        first = [self.text(row) for row in rows]
        second = [read_text(row, self.pair_column, "--text-pair-column") for row in rows]
        whole = source.tokenizer(first, second, verbose=False)["input_ids"]
        encoded = source.tokenizer(first, second, truncation=True, max_length=self.max_length, verbose=False)
        types = encoded.get("token_type_ids")
        if types is not None and not _knows_types(source, max(map(max, types))):
            types = None
        items: list[Example] = []
        for i, label in enumerate(labels):
            items.append({"input_ids": list(encoded["input_ids"][i]), "labels": label})
            if types is not None:
                items[i]["token_type_ids"] = list(types[i])
        check_vocabulary(rows, encoded["input_ids"], source)
        truncated = sum(len(ids) > self.max_length for ids in whole)
        return Examples(items, truncated, rows=[row.index for row in rows])

    def _needs_types(self, source: Source) -> bool:
        """Whether single texts come with token types: the tokenizer marks tokens with them, and the model knows them.

        Raises:
            ZOError: this form would leave them out.
        """
        highest = max(list_types(source.tokenizer), default=0)
        if highest == 0 or not _knows_types(source, highest):
            return False
        if self.form != "sequence":
            raise ZOError(
                f"the tokenizer of {source.name} marks tokens with types of their own, which --head {self.form} would "
                "leave out: --head sequence adds a new classification head"
            )
        return True

    def encoder(self, source: Source) -> Encoder | None:
        """The sentence encoder that this form compares texts with, ready to tokenise; None for other forms."""
        if self.form not in ("sentence", "vectors"):
            return None
        found = source.encoder or default_encoder(source.name, source.config, self.pooling)
        if source.tokenizer is not None:
            found.prepare(source.tokenizer)
        return found

    def _prompt(self, source: Source) -> str:
        encoder = self.encoder(source)
        return "" if encoder is None else encoder.prompt

    def collator(self, source: Source) -> Collator:
        pad = head_pad_id(source.config, source.pad_id) if self.form == "sequence" else source.pad_id
        tokenizer = source.tokenizer
        # Of a head that reads the last position, whatever it holds, the tokenizer says where the padding goes.
        last = self.form == "sequence" and getattr(source.config, "summary_type", None) == "last"
        side = tokenizer.padding_side if last else "left" if self.form == "words" else "right"
        return Collator(pad, side, pad_type=tokenizer.pad_token_type_id)

    def label_words(self, source: Source) -> tuple[Tensor, Tensor]:
        """Tokenise the labels, as words after a text or as names to embed: ids and mask, int64 ``[labels, tokens]``."""
        tokenizer = source.tokenizer
        prompt = self._prompt(source)
        names = [prompt + label_to_words(label) for label in self.labels]
        if self.form == "words":
            rows = _tokenize_continuations(tokenizer, names)
        else:
            rows = tokenizer(names, truncation=True, max_length=self.max_length, verbose=False)["input_ids"]
        size = source.vocabulary_size
        seen: dict[tuple[int, ...], str] = {}
        for label, row in zip(self.labels, rows, strict=True):
            if not row:
                raise ZOError(f"the tokenizer has no tokens for label {label!r}: rename it with --labels")
            if size is not None and max(row) >= size:
                raise unknown_token(f"label {label!r}", max(row), size, source)
            other = seen.setdefault(tuple(row), label)
            if other != label:
                raise ZOError(
                    f"labels {other!r} and {label!r} have the same tokens in this model: rename one with --labels"
                )
        batch = Collator(source.pad_id)([{"input_ids": list(row)} for row in rows])
        return batch["input_ids"], batch["attention_mask"]

    # --- the model --------------------------------------------------------------------------------------------

    def build(self, source: Source, dtype: torch.dtype, seed: int = 0) -> nn.Module:
        """Load the checkpoint and wrap it in the form."""
        from transformers import (
            AutoModel,
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
            AutoModelForTextEncoding,
        )

        from zowrap.tasks.forms import SentenceForm, SequenceForm, VectorsForm, WordsForm

        if self.form == "sequence":
            changes = self._head_config(source)
            other = not source.empty and identify(source).kind == "other"  # a head of the same name, for something else
            if other:
                changes["ignore_mismatched_sizes"] = True
            module = load_model(source, AutoModelForSequenceClassification, dtype, seed, **changes)
            if other:
                check_complete(source, _renew_head(module, seed))
            return SequenceForm(module).eval()
        ids, mask = self.label_words(source)
        if self.form == "words":
            module = load_model(source, AutoModelForCausalLM, dtype, seed)
            return WordsForm(module, ids, mask).eval()
        encoder = self.encoder(source)
        assert encoder is not None
        # Of an encoder-decoder, sentence-transformers takes the encoder alone.
        half = getattr(source.config, "is_encoder_decoder", False) or any(
            name.endswith("EncoderModel") for name in source.architectures
        )
        auto = AutoModelForTextEncoding if half else AutoModel
        module = load_model(source, auto, dtype, seed)
        window = limit_window(encoder, source)
        shorter = self.max_length if window is not None and self.max_length < window else None
        after = encoder.build(source.tokenizer, source.empty, shorter)
        if self.form == "vectors":
            begin = source.label_vectors or Path(source.name) / LABEL_VECTORS
            vectors = None if source.empty else read_saved_vectors(begin, self.labels)
            return VectorsForm(module, ids, mask, after, self.labels, vectors).eval()
        return SentenceForm(module, ids, mask, after).eval()

    def _head_config(self, source: Source) -> dict[str, Any]:
        """The configuration's entries for the labels; warns if the checkpoint's own head has another size."""
        known = getattr(source.config, "num_labels", None)
        changes: dict[str, Any] = {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }
        if known != len(self.labels) and self._has_own_head(source):
            if not adapter_file(source.name).is_file():  # adapters bring the head they were tuned with
                log.warning(
                    "the checkpoint's head has %s labels and the data has %d: it gets a new head, freshly initialised",
                    known,
                    len(self.labels),
                )
            changes["ignore_mismatched_sizes"] = True
        return changes

    @staticmethod
    def _has_own_head(source: Source) -> bool:
        """Whether the model, or the base of adapters, has a classification head by itself."""
        named = source.architectures[:1]
        return any(name.endswith("ForSequenceClassification") for name in named) or identify(source).kind == "sequence"

    def default_trainable(self, model: nn.Module) -> list[str] | None:
        """The names of the parameters that move by default; None for all.

        For a sentence encoder, the matrices of its layers: its embeddings are half the weights of a small model and
        gained nothing in our measurements (TREC: 0.61 with and without them), and its pooler is unused, so its weights
        would only collect noise. For label vectors, only these.
        """
        if self.form == "vectors":
            return [r"^vectors\.weight$"]
        if self.form != "sentence":
            return None
        inside = ((name, tensor) for name, tensor in model.named_parameters() if name.startswith("module."))
        names = [name for name, tensor in inside if tensor.ndim >= 2 and _is_in_layer(name)]
        return [f"^{re.escape(canonical_name(name))}$" for name in names] or None

    @property
    def loss_fn(self) -> Any:
        """The function of per-example losses for ``zo_wrap`` and ``ZOTrainer``."""
        from zowrap.tasks.forms import per_example_loss

        return per_example_loss

    def metrics(self, output: Any, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """``{"accuracy": (right, counted)}``, float32 ``[rows]`` each."""
        right = (output.logits.argmax(-1) == batch["labels"]).float()
        return {"accuracy": (right, torch.ones_like(right))}

    def predictions(self, output: Any, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        """One JSON-able record per row: label, prediction, and the probability of each label."""
        probabilities = output.logits.softmax(-1)
        return [
            {
                "label": self.labels[label],
                "prediction": self.labels[int(row.argmax())],
                "probabilities": dict(zip(self.labels, row.tolist(), strict=True)),
            }
            for row, label in zip(probabilities, batch["labels"].tolist(), strict=True)
        ]


def _knows_types(source: Source, highest: int) -> bool:
    """Whether the model has token types up to ``highest``; it has not where its tokenizer is of another family."""
    known = getattr(source.config, "type_vocab_size", None)
    return known is None or highest < known


def head_pad_id(config: Any, pad: int) -> int:
    """The token that a classification head takes for padding: its configuration's, or ``pad`` where that has none.

    The head of a decoder reads the last token of each row that is not this one: padded with another, a row would be
    classified by its padding.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    own, size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    return own if isinstance(own, int) and 0 <= own < (size or 0) else pad


def read_saved_labels(file: Path) -> list[str] | None:
    """Read the labels of the vectors in a file, in order; None if there is no such file.

    Raises:
        ZOError: the file does not name its labels.
    """
    if not file.is_file():
        return None
    try:
        names = json.loads(read_metadata(file).get("labels", ""))
    except ValueError:
        names = None
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise ZOError(f"{file} is damaged: its header does not name the labels of its vectors")
    return names


def read_saved_vectors(file: Path, labels: Sequence[str]) -> Tensor | None:
    """Read the label vectors that an earlier run saved, float32 ``[labels, width]`` in the order of ``labels``.

    Raises:
        ZOError: the file is damaged or holds vectors of other labels.
    """
    theirs = read_saved_labels(file)
    if theirs is None:
        return None
    with open_safetensors(file) as tensors:
        named = list(tensors.keys()) == ["weight"]
        vectors = tensors.get_tensor("weight") if named else None
    if vectors is None or vectors.ndim != 2 or vectors.dtype != torch.float32 or len(theirs) != vectors.shape[0]:
        raise ZOError(f"{file} is damaged: it does not hold one vector for each of the labels {', '.join(theirs)}")
    if sorted(theirs) != sorted(labels):
        raise ZOError(f"{file} has the labels {', '.join(theirs)}, but the data has {', '.join(labels)}")
    return vectors[[theirs.index(label) for label in labels]]


def _is_in_layer(name: str) -> bool:
    """Whether a parameter belongs to a numbered layer, and not to the embeddings, the pooler or a final norm."""
    return re.search(r"\.\d+\.", name) is not None and "pooler" not in name


def _renew_head(model: nn.Module, seed: int) -> list[str]:
    """Initialise the head of a model anew, drawn with ``seed``: its weights were trained for something else.

    Returns:
        The names of these weights.
    """
    from zowrap.quant.lowering import mark_fresh

    inside = getattr(model, "base_model_prefix", "")
    children = model.named_children()
    heads = {name: child for name, child in children if name != inside and next(child.parameters(), None) is not None}
    torch.manual_seed(seed)
    for name, head in heads.items():
        for tensor in head.parameters():
            tensor._is_hf_initialized = False  # type: ignore[attr-defined]  # else transformers leaves it as it is
        for module in head.modules():
            model._init_weights(module)  # type: ignore[operator]
        log.warning("freshly initialised, because it was trained for something else: %s", name)
    fresh = [f"{name}.{each}" for name, head in heads.items() for each, _ in head.named_parameters()]
    mark_fresh(model, {*getattr(model, "fresh_weights", ()), *fresh})
    return fresh


def limit_window(encoder: Encoder | None, source: Source) -> int | None:
    """The largest number of tokens of a text: that of the encoder's settings, as far as its model reads them."""
    if encoder is None or encoder.window is None:
        return source.window
    return source.limit_window(encoder.window)


def label_to_words(label: str) -> str:
    """Turn a label's name into words: ``card_arrival`` → ``card arrival``."""
    return label.replace("_", " ").strip() or label


def _strip_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Drop the end-of-text token that some tokenizers append, because the label's words follow the text."""
    ids = list(ids)
    while ids and ids[-1] in {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None, tokenizer.bos_token_id}:
        ids.pop()
    return ids


def _tokenize_continuations(tokenizer: Any, names: list[str]) -> list[list[int]]:
    """Tokenise each name as it follows other text; if one is a prefix of another, all get an end-of-text token."""
    stem = _strip_end(tokenizer("Label:")["input_ids"], tokenizer)
    rows = []
    for name in names:
        whole = _strip_end(tokenizer(f"Label: {name}")["input_ids"], tokenizer)
        # Vocabularies that merge across the boundary change the stem; the name is then tokenised on its own.
        apart = tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
        rows.append(whole[len(stem) :] if whole[: len(stem)] == stem else list(apart))
    begins = any(a != b and b[: len(a)] == a for a in rows for b in rows)
    if begins and tokenizer.eos_token_id is not None:
        rows = [[*row, tokenizer.eos_token_id] for row in rows]
    return rows
