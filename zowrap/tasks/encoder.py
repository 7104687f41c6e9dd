"""Read the folder of a sentence encoder as sentence-transformers does, without running anything that it names.

What is read here gives the vectors that ``SentenceTransformer(folder).encode(texts)`` gives; whatever would change them
and is not known here is refused by name. The files are :mod:`zowrap.storage.encoder_files`'.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zowrap.errors import ZOError, first_line
from zowrap.storage.encoder_files import (
    MODULE_SETTINGS,
    MODULE_WEIGHTS,
    MODULES,
    PROMPTS,
    TRANSFORMER,
    check_modules,
    lists_modules,
)
from zowrap.storage.safetensors import open_safetensors
from zowrap.tasks.encoder_modules import (
    POOLINGS,
    SENTENCE,
    TOKENS,
    Dense,
    EncoderModules,
    LayerNorm,
    Normalize,
    Pooling,
)

log = logging.getLogger("zowrap")

SENTENCE_TRANSFORMER = "SentenceTransformer"  # the kind of model that has one vector for each text

# The older spelling of the poolings, in the order in which sentence-transformers joins them.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

# Settings of the transformer that change no vector of encode(): they are of queries, documents and fast attention.
_HARMLESS = {"unpad_inputs", "query_length", "document_length", "query_expansion"}
# Arguments that the settings pass on, and that change no vector: those of precision are options of the command here.
_HARMLESS_ARGUMENTS = {
    *("trust_remote_code", "add_pooling_layer", "attn_implementation", "dtype", "torch_dtype"),
    *("model_max_length", "padding_side", "use_fast", "use_cache"),
}
_ARGUMENTS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")


class _Settings:
    """The settings in one JSON file, of which every one must be asked for.

    Args:
        file: its name in messages.
    """

    def __init__(self, values: Mapping[str, Any], file: str) -> None:
        self.values, self.file = dict(values), file

    def take(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self.values.pop(name, default)
        if value is not default and (
            not isinstance(value, kind) or (isinstance(value, bool) and bool not in _all(kind))
        ):
            raise ZOError(f"{self.file} is damaged: its {name} is {value!r}")
        return value

    def refuse_the_rest(self) -> None:
        for name, value in self.values.items():
            raise ZOError(
                f"{self.file} sets {name} to {json.dumps(value)[:80]}, which zowrap cannot follow: its vectors would "
                "be others than those of sentence-transformers"
            )


def _all(kind: type | tuple[type, ...]) -> tuple[type, ...]:
    return kind if isinstance(kind, tuple) else (kind,)


@dataclass
class Encoder:
    """A sentence encoder as its folder describes it.

    Attributes:
        name: folder or hub name.
        modules: what follows the transformer: (kind, settings, path within the folder).
        prompt: what is put in front of every text by default.
        prompts: the names of the other prompts that are not empty.
        include_prompt: whether the prompt's tokens are pooled.
        window: the largest number of tokens, if the folder says so itself.
        lowercase: whether texts are lower-cased.
        cut: the number of leading entries of a vector that count; None for all.
        similarity: the name of the measure that the encoder was trained for.
        documents: the JSON files of the folder: path → content.
        parts: the places where its files may be, a folder or hub name each.
    """

    name: str
    modules: list[tuple[str, dict[str, Any], str]]
    prompt: str = ""
    prompts: list[str] = field(default_factory=list)
    include_prompt: bool = True
    window: int | None = None
    lowercase: bool = False
    cut: int | None = None
    similarity: str = "cosine"
    documents: dict[str, Any] = field(default_factory=dict)
    parts: Sequence[str] = ()

    @property
    def modes(self) -> list[str]:
        """How tokens are pooled: names of :data:`POOLINGS`."""
        return next(settings["modes"] for kind, settings, _ in self.modules if kind == "Pooling")

    def describe(self) -> str:
        """The modules in a few words: ``cls pooling, Dense, Normalize``."""
        words = [
            f"{' and '.join(settings['modes'])} pooling" if kind == "Pooling" else kind
            for kind, settings, _ in self.modules
        ]
        told = ", ".join(words)
        if self.prompt:
            told += f", after the prompt {self.prompt!r}"
        elif self.prompts:
            told += f"; none of its prompts ({', '.join(self.prompts)}) is its default, so none is used"
        if self.similarity != "cosine":
            told += f"; trained for {self.similarity} similarity, compared by cosine here"
        return told

    def prepare(self, tokenizer: Any) -> None:
        """Let the tokenizer lower-case if the encoder does."""
        if not self.lowercase:
            return
        from tokenizers.normalizers import Lowercase
        from tokenizers.normalizers import Sequence as Normalizers

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ZOError(f"{self.name} lower-cases its texts (do_lower_case), which needs a fast tokenizer")
        own = backend.normalizer
        if "Lowercase" not in repr(own) and not getattr(own, "lowercase", False):
            backend.normalizer = Normalizers([Lowercase(), *([own] if own is not None else [])])

    def build(self, tokenizer: Any, empty: bool = False, max_length: int | None = None) -> EncoderModules:
        """Build the modules with their weights.

        Args:
            empty: on the ``meta`` device, without weights.
            max_length: the window that the saved encoder is to have, if another than its own.

        Raises:
            ZOError: weights are missing or do not fit their settings.
        """
        documents = copy.deepcopy(self.documents)
        if max_length is not None and documents:
            documents[TRANSFORMER[0]] = {**documents.get(TRANSFORMER[0], {}), "max_seq_length": max_length}
        made = [self._build_module(*each, tokenizer, empty) for each in self.modules]
        return EncoderModules([each for each in made if each is not None], self.cut, documents).eval()

    def _build_module(
        self, kind: str, settings: dict[str, Any], path: str, tokenizer: Any, empty: bool
    ) -> nn.Module | None:
        if kind == "Pooling":
            skipped = 0 if self.include_prompt or not self.prompt else _count_prompt_tokens(tokenizer, self.prompt)
            return Pooling(settings["modes"], skipped)
        if kind == "Normalize":
            return Normalize(settings["read"], settings["written"])
        if kind == "Dropout":
            return None
        with torch.device("meta" if empty else "cpu"):
            file = f"{path}/{MODULE_WEIGHTS}"
            module = LayerNorm(settings["width"], file) if kind == "LayerNorm" else Dense(file=file, **settings)
        if not empty:
            self._load(module, path)
        return module

    def _load(self, module: nn.Module, path: str) -> None:
        file = next(filter(None, (_find_or_none(part, f"{path}/{MODULE_WEIGHTS}") for part in self.parts)), None)
        if file is None:
            raise ZOError(
                f"{self.name} has no safetensors weights of its module {path}: zowrap export {self.name} --to DIR "
                "--allow-pickle converts pickled ones"
            )
        with open_safetensors(file) as tensors:
            stored = {key: tensors.get_tensor(key).float() for key in tensors.keys()}  # noqa: SIM118 (no dict)
        try:
            module.load_state_dict(stored)
        except RuntimeError as error:
            raise ZOError(f"{file} does not fit the settings of {path}: {error}".splitlines()[0]) from error


def _count_prompt_tokens(tokenizer: Any, prompt: str) -> int:
    """Count the tokens of a prompt, without a special token at its end."""
    ids = tokenizer(prompt, truncation=True, verbose=False)["input_ids"]
    return len(ids) - (1 if ids and ids[-1] in tokenizer.all_special_ids else 0)


def default_pooling(config: Any) -> str:
    """How sentence-transformers pools the tokens of a model that it did not save: by mean, by the last if causal."""
    names = getattr(config, "architectures", None) or [""]
    return "lasttoken" if names[0].endswith("ForCausalLM") and getattr(config, "is_causal", True) else "mean"


def default_encoder(name: str, config: Any, mode: str) -> Encoder:
    """The encoder that sentence-transformers makes of a model that it did not save, pooled by ``mode``."""
    if mode == "mean":  # which is what is made of the saved folder, too
        return Encoder(name, [("Pooling", {"modes": ["mean"]}, "1_Pooling")])
    width = getattr(config.get_text_config(), "hidden_size", None)
    flags = {flag: each == mode for flag, each in _FLAGS.items()}
    documents = {
        MODULES: [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ],
        f"1_Pooling/{MODULE_SETTINGS}": {"word_embedding_dimension": width, **flags},
    }
    return Encoder(name, [("Pooling", {"modes": [mode]}, "1_Pooling")], documents=documents)


# --- reading --------------------------------------------------------------------------------------------------------


class _Unknown(Exception):
    """Whether a file of the hub exists is not known: it is not in the cache, and the hub cannot be reached."""


def kind_of_encoder(*parts: str) -> str | None:
    """The kind of model that sentence-transformers saved, by its name there; None if it did not save this one.

    Args:
        parts: where to look, a folder or a hub name each: adapters, then their base.
    """
    for part in parts:
        try:
            modules = _read(part, MODULES)
        except _Unknown:
            continue
        if lists_modules(modules):
            settings = _read(part, PROMPTS) or {}
            return str(settings.get("model_type") or SENTENCE_TRANSFORMER) if isinstance(settings, dict) else None
    return None


def read_encoder(*parts: str) -> Encoder | None:
    """Read a sentence encoder; None if sentence-transformers saved none there. Arguments as in :func:`kind_of_encoder`.

    Raises:
        ZOError: it has a module or a setting that is not known here, or its files are damaged or missing.
    """
    for part in parts:
        try:
            modules = _read(part, MODULES)
        except _Unknown:
            log.warning(
                "whether %s says how its vectors are pooled is not known: its %s is not in the cache, and the hub "
                "cannot be reached",
                part,
                MODULES,
            )
            continue
        if lists_modules(modules):
            try:
                return _read_whole(part, check_modules(modules, f"{part}: {MODULES}"), parts)
            except _Unknown as error:
                raise ZOError(
                    f"{error} is not in the cache, and the hub cannot be reached: the vectors of {part} depend on it"
                ) from None
    return None


def _read_whole(name: str, entries: list[dict[str, Any]], parts: Sequence[str]) -> Encoder:
    encoder = Encoder(name, [], documents={MODULES: entries}, parts=parts)
    kinds = [_kind(name, entry["type"]) for entry in entries]
    if kinds[0] != "Transformer":
        raise ZOError(f"{name} begins with a {kinds[0]} ({MODULES}), and zowrap can tune transformers alone")
    if entries[0]["path"] not in ("", "."):
        raise ZOError(
            f"{name} keeps its transformer in the folder {entries[0]['path']}: load it with sentence-transformers and "
            "save it again, which puts it where zowrap looks"
        )
    _read_prompts(encoder)
    _read_transformer(encoder)
    for kind, entry in zip(kinds[1:], entries[1:], strict=True):
        if kind not in _READERS:
            known = ", ".join(_READERS)
            raise ZOError(f"{name} has a module {kind} ({MODULES}), and zowrap knows only {known}")
        path = entry["path"]
        values = _read(name, f"{path}/{MODULE_SETTINGS}")
        if values is None and kind != "Normalize":
            raise ZOError(f"{name} is incomplete: {path}/{MODULE_SETTINGS} is missing, which {MODULES} names")
        if values is not None:
            encoder.documents[f"{path}/{MODULE_SETTINGS}"] = values
        settings = _Settings(_object(values or {}, f"{name}: {path}/{MODULE_SETTINGS}"), f"{name}: {path}")
        encoder.modules.append((kind, _READERS[kind](encoder, settings), path))
        settings.refuse_the_rest()
    if not any(kind == "Pooling" for kind, _, _ in encoder.modules):
        raise ZOError(f"{name} has no Pooling ({MODULES}), so it has no vector for a text")
    return encoder


def _kind(name: str, kind: str) -> str:
    package, _, last = kind.rpartition(".")
    if package.split(".")[0] != "sentence_transformers":
        raise ZOError(f"{name} has a module {kind} of its own ({MODULES}), and zowrap runs no code that a folder names")
    return last


def _object(value: Any, file: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ZOError(f"{file} is damaged: it holds no JSON object")
    return value


def _read_prompts(encoder: Encoder) -> None:
    values = _read(encoder.name, PROMPTS)
    if values is None:
        return
    encoder.documents[PROMPTS] = _object(values, f"{encoder.name}: {PROMPTS}")
    kind = values.get("model_type") or SENTENCE_TRANSFORMER
    if kind != SENTENCE_TRANSFORMER:
        raise ZOError(f"{encoder.name} is a {kind} of sentence-transformers, and not an encoder with a vector per text")
    prompts = values.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise ZOError(f"{encoder.name}: {PROMPTS} is damaged: its prompts are no texts with names")
    default = values.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ZOError(f"{encoder.name}: {PROMPTS} names the prompt {default!r}, and has none of that name")
    encoder.prompt = prompts.get(default) or ""
    encoder.prompts = [name for name, text in prompts.items() if text and name != default]
    encoder.similarity = str(values.get("similarity_fn_name") or "cosine")
    cut = values.get("truncate_dim")
    if cut is not None and (not isinstance(cut, int) or cut < 1):
        raise ZOError(f"{encoder.name}: {PROMPTS} is damaged: its truncate_dim is {cut!r}")
    encoder.cut = cut


def _read_transformer(encoder: Encoder) -> None:
    values = next((found for file in TRANSFORMER if (found := _read(encoder.name, file))), None)
    if values is None:
        return
    file = f"{encoder.name}: {TRANSFORMER[0]}"
    encoder.documents[TRANSFORMER[0]] = _object(values, file)
    settings = _Settings(values, file)
    encoder.window = settings.take("max_seq_length", int, None)
    encoder.lowercase = bool(settings.take("do_lower_case", bool, False))
    for name in _ARGUMENTS:
        arguments = _Settings(_object(settings.values.pop(name, None) or {}, file), f"{file}: {name}")
        if encoder.window is None:
            encoder.window = arguments.values.get("model_max_length")
        for each in _HARMLESS_ARGUMENTS:
            arguments.values.pop(each, None)
        arguments.refuse_the_rest()
    for name in _HARMLESS:
        settings.values.pop(name, None)
    for name, usual in (("transformer_task", "feature-extraction"), ("module_output_name", TOKENS)):
        if settings.values.get(name) == usual:
            del settings.values[name]
    if not settings.values.get("processing_kwargs"):
        settings.values.pop("processing_kwargs", None)
    ways = settings.values.get("modality_config")
    if isinstance(ways, dict) and ways.get("text") == _AS_TEXT and "message" not in ways:
        del settings.values["modality_config"]
    settings.refuse_the_rest()


_AS_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}


def _read_pooling(encoder: Encoder, settings: _Settings) -> dict[str, Any]:
    for name in ("embedding_dimension", "word_embedding_dimension"):
        settings.take(name, int, None)
    flags = [mode for flag, mode in _FLAGS.items() if settings.take(flag, bool, False)]
    given = settings.take("pooling_mode", (str, list), None)
    modes = flags or ["mean"] if given is None else [given] if isinstance(given, str) else given
    for mode in modes:
        if mode not in POOLINGS:
            raise ZOError(f"{settings.file} pools by {mode!r}, and zowrap knows only {', '.join(POOLINGS)}")
    encoder.include_prompt = bool(settings.take("include_prompt", bool, True))
    return {"modes": list(modes)}


def _read_names(settings: _Settings) -> dict[str, Any]:
    read = settings.take("module_input_name", str, SENTENCE)
    written = settings.take("module_output_name", str, None) or read
    for name in (read, written):
        if name not in (TOKENS, SENTENCE):
            raise ZOError(f"{settings.file} reads or writes {name}, and zowrap knows only {TOKENS} and {SENTENCE}")
    return {"read": read, "written": written}


def _read_normalize(encoder: Encoder, settings: _Settings) -> dict[str, Any]:
    return _read_names(settings)


def _read_dense(encoder: Encoder, settings: _Settings) -> dict[str, Any]:
    found = {
        "inputs": settings.take("in_features", int, 0),
        "outputs": settings.take("out_features", int, 0),
        "bias": bool(settings.take("bias", bool, True)),
        "activation": _activation(settings),
        "residual": bool(settings.take("use_residual", bool, False)),
        **_read_names(settings),
    }
    if found["inputs"] < 1 or found["outputs"] < 1:
        raise ZOError(f"{settings.file} is damaged: its in_features and out_features are no sizes of a Dense layer")
    return found


def _activation(settings: _Settings) -> nn.Module:
    """The activation that a class of ``torch.nn`` names; nothing is imported for it."""
    name = settings.take("activation_function", str, "torch.nn.modules.activation.Tanh")
    package, _, last = name.rpartition(".")
    kind = getattr(nn, last, None) if package.split(".")[:2] == ["torch", "nn"] else None
    known = getattr(kind, "__module__", "") == "torch.nn.modules.activation" or kind is nn.Identity
    try:
        return kind() if known and kind is not None else _refuse_activation(settings, name)
    except TypeError:
        return _refuse_activation(settings, name)


def _refuse_activation(settings: _Settings, name: str) -> nn.Module:
    raise ZOError(f"{settings.file} has the activation {name}, and zowrap knows only those of torch.nn")


def _read_layer_norm(encoder: Encoder, settings: _Settings) -> dict[str, Any]:
    width = settings.take("dimension", int, 0)
    if width < 1:
        raise ZOError(f"{settings.file} is damaged: its dimension is no size of a LayerNorm")
    return {"width": width}


def _read_dropout(encoder: Encoder, settings: _Settings) -> dict[str, Any]:
    settings.take("dropout", (int, float), 0.0)
    return {}


_READERS = {
    "Pooling": _read_pooling,
    "Dense": _read_dense,
    "Normalize": _read_normalize,
    "LayerNorm": _read_layer_norm,
    "Dropout": _read_dropout,
}


# --- files of a folder or of the hub --------------------------------------------------------------------------------


def _read(name: str, path: str) -> Any:
    """The JSON value in a file; None if there is no such file.

    Raises:
        ZOError: it is not JSON.
        _Unknown: whether there is one is not known.
    """
    file = _find(name, path)
    if file is None:
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ZOError(f"{name}: {path} cannot be read as JSON: {first_line(error)}") from None


def _find_or_none(name: str, path: str) -> Path | None:
    """The file, or None if there is none that can be had."""
    try:
        return _find(name, path)
    except _Unknown:
        return None


def _find(name: str, path: str) -> Path | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / path if (folder / path).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, path))
    except LocalEntryNotFoundError as error:
        raise _Unknown(f"{name}: {path}") from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _Unknown(f"{name}: {path}") from error
