"""Find the assistant's turns in a rendered chat, so that every one of them is learned.

A template says where its turns are if it marks them with ``{% generation %}``; transformers then makes the mask. Other
templates are asked: the chat is rendered again with a mark in place of a turn's content. Comparing texts, and not
tokens, finds a turn whose first token merges with what stands before it, and one from which the template drops the
reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zowrap.errors import ZOError

Message = dict[str, Any]
Render = Callable[..., str]  # render(messages, **options of apply_chat_template)

_MARK = "zowrapmarkedturn"  # letters alone: no template trims, escapes or splits them
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Chat:
    """A rendered chat.

    Attributes:
        text: with all special tokens in it.
        turns: (start, end) of the assistant's turns in ``text``: what follows the prompt for a turn, and what closes
            the turn.
        lost: the number of the assistant's turns that are not found in ``text``.
    """

    text: str
    turns: list[tuple[int, int]]
    lost: int = 0


def marks_turns(template: str) -> bool:
    """Whether a template marks the assistant's turns by itself."""
    return _GENERATION.search(template) is not None


def render_chat(messages: Sequence[Message], render: Render) -> Chat:
    """Render a chat and find the assistant's turns in it.

    Raises:
        ZOError: the template rejects the messages.
    """
    text = render(list(messages))
    prompt = _read_prompt(messages, render)
    turns: list[tuple[int, int]] = []
    lost = lower = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        found = _find_content(text, messages, i, render)
        if found is None or found[0] < lower:
            lost += 1
            continue
        start, end = found
        end += _count_closing(text[end:], messages, i, render)
        turns.append((_find_prompted(text, prompt, messages, i, start, render), end))
        lower = end
    return Chat(text, turns, lost)


def label_turns(tokenizer: Any, chat: Chat, ignored: int) -> tuple[list[int], list[int]]:
    """Tokenise a rendered chat: token ids, and labels that are ``ignored`` outside of the turns, ``[n]`` each.

    A token across the beginning of a turn belongs to it.
    """
    # The template writes the special tokens itself.
    fast = getattr(tokenizer, "is_fast", False)
    options = {"return_offsets_mapping": True} if fast else {}
    encoded = tokenizer(chat.text, add_special_tokens=False, verbose=False, **options)
    ids = list(encoded["input_ids"])
    labels = [ignored] * len(ids)
    if fast:
        for i, (start, end) in enumerate(encoded["offset_mapping"]):
            if any(start < until and end > since for since, until in chat.turns):
                labels[i] = ids[i]
        return ids, labels
    for since, until in chat.turns:
        first, last = (
            count_common(tokenizer(chat.text[:place], add_special_tokens=False, verbose=False)["input_ids"], ids)
            for place in (since, until)
        )
        labels[first:last] = ids[first:last]
    return ids, labels


def count_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Count the leading items that agree."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


def _find_content(text: str, messages: Sequence[Message], i: int, render: Render) -> tuple[int, int] | None:
    """Where the content of a message stands in the rendered chat, however the template writes it; None if nowhere."""
    marked = _try_render(render, [*messages[:i], {**messages[i], "content": _MARK}, *messages[i + 1 :]])
    if marked is None or marked.count(_MARK) != 1:
        return None
    before, after = marked.split(_MARK)
    start, end = count_common(before, text), len(text) - len(after)
    if end < start or not text.endswith(after):
        return None
    if start < len(before) and i > 0:  # what stands before the content depends on it, at most within the turn
        previous = _find_content(text, messages, i - 1, render)
        if previous is None or start < previous[1]:
            return None
    return start, end


def _find_prompted(text: str, prompt: str, messages: Sequence[Message], i: int, start: int, render: Render) -> int:
    """Where a turn begins whose content begins at ``start``: right after the prompt for it.

    A template may write something in between, such as empty reasoning, which the model has to write as well.
    """
    asked = text.rfind(prompt, 0, start) if prompt else -1
    if asked < 0 or asked + len(prompt) == start:
        return start
    if i > 0:
        previous = _find_content(text, messages, i - 1, render)
        if previous is None or asked < previous[1]:  # it is somebody's words or the prompt for another turn
            return start
    return asked + len(prompt)


def _count_closing(rest: str, messages: Sequence[Message], i: int, render: Render) -> int:
    """The length of what closes a turn, at the beginning of the text after its content."""
    marked = _try_render(render, [*messages[:i], {**messages[i], "content": _MARK}])
    return 0 if marked is None else count_common(marked.rpartition(_MARK)[2], rest)


def _read_prompt(messages: Sequence[Message], render: Render) -> str:
    """The prompt that the template writes for a turn of the assistant; empty if it has none."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i > 0:
            before = _try_render(render, messages[:i])
            asked = _try_render(render, messages[:i], add_generation_prompt=True)
            if before is not None and asked is not None and asked.startswith(before):
                return asked[len(before) :]
            return ""
    return ""


def _try_render(render: Render, messages: Sequence[Message], **options: Any) -> str | None:
    """Render part of a chat or a chat with a mark, which a template may reject."""
    try:
        return render(list(messages), **options)
    except ZOError:
        return None
