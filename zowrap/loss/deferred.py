"""Keep a loss that cannot be captured out of the program: one operator that calls it stands in its place.

    outputs = model(pixel_values)                              captured and compiled
    loss = zowrap.deferred_loss(key, [logits, boxes, …])       model.loss_function(…), as it is, in Python

A loss that matches boxes, or selects the labels that are no padding, depends on values. Transformers' models call it
``loss_function`` and do all else before it, so the forward passes can be compiled, which are what takes time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zowrap.custom_op import Cost, Traits, operator
from zowrap.errors import ZOCaptureError
from zowrap.loss.heads import Batch, names_of_kind, without_adapters
from zowrap.loss.nested import nest_batch, top_name

_functions: list[Callable[[list[Tensor]], Tensor]] = []  # what the operator's keys stand for, in this process


@operator("deferred_loss", traits=Traits(), cost=Cost())
def deferred_loss(key: int, tensors: list[Tensor]) -> Tensor:
    """Call a loss function of Python on what it reads: float32, 0-d."""
    return _functions[key](tensors)


@deferred_loss.register_fake
def _(key, tensors):
    return tensors[0].new_empty((), dtype=torch.float32)


# Their losses select or match by values; of others it is tried to capture them first.
_BY_VALUES = ("ForCTC", "ForRNNT", "ForTDT", "Detection", "ForSegmentation", "InstanceSegmentation")


def depends_on_values(model: nn.Module) -> bool:
    """Whether a model's own loss is known not to be captured."""
    return any(name.endswith(_BY_VALUES) for name in names_of_kind(without_adapters(model)))


class Withheld:
    """Stands for labels that a forward may only hand on to its loss function."""

    def to(self, *args: Any, **kwargs: Any) -> Withheld:
        return self

    def max(self) -> _NotKnown:
        return _NotKnown()


class _NotKnown:
    """A number that is within every bound; the true one is checked where the loss is computed."""

    def __lt__(self, other: Any) -> bool:
        return False

    __le__ = __gt__ = __ge__ = __lt__


class DeferredLoss:
    """The model's calls of its loss function, each to be replaced by an operator.

    Args:
        call: the model's forward.
        batch: a flat one, on which the forward is run once to see what its loss functions return.

    Raises:
        ZOCaptureError: the forward calls no ``loss_function``.
    """

    def __init__(self, model: nn.Module, call: Callable[[Batch], Any], batch: Batch) -> None:
        self.model, self._call = model, call
        self._forms: list[Any] = []  # by call: what it returns, with a mark in the place of the loss
        self._next = 0
        with _in_place_of_losses(model, self._observe):
            call(nest_batch(batch))
        if not self._forms:
            raise ZOCaptureError("the model computes its loss in a way that depends on values")

    def __call__(self, batch: Batch) -> Any:
        """Run the forward on a flat batch while it is captured, with operators for its losses."""
        labels = {name: value for name, value in batch.items() if top_name(name) == "labels"}
        rest = {name: value for name, value in batch.items() if name not in labels}
        self._next = 0

        def defer(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self._defer(own, labels, args, kwargs)

        with _in_place_of_losses(self.model, defer):
            return self._call({**nest_batch(rest), "labels": Withheld()})

    def _observe(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        self._forms.append(_form_of(result))
        return result

    def _defer(self, own: Callable[..., Any], labels: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves):
            raise ZOCaptureError("the model's loss function reads sizes as numbers")
        given = [leaves[i] for i in places]
        plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        names = [name for name, value in labels.items() if isinstance(value, Tensor)]
        constants = {name: value for name, value in labels.items() if name not in names}
        vocabulary = getattr(without_adapters(self.model).config, "vocab_size", None)

        def compute(tensors: list[Tensor]) -> Tensor:
            true = nest_batch({**dict(zip(names, tensors[len(places) :], strict=True)), **constants})["labels"]
            if isinstance(true, Tensor) and isinstance(vocabulary, int) and bool((true >= vocabulary).any()):
                raise ValueError(f"a label is {int(true.max())}, but the vocabulary has {vocabulary} entries")
            filled = list(plain)
            for i, tensor in zip(places, tensors, strict=False):
                filled[i] = tensor
            filled = [true if isinstance(leaf, Withheld) else leaf for leaf in filled]
            again, named = pytree.tree_unflatten(filled, spec)
            return _loss_in(own(*again, **named)).to(torch.float32, copy=True)

        form = self._forms[min(self._next, len(self._forms) - 1)]
        self._next += 1
        _functions.append(compute)
        loss = deferred_loss(len(_functions) - 1, [*given, *[labels[name] for name in names]])
        return loss if form is None else tuple(loss if part else None for part in form)


def _loss_in(result: Any) -> Tensor:
    """The loss in what a loss function returned: the first number of a tuple."""
    parts = result if isinstance(result, tuple | list) else (result,)
    return next(part for part in parts if _is_loss(part))


def _form_of(result: Any) -> list[bool] | None:
    """Which part of what a loss function returned is the loss; None if it is all."""
    several = isinstance(result, tuple | list)
    parts = result if several else (result,)
    first = next((i for i, part in enumerate(parts) if _is_loss(part)), None)
    if first is None:
        raise ZOCaptureError("the model's loss function returns no number")
    return [i == first for i in range(len(parts))] if several else None


def _is_loss(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() == 1 and value.ndim < 2


@contextmanager
def _in_place_of_losses(model: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Make every ``loss_function`` of transformers inside ``model`` call ``function(original, …)``."""
    changed: list[tuple[Any, bool, Any]] = []
    try:
        for module in model.modules():
            if not isinstance(getattr(type(module), "loss_function", None), property):
                continue
            anything: Any = module
            had = "_loss_function" in vars(module)
            if "_loss_function" in module._modules or not (had or getattr(module, "loss_type", None)):
                continue  # a module with weights of its own is captured; a model without a head has no loss
            own = anything.loss_function
            changed.append((module, had, own))
            anything._loss_function = _binding(function, own)
        yield
    finally:
        for module, had, own in changed:
            if had:
                module._loss_function = own
            else:
                del module._loss_function


def _binding(function: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(own, *args, **kwargs)
