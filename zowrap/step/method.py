"""The method of a run: rule, direction and estimator, chosen together and checked without a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from zowrap import rules
from zowrap.errors import Option, ZOError
from zowrap.rules import estimators
from zowrap.rules.base import Choice, Rule, with_masters
from zowrap.rules.estimators import Estimator
from zowrap.step import directions
from zowrap.step.directions import Direction
from zowrap.step.options import DEFAULTS, StepOptions

SEVERAL = 2  # what a rule is told of the number of blocks while there is no model to count them in


@dataclass(frozen=True)
class Method:
    """The rule, direction and estimator by which the steps of a run probe the loss and update the weights.

    Attributes:
        asked_rule: the rule as it was asked for: with the same options it makes the same method again.
        rule: shaped by the direction where that needs state, and with masters where they are asked for.
        lr: η, or None where it is still to be chosen (``"auto"``).
        second_point: coefficient of the point that, with 1, spans the evaluated direction; None where updates go along
            the direction drawn. See :func:`zowrap.step.arithmetic.evaluated_direction`.
    """

    asked_rule: Rule
    rule: Rule
    direction: Direction
    estimator: Estimator
    queries: int
    lr: float | None
    second_point: float | None

    @property
    def project(self) -> Callable[[Tensor, Tensor], Tensor]:
        """``project(losses, eps)``: projected gradients, by the rule's own formula where it has points of its own."""
        return self.rule.project or self.estimator.project

    def check_blocks(self, count: int) -> None:
        """Raise :class:`ZOError` where the rule cannot be run so with ``count`` blocks."""
        self.rule.check(Choice(self.direction.name, self.estimator.name, self.queries, count))


def _build_rule(options: StepOptions) -> Rule:
    """The rule by itself, at the learning rate asked for; one that is built already keeps its own."""
    if isinstance(options.rule, Rule) or not isinstance(options.lr, int | float):
        return rules.get(options.rule)
    return rules.get(options.rule, lr=options.lr)


def choose_method(options: StepOptions) -> Method:
    """Fill in what the rule leaves open, and check that rule, direction, estimator and queries go together.

    Raises:
        ZOError: a name is unknown, or two choices exclude one another.
    """
    rule = asked = _build_rule(options)
    lr = rule.lr if options.lr is None else options.lr
    estimator = estimators.get_estimator(options.estimator or rule.defaults.estimator)
    queries = options.queries or rule.defaults.queries
    if estimator.credit:
        _check_credit(rule, queries, options)
        direction = directions.CREDIT
    else:
        usual = "lowrank(1)" if estimator.per_example else rule.defaults.direction
        direction = directions.get(usual if options.direction is None else options.direction)
    if direction.shape is not None:
        rule = direction.shape(rule)
    if options.masters:
        rule = with_masters(rule)
    second = _second_point(options.along, rule, estimator, direction, queries)
    method = Method(asked, rule, direction, estimator, queries, None if isinstance(lr, str) else float(lr), second)
    method.check_blocks(1 if options.blocks is None else SEVERAL)
    _check_together(method, options)
    return method


def _check_together(method: Method, options: StepOptions) -> None:
    rule, direction, estimator = method.rule, method.direction, method.estimator
    if options.check_every is not None and not estimator.credit:
        raise ZOError(
            Option("check_every", options.check_every),
            " is for ",
            Option("estimator", "residual"),
            f": what {estimator.name!r} estimates is not checked",
        )
    if options.check_every and not rule.follows_estimate:
        raise ZOError(
            Option("check_every", options.check_every),
            f" is for rules whose steps go along the credit itself, as those of zo_sgd and meazo: {rule.describe()} "
            "turns them",
        )
    if options.blocks is None and options.block_order != DEFAULTS["block_order"]:
        raise ZOError(Option("block_order", options.block_order), " does nothing without ", Option("blocks"))
    if direction.lowrank is not None and not estimator.credit and rule.shapes_directions:
        raise ZOError(f"{rule.name} works on each element of a direction: {direction.name} would lose its low rank")
    if rule.points is not None and (estimator.per_example or estimator.exact):
        raise ZOError(f"{rule.name} evaluates points of its own: estimator {estimator.name!r} does not apply")
    if estimator.per_example and direction.lowrank is None:
        raise ZOError(
            "a population gives every example a direction of its own, which only low-rank ones can be: ",
            Option("direction", "lowrank(1)"),
            f" in place of {direction.name!r}",
        )
    if estimator.per_example and method.queries > 1:
        raise ZOError(
            "a population has one direction per example: ", Option("queries"), f" must be 1, got {method.queries}"
        )
    if estimator.exact and options.engine == "compiled":
        raise ZOError(
            f"estimator {estimator.name!r} is a reference: it runs with ", Option("engine", "eager"), " alone"
        )


def _check_credit(rule: Rule, queries: int, options: StepOptions) -> None:
    """Refuse what residual credit has no use for: it draws no directions, and takes all blocks in one pass."""
    asked = Option("estimator", "residual")
    if rule.needs_directions:
        raise ZOError(f"{rule.name} needs the directions of its steps, and ", asked, " draws none: ", _FOLLOW)
    drawn = Option("direction", options.direction) if options.direction is not None else None
    several = Option("queries", queries) if queries > 1 else None
    blocks = Option("blocks") if options.blocks is not None else None
    along = Option("along", options.along) if options.along != "drawn" else None
    eps = Option("eps", options.eps) if options.eps is not None else None
    for given in (drawn, several, blocks, along, eps):
        if given is not None:
            raise ZOError(given, " does nothing with ", asked, ", which draws no directions: leave it out")


_FOLLOW = "zo_sgd, meazo, zo_adam, zo_adamm, zo_rmsprop and radazo take an estimate from elsewhere"


def _second_point(along: str, rule: Rule, estimator: Estimator, direction: Direction, queries: int) -> float | None:
    if along == "drawn":
        return None
    if direction.lowrank is not None or estimator.exact:
        has_none = direction.name if direction.lowrank is not None else f"estimator {estimator.name!r}"
        raise ZOError(
            Option("along", along),
            f" takes the differences of perturbed weights: {has_none} has no such differences",
        )
    return min(point.coefficient for point in (rule.points or estimator.points)(queries))
