"""Tiny models, batches and data. Weights are multiples of powers of two, so every processor starts from the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

VOCABULARY = 48
_SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
# Blocks of a 4-bit weight are 64 columns; some processors take 32 rows at once.
_FOR_QUANTISATION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# Rows and lengths of the batches of a run, in turn.
SHAPES = ((4, 9), (3, 7), (4, 9), (2, 11), (1, 5))


def fill_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter values that follow from the seed, by integers and one exact product."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = torch.randint(-1024, 1025, parameter.shape, generator=draw).float()
            if parameter.ndim > 1:
                parameter.copy_(whole * 2.0 ** -round(9 + math.log2(parameter[0].numel()) / 2))
            else:
                parameter.copy_(whole * 2.0**-14 + (1.0 if "norm" in name.lower() and "weight" in name else 0.0))
    return model


class Words(nn.Module):
    """Two numbered layers and a norm between an embedding and the head that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.norm = nn.LayerNorm(16)
        self.stack = nn.Parameter(torch.zeros(2, 3, 16))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x.flip(1)))
        return (self.norm(x) * (1 + self.stack.sum((0, 1)))) @ self.embed.weight.t()


def loss_of_words(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """One loss per example: that of the words themselves."""
    ids = batch["input_ids"]
    return nn.functional.cross_entropy(model(ids).transpose(1, 2), ids, reduction="none").mean(-1)


def mean_loss_of_words(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same as one number for the whole batch."""
    return loss_of_words(model, batch).mean()


def _with_adapters() -> nn.Module:
    import peft

    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(MAKERS["llama"](), settings)


def _opt_config(**sizes: int) -> Any:
    return T.OPTConfig(
        vocab_size=VOCABULARY,
        ffn_dim=2 * sizes["hidden_size"],
        max_position_embeddings=32,
        word_embed_proj_dim=sizes["hidden_size"],
        **sizes,
    )


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "words": Words,
    "llama": lambda: T.LlamaForCausalLM(
        T.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, num_key_value_heads=1, **_SMALL)
    ),
    "tied llama": lambda: T.LlamaForCausalLM(
        T.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, tie_word_embeddings=True, **_SMALL)
    ),
    "gpt2": lambda: T.GPT2LMHeadModel(
        T.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
        )
    ),
    "bert": lambda: T.BertForSequenceClassification(
        T.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, num_labels=3, **_SMALL)
    ),
    "t5": lambda: T.T5ForConditionalGeneration(
        T.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    ),
    "mixtral": lambda: T.MixtralForCausalLM(
        T.MixtralConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            num_key_value_heads=1,
            num_local_experts=3,
            num_experts_per_tok=2,
            **_SMALL,
        )
    ),
    "wide opt": lambda: T.OPTForCausalLM(_opt_config(**_FOR_QUANTISATION)),
    "adapters": _with_adapters,
}


def make_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of that name, with the same weights at every call."""
    return fill_weights(MAKERS[name]()).to(dtype)


def make_quantized_model(scheme: str, folder: Path) -> nn.Module:
    """A small OPT as ``from_pretrained`` loads it in a scheme; its plain weights lie in ``folder``."""
    make_model("wide opt").save_pretrained(folder)
    settings: Any
    if scheme == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        settings = T.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        settings = T.BitsAndBytesConfig(
            **{
                "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
                "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            }[scheme]
        )
    return T.OPTForCausalLM.from_pretrained(folder, quantization_config=settings)


def make_batch(name: str, step: int) -> dict[str, Tensor]:
    """The batch of a step: random words, the second row half padded."""
    draw = torch.Generator().manual_seed(step)
    rows, length = SHAPES[step % len(SHAPES)]
    ids = torch.randint(4, VOCABULARY, (rows, length), generator=draw)
    if name == "words":
        return {"input_ids": ids}
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1:2, length // 2 + 1 :] = 0
    labels[1:2, length // 2 + 1 :] = -100
    if name == "bert":
        labels = torch.randint(0, 3, (rows,), generator=draw)
    if name == "t5":
        labels = torch.randint(4, VOCABULARY, (rows, 5), generator=draw)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Thirty rows of equal length for a trainer."""

    def __init__(self, name: str, first: int = 0) -> None:
        self.name, self.first = name, first

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        found = make_batch(self.name, 5 * (self.first + index) + 1)  # of three rows of seven words
        return {name: value[index % 3] for name, value in found.items()}


# --- for the command line -------------------------------------------------------------------------------------------

_GOOD, _BAD = ("good", "great"), ("bad", "awful")
_FILLERS = ("movie", "film", "plot", "a", "the", "very", "it", "is")
_WORDS = (*_GOOD, *_BAD, *_FILLERS, "was", "label", ":")


def save_model(kind: str, folder: Path) -> Path:
    """Save a model with a word-level tokenizer: ``"sequence"`` and ``"encoder"`` (BERT) or ``"causal"`` (Llama)."""
    tokenizer = _make_tokenizer(kind)
    # For 4-bit weights, see above.
    sizes = {**_FOR_QUANTISATION, "intermediate_size": 64, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    model: Any
    if kind == "causal":
        model = T.LlamaForCausalLM(T.LlamaConfig(bos_token_id=2, eos_token_id=0, **sizes))
    else:
        model = (T.BertForSequenceClassification if kind == "sequence" else T.BertModel)(T.BertConfig(**sizes))
    fill_weights(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _make_tokenizer(kind: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["</s>", "<unk>", "<s>"] if kind == "causal" else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    numbers = {word: i for i, word in enumerate([*special, *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=special[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    form = f"{special[2]} $A" if kind == "causal" else f"{special[2]} $A {special[3]}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[(token, numbers[token]) for token in special if token in form]
    )
    names = (
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
        if kind == "causal"
        else {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    )
    return T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names)


def write_reviews(file: Path, count: int, first: int = 0, prompts: bool = False) -> Path:
    """Short reviews whose label follows from their last word, as JSON lines; with ``prompts`` for ``--task lm``."""
    lines = []
    for i in range(first, first + count):
        fillers = [_FILLERS[(7 * i + 3 * k) % len(_FILLERS)] for k in range(1 + i % 5)]
        text = " ".join([*fillers, "was", (_GOOD if i % 2 else _BAD)[i // 2 % 2]])
        label = "good" if i % 2 else "bad"
        row = {"prompt": f"{text} label :", "completion": f" {label}"} if prompts else {"text": text, "label": label}
        lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    return file
