"""Models and data small enough to make on the spot: a word-level tokenizer, two-layer networks, a few sentences."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# One thread per test process, children included: the suite runs a process per core, and thread counts are recorded.
os.environ["OMP_NUM_THREADS"] = "1"
# No test asks the hub: without a connection each question would wait for half a minute.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

# Without a GPU, kernels written in Triton run in its interpreter, which is chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

WORDS = [
    *("good", "bad", "great", "awful", "movie", "film", "plot", "a", "the", "very", "it", "was", "is"),
    *("label", ":", "question", "answer", "user", "assistant", "1", "2"),
]
GOOD, BAD = ("good", "great"), ("bad", "awful")


@pytest.fixture(autouse=True)
def thread_count():
    """A resumed run takes the recorded number of threads; the next test starts from one again."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


class Outcome(NamedTuple):
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must hold exactly one JSON object and nothing else."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


@pytest.fixture
def zowrap_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``zowrap_cli("eval", path, "--json")`` runs the command line in this process."""
    from zowrap.cli import main

    def run(*args: Any) -> Outcome:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def make_tokenizer(kind: str) -> Any:
    """``"bert"``: [CLS] … [SEP], padded with [PAD]. ``"causal"``: <s> …, end-of-text is the padding too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if kind == "bert" else ["</s>", "<unk>", "<s>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    unknown = special[1]
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    start = special[2]
    single = f"{start} $A [SEP]" if kind == "bert" else f"{start} $A"
    tokens = [(t, vocabulary[t]) for t in special if t in single]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    if kind == "bert":
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token=unknown,
            pad_token="[PAD]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            mask_token="[MASK]",
            model_max_length=32,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_model(kind: str, directory: Path, **options: Any) -> Path:
    """Save a two-layer model: ``"sequence"``, ``"encoder"`` (BERT) or ``"causal"`` (Llama)."""
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tokenizer = make_tokenizer("causal" if kind == "causal" else "bert")
    if kind == "causal":
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=64, **small, bos_token_id=2, eos_token_id=0, **options
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **small, **options)
        model_class = transformers.BertForSequenceClassification if kind == "sequence" else transformers.BertModel
        model = model_class(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of the three kinds of model."""
    root = tmp_path_factory.mktemp("models")
    return {kind: make_model(kind, root / kind) for kind in ("sequence", "encoder", "causal")}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reviews(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Short reviews whose label follows from one word."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        word = draw.choice(GOOD if i % 2 else BAD)
        filler = draw.choices(("movie", "film", "plot", "the", "a", "very"), k=draw.randint(1, 6))
        rows.append({"text": " ".join([*filler, "was", word]), "label": "good" if i % 2 else "bad"})
    return rows


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``train`` and ``test`` reviews, and ``prompts`` (prompt and completion)."""
    root = tmp_path_factory.mktemp("data")
    prompts = [{"prompt": row["text"] + " label :", "completion": " " + row["label"]} for row in reviews(24)]
    return {
        "train": write_rows(root / "train.jsonl", reviews(24)),
        "test": write_rows(root / "test.jsonl", reviews(10, seed=1)),
        "prompts": write_rows(root / "prompts.jsonl", prompts),
    }
