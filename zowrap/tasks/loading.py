"""Open and load models by directory or hub name, and explain every failure in one sentence."""

from __future__ import annotations

import copy
import functools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zowrap.errors import ZOError, first_line, nearest, need_package
from zowrap.machine import free_memory
from zowrap.numerics.dtypes import DTYPES
from zowrap.quant.lowering import is_quantized_layer, mark_fresh
from zowrap.quant.schemes import check_requested
from zowrap.step.parameters import canonical_name
from zowrap.storage.folder import RunFolder
from zowrap.storage.safetensors import (
    ADAPTER_CONFIG,
    adapter_file,
    adapters_base,
    check_adapter_settings,
    check_directory,
    read_shapes,
)
from zowrap.storage.tokenizers import find_tokenizer, load_tokenizer
from zowrap.tasks.encoder import Encoder, read_encoder
from zowrap.tasks.saved_adapters import attach_saved, stored_names

log = logging.getLogger("zowrap")


@dataclass
class Source:
    """A model that was found but not loaded: its configuration and its tokenizer.

    Attributes:
        name: directory or hub name, as the user gave it; of adapters on the hub the folder they were downloaded to.
        config: the transformers configuration.
        tokenizer: the tokenizer, always with a padding token; None if ``empty`` and there is none.
        trust_remote_code: run code from the model's repository.
        empty: :func:`load_model` builds the model on the ``meta`` device, without weights.
        label_vectors: file of the label vectors to start from, instead of those in the model's folder.
        quantization: arguments of ``BitsAndBytesConfig`` to load the weights with; None loads them unchanged.
        complete: no weight may be missing, as nothing will train it: the model is to be evaluated or written.
        checkpoint: what :func:`zowrap.tasks.heads.identify` found, so that it looks once.
    """

    name: str
    config: Any
    tokenizer: Any
    trust_remote_code: bool = False
    empty: bool = False
    quantization: dict[str, Any] | None = None
    label_vectors: Path | None = None
    complete: bool = False
    checkpoint: Any = None

    @property
    def architectures(self) -> list[str]:
        return list(getattr(self.config, "architectures", None) or [])

    @property
    def places(self) -> list[str]:
        """Where files of the model may be: a folder or hub name each, of adapters their own and their base's."""
        base = adapters_base(self.name)
        return [self.name, *([] if base is None else [base])]

    @functools.cached_property
    def encoder(self) -> Encoder | None:
        """What sentence-transformers saved of the model, if it saved it as a sentence encoder; see read_encoder."""
        return read_encoder(*self.places)

    @property
    def window(self) -> int | None:
        """The largest number of tokens the model reads; None if nothing says."""
        return self.limit_window(getattr(self.tokenizer, "model_max_length", None))

    def limit_window(self, declared: Any) -> int | None:
        """The largest number of tokens, at most as many as are ``declared`` elsewhere; None if nothing says."""
        said = [
            getattr(self.config, name, None)
            for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
        ]
        limits = [int(value) for value in said if isinstance(value, int) and value > 0]
        # The RoBERTa family numbers positions from the padding index + 1, so a table of 514 rows reads 512 tokens.
        if limits and getattr(self.config, "model_type", "") in _OFFSET_POSITIONS:
            limits = [value - (self.config.pad_token_id or 0) - 1 for value in limits]
        if isinstance(declared, int) and 0 < declared < 10**9:  # in transformers, a larger number means "not set"
            limits.append(declared)
        return min(limits, default=None)

    @functools.cached_property
    def vocabulary_size(self) -> int | None:
        """The number of tokens that the model has an embedding for; None if its configuration does not say.

        Adapters may bring a larger embedding with them than their base has.
        """
        try:
            text = self.config.get_text_config()
        except (AttributeError, ValueError):  # no such method, or several texts
            text = self.config
        size = getattr(text, "vocab_size", None)
        if not isinstance(size, int) or size < 1:
            return None
        return max(size, _read_adapted_vocabulary(self.name))

    @property
    def pad_id(self) -> int:
        """The token that fills short rows, which the mask hides: the tokenizer's own if the model can embed it."""
        tokenizer, size = self.tokenizer, self.vocabulary_size
        found = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0]
        return next(each for each in found if each is not None and (size is None or each < size))


_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "longformer", "mpnet", "xmod", "data2vec-text"}


def open_source(name: str, trust_remote_code: bool = False, empty: bool = False) -> Source:
    """Find a model: read its configuration and tokenizer, and check that its weights can be loaded.

    Args:
        empty: only its shapes are needed, so neither weights nor a tokenizer have to exist.

    Raises:
        ZOError: there is no such directory or hub model, no tokenizer, no weights or only pickled ones.
    """
    from transformers import AutoConfig

    def load_config() -> Any:
        base = adapters_base(name)
        if base is not None:
            need_package("peft", f"{name} holds adapters: they need")
        with _explain_load_errors(base or name):
            return AutoConfig.from_pretrained(base or name, trust_remote_code=trust_remote_code)

    check_directory(name, weights=not empty)
    try:
        config = load_config()
    except ZOError as error:
        # Only then: a model on the hub, the usual case, is not asked for once more.
        folder = _fetch_adapters(name, _unreachable(error)) if isinstance(error.__cause__, OSError) else None
        if folder is None:
            raise
        name = folder
        config = load_config()
    try:
        place = find_tokenizer(name)
        with _explain_load_errors(place, "the tokenizer of "):
            tokenizer = load_tokenizer(place, trust_remote_code)
    except ZOError:
        if not empty:
            raise
        return Source(name, config, None, trust_remote_code, empty)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return Source(name, config, tokenizer, trust_remote_code, empty)


def find_file(name: str, file: str, cached: bool = False) -> str | None:
    """Find a file of a model on the hub, and download it if it is not in the cache; None if there is none.

    Args:
        cached: look in the cache alone.
    """
    from transformers.utils import cached_file

    return cached_file(
        name,
        file,
        local_files_only=cached,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _unreachable(error: ZOError) -> bool:
    """Whether the hub gave no answer: each further question would wait for its retries, about 20 s."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return error.__cause__ is not None and isinstance(error.__cause__.__cause__, LocalEntryNotFoundError)


def _fetch_adapters(name: str, cached: bool) -> str | None:
    """The folder that adapters on the hub are downloaded to; None where there are none. ``cached``: see find_file."""
    if Path(name).expanduser().is_dir() or not find_file(name, ADAPTER_CONFIG, cached):
        return None
    folder = fetch(name)
    check_adapter_settings(folder)
    return str(folder)


def fetch(name: str, pickles: bool = False) -> Path:
    """Download the settings, tokenizer and weights of a model from the hub, and return their folder.

    Args:
        pickles: if there are no safetensors, download pickled weights; they are not read here.

    Raises:
        ZOError: the download fails, or the model has no weights of a suitable kind.
    """
    from huggingface_hub import snapshot_download

    from zowrap.storage.atomic import read_json
    from zowrap.storage.encoder_files import (
        MODULE_PICKLE,
        MODULE_SETTINGS,
        MODULE_WEIGHTS,
        MODULES,
        check_modules,
    )
    from zowrap.storage.safetensors import PICKLED_WEIGHTS, PICKLES, SETTINGS, pickled_weights, weight_files

    def download(*patterns: str, inside: bool = False) -> Path:
        with _explain_load_errors(name):
            ignored = None if inside else ["*/*"]
            return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=ignored))

    found = download("*.safetensors", *(f"*{ending}" for ending in SETTINGS))
    if (found / MODULES).is_file():  # a sentence encoder, whose modules have folders of their own
        paths = [each["path"] for each in check_modules(read_json(found / MODULES), f"{name}: {MODULES}")]
        files = [MODULE_SETTINGS, MODULE_WEIGHTS, *([MODULE_PICKLE] if pickles else [])]
        download(MODULES, *(f"{path}/{file}" for path in paths if path for file in files), inside=True)
    if not weight_files(found) and pickles:
        found = download(*(f"{stem}*{ending}" for stem in PICKLED_WEIGHTS for ending in PICKLES))
    if not weight_files(found) and not (pickles and pickled_weights(found)):
        raise ZOError(f"{name} {_NO_SAFETENSORS.format(name=name)}" if not pickles else f"{name} holds no weights")
    return found


_NO_SAFETENSORS = "has no safetensors weights: zowrap export {name} --to DIR --allow-pickle converts pickled ones"


@contextmanager
def _explain_load_errors(name: str, what: str = "") -> Iterator[None]:
    """Turn the errors of ``from_pretrained`` into one sentence that says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except ZOError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        text = str(error).strip()
        first = first_line(error)
        kinds = [type(each) for each in (error, error.__cause__) if each is not None]
        kind = " ".join(f"{each.__name__} {each}" for each in kinds)
        if "trust_remote_code" in text:
            problem = "needs code from its own repository: if you trust it, add --trust-remote-code"
        elif isinstance(error, ImportError):
            problem = f"needs a package that is not installed: {first}"
        elif "pytorch_model.bin" in text or ("safetensors" in text.lower() and not Path(name).is_dir()):
            problem = _NO_SAFETENSORS.format(name=name)
        elif Path(name).is_dir() or isinstance(error, SafetensorError):
            problem = f"cannot be loaded: {first}"
        elif "gated" in text.lower() or "Gated" in kind or "401" in text or "403" in text:
            problem = "is gated or private: accept its terms on its page and set HF_TOKEN"
        else:
            problem = (
                "is not a directory here, and could not be loaded from the hub "
                f"({first.rstrip('.')}): check the name and the connection, and set HF_TOKEN if it is private or gated"
            )
        raise ZOError(f"{what}{name} {problem}") from error


def choose_dtype(asked: str | None, source: Source) -> tuple[torch.dtype, str]:
    """Choose the dtype to load weights in, and explain the choice.

    By default it is float32 if the weights then fit into two thirds of the free memory (the rest is for activations and
    the rule's state), else the checkpoint's own. 16-bit weights are updated with stochastic rounding.

    Raises:
        ZOError: ``asked`` is not a dtype's name.
    """
    own = _own_dtype(source.config)
    if asked == "auto":
        return own, "the checkpoint's own"
    if asked is not None:
        if asked not in DTYPES:
            raise ZOError(f"unknown --dtype {asked!r}{nearest(asked, [*DTYPES, 'auto'])}")
        return DTYPES[asked], "as asked"
    needed, free = 4 * count_parameters(source), free_memory()
    if own is torch.float32 or needed <= free * 2 / 3:
        return torch.float32, "it fits in memory"
    return own, f"the checkpoint's own: float32 would need {needed / 2**30:.1f} of {free / 2**30:.1f} GiB free"


def _own_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype.removeprefix("torch."))
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def count_parameters(source: Source) -> int:
    """Count the weights of a model, from the safetensors headers of a directory or else from an empty model."""
    path = Path(adapters_base(source.name) or source.name).expanduser()
    if path.is_dir() and (files := sorted(path.glob("*.safetensors"))):
        try:
            return sum(map(_count_elements, files))
        except ZOError:
            if not source.empty:
                raise
    from transformers import AutoModel

    return sum(p.numel() for p in build_empty(source, AutoModel, torch.float32).parameters())


def _count_elements(file: Path) -> int:
    """Count the weights in a safetensors file, from its header."""
    return sum(map(math.prod, read_shapes(file).values()))


def build_empty(source: Source, auto_class: Any, dtype: torch.dtype, **changes: Any) -> nn.Module:
    """Build a model on the ``meta`` device, without weights."""
    config = copy.deepcopy(source.config)
    for name, value in changes.items():
        setattr(config, name, value)
    # The Auto classes have from_config; the class of one architecture has _from_config.
    build = getattr(auto_class, "from_config", None)
    options = {"trust_remote_code": source.trust_remote_code} if build is not None else {}
    with _explain_load_errors(source.name), torch.device("meta"):
        return (build or auto_class._from_config)(config, dtype=dtype, **options).eval()


def load_model(source: Source, auto_class: Any, dtype: torch.dtype, seed: int = 0, **changes: Any) -> nn.Module:
    """Load the weights through ``auto_class`` in ``dtype``, in evaluation mode.

    Weights that are missing from the checkpoint, such as those of a new classification head, start random (drawn with
    ``seed``). They are logged as a warning, recorded on the model (:func:`zowrap.quant.lowering.mark_fresh`), and not
    quantised, because they have to move: ``source.quantization`` is changed accordingly. Weights of the checkpoint that
    the model has no place for are logged too; of a run's own folder they are an error.

    Args:
        changes: attributes of the configuration to set first (``num_labels`` …).

    Raises:
        ZOError: the weights cannot be loaded, some are missing although ``source.complete``, an already quantised
            checkpoint lacks some, or it is quantised to another width than ``source.quantization``.
    """
    check_requested(source.name, source.config, source.quantization)
    if source.empty:
        from zowrap.quant.empty import quantize_empty

        changes.pop("ignore_mismatched_sizes", None)
        model = build_empty(source, auto_class, dtype, **changes)
        with _explain_load_errors(source.name):
            return quantize_empty(model, source.quantization)
    model, fresh, untaken = _from_pretrained(source, auto_class, dtype, seed, changes)
    unused = {name for name in fresh if getattr(auto_class, "__name__", "") == "AutoModel" and "pooler." in name}
    check_complete(source, [name for name in fresh if name not in unused], untaken)
    rounded = _quantized_layers(model, fresh)
    if rounded and source.quantization is not None:
        kept = {*model.hf_quantizer.modules_to_not_convert, *rounded}
        source.quantization = {**source.quantization, "llm_int8_skip_modules": sorted(kept)}
        del model
        model, fresh, untaken = _from_pretrained(source, auto_class, dtype, seed, changes)
        rounded = _quantized_layers(model, fresh)
    if rounded:
        raise ZOError(
            f"{source.name} is already quantised and lacks the weights of {rounded[0]}: load the unquantised model "
            "with --load-in-8bit or --load-in-4bit"
        )
    if fresh:
        log.warning("freshly initialised, because they are missing from %s: %s", source.name, _list(fresh))
    if untaken:
        log.warning("not taken from %s, as this model has no place for them: %s", source.name, _list([*untaken]))
    mark_fresh(model, fresh)
    if getattr(model.config, "pad_token_id", None) is None and source.tokenizer is not None:
        model.config.pad_token_id = source.pad_id
    if adapters_base(source.name) is not None:
        model = attach_saved(model, source.name)
    return model.eval()


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", … ({len(names)} in all)" if len(names) > 4 else "")


def check_complete(source: Source, fresh: list[str], untaken: Sequence[str] = ()) -> None:
    """Refuse a model with random weights that nothing will train, and a run's folder that holds another model's.

    Args:
        fresh: names of weights that are random.
        untaken: names of weights in the folder that the model has no place for.
    """
    if not source.complete:
        return
    if fresh:
        raise ZOError(
            f"{source.name} lacks weights that this model has, and random ones would take their place: {_list(fresh)}; "
            "give a model that was trained with them (zowrap tune trains a new head)"
        )
    own = adapters_base(source.name) is None  # beside adapters, the weights are those of their base
    if untaken and own and RunFolder(source.name).config_file.is_file():
        raise ZOError(f"{source.name} holds weights that its own model has no place for: {_list([*untaken])}")


def _from_pretrained(
    source: Source, auto_class: Any, dtype: torch.dtype, seed: int, changes: dict[str, Any]
) -> tuple[Any, list[str], list[str]]:
    """Load the model, and list the weights that its checkpoint lacks and those of it that were not taken."""
    check_adapter_settings(source.name)
    options = dict(changes)
    torch.manual_seed(seed)
    if source.quantization is not None:
        from transformers import BitsAndBytesConfig

        need_package("bitsandbytes")
        options["quantization_config"] = BitsAndBytesConfig(**source.quantization)
    with _explain_load_errors(source.name):
        model, report = auto_class.from_pretrained(
            adapters_base(source.name) or source.name,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=source.trust_remote_code,
            **options,
        )
    # mismatched_keys holds (name, old shape, new shape) or names, depending on the version.
    fresh = [*report["missing_keys"], *(k if isinstance(k, str) else k[0] for k in report.get("mismatched_keys", ()))]
    beside = stored_names(source.name)
    missing = sorted(name for name in fresh if canonical_name(name) not in beside)
    return model, missing, sorted(report.get("unexpected_keys", ()))


def _read_adapted_vocabulary(name: str) -> int:
    """The rows of the embedding that a folder of adapters holds beside them; 0 if it holds none."""
    file = adapter_file(name)
    if not file.is_file():
        return 0
    rows = [
        shape[0]
        for key, shape in read_shapes(file).items()
        if len(shape) == 2 and _EMBEDDING.search(key) and "position" not in key and "token_type" not in key
    ]
    return max(rows, default=0)


# The last parts of an embedding's name in the families of transformers, or in peft's copy of it.
_EMBEDDING = re.compile(r"(embed\w*|wte)\.(modules_to_save\.)?(base_layer\.)?weight$")


def _quantized_layers(model: nn.Module, names: list[str]) -> list[str]:
    """The quantised layers among those that hold the named weights."""
    layers = sorted({name.rpartition(".")[0] for name in names})
    return [layer for layer in layers if layer and is_quantized_layer(model.get_submodule(layer))]
