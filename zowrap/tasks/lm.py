"""Define language modelling on plain text, prompts with completions, or chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError
from zowrap.loss.module import IGNORED, pad_for_prompt, token_losses
from zowrap.tasks.batches import Collator, Example, Examples, truncate
from zowrap.tasks.chat import count_common, label_turns, marks_turns, render_chat
from zowrap.tasks.encoding import check_vocabulary, encode
from zowrap.tasks.loading import Source, load_model
from zowrap.tasks.rows import Row, check_encodable, read_text


@dataclass
class LanguageModelling:
    """A language-modelling task.

    Attributes:
        layout: ``"text"`` (all tokens are labels), ``"prompt"`` (columns prompt and completion; the completion's
            tokens are labels), or ``"messages"`` (a list of ``{"role", "content"}``, rendered by the chat template;
            the tokens of the assistant's turns are labels).
        text_column: the column of plain text or of messages.
        max_length: the largest number of tokens in a row.
        end_of_text: append the end-of-text token to plain text as well. Completions always get it, so that the model
            learns where to stop. Plain text may be any passage, and a model that was trained on a stream without the
            token would spend its steps on that one label (24 nats per row for one of our test models).
    """

    layout: str
    text_column: str
    max_length: int
    end_of_text: bool = False
    kind: str = "lm"

    loss_fn = None  # zo_wrap knows the model's own head: token-weighted cross-entropy

    def record(self) -> dict[str, Any]:
        """The task as JSON types; ``LanguageModelling(**record)`` restores it."""
        return asdict(self)

    def check(self, rows: Sequence[Row]) -> None:
        """Raise :class:`ZOError` for the first row whose text cannot be used."""
        for row in rows:
            if self.layout == "messages":
                _messages(row, self.text_column)
            elif self.layout == "prompt":
                read_text(row, "prompt")
                read_text(row, "completion")
            else:
                read_text(row, self.text_column)

    def examples(self, rows: Sequence[Row], source: Source) -> Examples:
        """Tokenise rows to ``{"input_ids": [int], "labels": [int]}``, with -100 at positions without a label.

        A row with no label token after its first position is dropped and counted, because its loss would be 0/0. A turn
        of the assistant that cannot be found in the rendered chat is counted, too.
        """
        to_tokens = {"messages": self._chat, "prompt": self._prompt, "text": self._text}[self.layout]
        items: list[Example] = []
        kept: list[Row] = []
        truncated = dropped = lost = 0
        for row in rows:
            ids, labels, unfound = to_tokens(row, source.tokenizer)
            lost += unfound
            if len(ids) > self.max_length:
                truncated += 1
                ids, labels = truncate(ids, labels, self.max_length, source.tokenizer.bos_token_id)
            if all(label == IGNORED for label in labels[1:]):
                dropped += 1
                continue
            items.append({"input_ids": ids, "labels": labels})
            kept.append(row)
        check_vocabulary(kept, (item["input_ids"] for item in items), source)
        return Examples(items, truncated, dropped, [row.index for row in kept], lost)

    # Each of these gives token ids, labels, and the number of turns that are not learned although they should be.

    def _text(self, row: Row, tokenizer: Any) -> tuple[list[int], list[int], int]:
        ids = encode(tokenizer, read_text(row, self.text_column))
        ids = _append_end(ids, tokenizer) if self.end_of_text else ids
        return ids, list(ids), 0

    def _prompt(self, row: Row, tokenizer: Any) -> tuple[list[int], list[int], int]:
        prompt, completion = read_text(row, "prompt"), read_text(row, "completion")
        ids = _append_end(encode(tokenizer, prompt + completion), tokenizer)
        # Tokenise both together, as the model will see them; a token across the boundary belongs to the completion.
        start = count_common(encode(tokenizer, prompt), ids)
        if not completion:
            return ids, [IGNORED] * len(ids), 0
        return ids, [IGNORED] * start + ids[start:], 0

    def _chat(self, row: Row, tokenizer: Any) -> tuple[list[int], list[int], int]:
        messages = _messages(row, self.text_column)

        def render(some: list[dict[str, Any]], **options: Any) -> Any:
            return _apply_template(tokenizer, some, row, **options)

        if getattr(tokenizer, "is_fast", False) and marks_turns(_template(tokenizer)):
            asked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
            encoded = render(messages, **asked)
            ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
            marked = sum(now and not before for before, now in zip([0, *mask], mask, strict=False))
            turns = sum(message["role"] == "assistant" for message in messages)
            labels = [token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)]
            return ids, labels, max(0, turns - marked)
        chat = render_chat(messages, render)
        return *label_turns(tokenizer, chat, IGNORED), chat.lost

    def collator(self, source: Source) -> Collator:
        return Collator(source.pad_id)

    def build(self, source: Source, dtype: torch.dtype, seed: int = 0) -> nn.Module:
        """Load the checkpoint as a causal language model."""
        from transformers import AutoModelForCausalLM

        if getattr(source.config, "is_encoder_decoder", False):
            raise ZOError(f"{source.name} is an encoder-decoder, and --task lm needs a causal language model")
        return load_model(source, AutoModelForCausalLM, dtype, seed)

    def default_trainable(self, model: nn.Module) -> list[str] | None:
        """None, because everything moves."""
        return None

    def metrics(self, output: Any, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """``{"accuracy": (right, counted)}`` over the label tokens, float32 ``[rows]`` each."""
        wanted = pad_for_prompt(batch["labels"], output.logits)[:, 1:]
        counted = wanted != IGNORED
        right = (output.logits[:, :-1].argmax(-1) == wanted) & counted
        return {"accuracy": (right.sum(-1).float(), counted.sum(-1).float())}

    def predictions(self, output: Any, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        """One JSON-able record per row: the mean loss per label token, and the number of label tokens."""
        sums, counts = token_losses(output.logits[:, :-1], pad_for_prompt(batch["labels"], output.logits)[:, 1:])
        return [
            {"loss": total / max(count, 1.0), "tokens": int(count)}
            for total, count in zip(sums.tolist(), counts.tolist(), strict=True)
        ]


def choose_layout(row: Row, text_column: str | None) -> tuple[str, str]:
    """Choose the layout of the data and the column of its text by the first row.

    A column that the user names is the one; else chat messages come first, then prompts, then plain text.
    """
    values = row.values
    column = "text" if text_column is None else text_column
    if text_column is None and "messages" in values:
        return "messages", "messages"
    if isinstance(values.get(column), list):
        return "messages", column
    if text_column is None and "prompt" in values and "completion" in values:
        return "prompt", column
    return "text", column


def _messages(row: Row, column: str) -> list[dict[str, Any]]:
    value = row.values.get(column)
    if not isinstance(value, list) or not value:
        raise ZOError(f"{row.where}: column {column!r} is not a list of messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ZOError(f"{row.where}: a message needs a role and a content")
        if not isinstance(message.get("content"), str):
            raise ZOError(f"{row.where}: the content of a message is not text")
        check_encodable(message["content"], row, "a message")
    return value


def _append_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Append the end-of-text token, which tells the model where to stop."""
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _template(tokenizer: Any) -> str:
    """The chat template of a tokenizer that has one or several; empty if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:  # of several templates none is the default; applying one says so
        return ""


def _apply_template(tokenizer: Any, messages: list[dict[str, Any]], row: Row, **options: Any) -> Any:
    """Render messages by the chat template: text, or what ``options`` ask for."""
    if not getattr(tokenizer, "chat_template", None):
        raise ZOError("the model's tokenizer has no chat template, and a messages column needs one")
    try:
        return tokenizer.apply_chat_template(messages, **{"tokenize": False, **options})
    except Exception as error:  # a template may raise anything, for a wrong order of roles for example
        raise ZOError(f"{row.where}: the chat template rejects these messages ({error})") from error
