"""Every turn of the assistant is learned, whatever its template looks like; those that cannot be found are counted."""

from __future__ import annotations

import re
from typing import Any

import pytest

from zowrap.errors import ZOError
from zowrap.loss.module import IGNORED
from zowrap.tasks.chat import label_turns, render_chat
from zowrap.tasks.lm import LanguageModelling
from zowrap.tasks.loading import Source
from zowrap.tasks.rows import Row


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TWO = [user("How many?"), assistant("12 cats."), user("Where?"), assistant("In the park.")]
FIRST = [assistant("Hello."), user("How many?"), assistant("12 cats.")]
PLAIN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|assistant|>"
# Drops the reasoning of all turns but the last, and writes an empty one where there is none.
REASONING = """
{%- for m in messages %}<|{{ m['role'] }}|>
{%- if m['role'] == 'assistant' %}
{%- set parts = m['content'].split('</think>') %}
{%- if loop.last %}<think>{{ parts[0].split('<think>')[-1] if parts | length > 1 else '' }}</think>{% endif %}
{{- parts[-1] }}
{%- else %}{{ m['content'] }}{% endif %}<|end|>
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


def renderer(template: str) -> Any:
    """What a tokenizer's apply_chat_template does with a template, without the tokens."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(messages: list[dict[str, str]], **options: Any) -> str:
        if not messages:
            raise ZOError("an empty conversation")
        try:
            return render_jinja_template([messages], chat_template=template, **options)[0][0]
        except Exception as error:
            raise ZOError(str(error)) from error

    return render


def turns(template: str, messages: list[dict[str, str]]) -> tuple[list[str], int]:
    chat = render_chat(messages, renderer(template))
    return [chat.text[start:end] for start, end in chat.turns], chat.lost


@pytest.mark.parametrize(
    "ask", ["", ASK + "{% endif %}", ASK + "<think>\n{% endif %}", ASK + "<think></think>{% endif %}"]
)
def test_turns_are_found_whatever_the_prompt_is(ask: str) -> None:
    assert turns(PLAIN + ask, TWO) == (["12 cats.<|end|>\n", "In the park.<|end|>\n"], 0)
    assert turns(PLAIN + ask, FIRST) == (["Hello.<|end|>\n", "12 cats.<|end|>\n"], 0)


def test_reasoning_is_learned_where_the_template_keeps_it() -> None:
    messages = [user("a"), assistant("<think>x</think>one"), user("b"), assistant("<think>y</think>two")]
    assert turns(REASONING, messages) == (["one<|end|>", "<think>y</think>two<|end|>"], 0)
    assert turns(REASONING, TWO)[0][1] == "<think></think>In the park.<|end|>"  # the model has to write it, too


def test_words_of_others_are_not_learned() -> None:
    said = "<|assistant|>I am one, <|end|>\n and 12 cats."
    messages = [user(said), assistant("12 cats."), user(said), assistant("12 cats.")]
    assert turns(PLAIN + ASK + "{% endif %}", messages) == (["12 cats.<|end|>\n"] * 2, 0)
    assert turns(PLAIN + ASK + "<think>{% endif %}", messages) == (["12 cats.<|end|>\n"] * 2, 0)


def test_empty_turns_and_neighbours() -> None:
    assert turns(PLAIN, [user("a"), assistant(""), assistant(" b ")]) == (["<|end|>\n", "b<|end|>\n"], 0)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] if loop.last else '…' }}\n{% endfor %}",
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] if loop.index > 2 else 'no' }}\n{% endfor %}",
    ],
)
def test_turns_that_the_template_leaves_out_are_counted(template: str) -> None:
    assert turns(template, TWO) == (["In the park.\n"], 1)


def test_a_template_that_rejects_parts_of_a_chat_still_gives_its_turns() -> None:
    strict = "{% if messages | length != 4 %}{{ raise_exception('four') }}{% endif %}" + PLAIN
    assert turns(strict, TWO) == (["12 cats.", "In the park.<|end|>\n"], 0)
    with pytest.raises(ZOError, match="four"):
        turns(strict, FIRST)


# --- with a tokenizer ------------------------------------------------------------------------------------------------


def byte_tokenizer(template: str) -> Any:
    """Tokens are pairs of characters, so that they merge across every boundary; <|end|> is a token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in (10, *range(32, 127))]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *letters, *(a + b for a in letters for b in letters)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]{1,2}"), "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|end|>")
    made.chat_template = template
    return made


def learned(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, int]:
    task, row = LanguageModelling("messages", "messages", 1000), Row({"messages": messages}, "row 1")
    examples = task.examples([row], Source("tiny", None, tokenizer))
    labels = examples.items[0]["labels"] if len(examples) else []
    return "".join(tokenizer.convert_ids_to_tokens([each for each in labels if each != IGNORED])), examples.lost_turns


@pytest.mark.parametrize("messages", [TWO, FIRST])
def test_tokens_across_the_beginning_of_a_turn_belong_to_it(messages: list[dict[str, str]]) -> None:
    found, lost = learned(byte_tokenizer(PLAIN + ASK + "{% endif %}"), messages)
    want = "".join(f"{each['content']}<|end|>\n" for each in messages if each["role"] == "assistant")
    assert lost == 0 and re.sub(r"[|>\n<]", "", found) == re.sub(r"[|>\n<]", "", want)
    assert len(found) <= len(want) + 4  # at most one character more on each side of a turn


def test_the_templates_own_marks_are_followed() -> None:
    marked = (
        "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(marked)
    encoded = tokenizer.apply_chat_template(TWO, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    want = [token for token, own in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if own]
    assert learned(tokenizer, TWO) == ("".join(tokenizer.convert_ids_to_tokens(want)), 0)
    last = marked.replace("{% if m['role'] == 'assistant' %}", "{% if m['role'] == 'assistant' and loop.last %}")
    assert learned(byte_tokenizer(last), TWO)[1] == 1


def test_a_tokenizer_without_offsets_finds_the_same_turns() -> None:
    tokenizer = byte_tokenizer(PLAIN)

    class Slow:
        is_fast = False

        def __call__(self, text: str, **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return tokenizer(text, **options)

    chat = render_chat(TWO, renderer(PLAIN))
    ids, labels = label_turns(tokenizer, chat, IGNORED)
    found, slow = label_turns(Slow(), chat, IGNORED)
    assert found == ids and any(label != IGNORED for label in labels)
    # A token across the end of a turn is the next one's for it: at most one token a turn.
    assert sum(a != b for a, b in zip(labels, slow, strict=True)) <= len(chat.turns)
