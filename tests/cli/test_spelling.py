"""Errors of the library reach the command line with its own spelling of the options that they name."""

from __future__ import annotations

import pytest

from zowrap.cli.checks import check_options
from zowrap.cli.options import TuneOptions
from zowrap.cli.spelling import spelled_for
from zowrap.errors import Option, ZOError


def test_an_error_says_the_same_in_python_and_on_the_command_line() -> None:
    error = ZOError("use ", Option("direction", "sphere"), " or ", Option("masters", True), ", not ", Option("eps"))
    assert str(error) == "use direction='sphere' or masters=True, not eps"
    with pytest.raises(ZOError) as told, spelled_for(TuneOptions()):
        raise error
    assert str(told.value) == "use --direction sphere or --masters, not --eps" and told.value.__cause__ is error


def test_an_option_that_only_python_has_stays_as_it_is() -> None:
    with pytest.raises(ZOError) as told, spelled_for(TuneOptions()):
        raise ZOError("give ", Option("loss_fn"), " or ", Option("sign", "elementwise", rule="zo_sgd"))
    assert str(told.value) == "give loss_fn or zo_sgd: sign='elementwise'"


def test_an_option_may_have_a_spelling_of_its_own_in_python() -> None:
    python = "quantization_config=BitsAndBytesConfig(load_in_8bit=True)"
    error = ZOError("load it with ", Option("load_in_8bit", True, python=python))
    assert str(error) == f"load it with {python}"
    with pytest.raises(ZOError, match=r"^load it with --load-in-8bit$"), spelled_for(TuneOptions()):
        raise error


# What the library refuses once torch is there: options that are fine alone and do not go together.
TOGETHER = [
    ({"rule": "hizoo", "direction": "unit_sphere"}, "hizoo measures curvature", "use --direction sphere"),
    ({"rule": "hizoo", "estimator": "forward"}, "hizoo measures curvature", "--estimator must be 'central'"),
    ({"rule": "conmezo", "direction": "unit_sphere"}, "conmezo", "--direction sphere"),
    ({"rule": "lozo", "direction": "sphere"}, "lozo", "--direction sphere"),
    ({"rule": "meazo", "rule_option": ["groups=true"]}, "needs blocks", "--blocks layer"),
    ({"rule": "meazo", "rule_option": ["beta=1"]}, "--rule-option beta must lie in [0, 1), got 1", ""),
    ({"rule": "conmezo", "rule_option": ["theta=4"]}, "--rule-option theta must lie in (0, π/2], got 4", ""),
    ({"rule": "zo_adam", "rule_option": ["beta1=true"]}, "--rule-option beta1 must lie in [0, 1), got True", ""),
    ({"estimator": "population", "direction": "gaussian"}, "--direction lowrank(1) in place of 'gaussian'", ""),
    ({"estimator": "population", "queries": 2}, "--queries must be 1, got 2", ""),
    ({"estimator": "forward_gradient", "engine": "compiled"}, "it runs with --engine eager alone", ""),
    ({"along": "evaluated", "direction": "lowrank(1)"}, "--along evaluated takes the differences", "lowrank(1)"),
    ({"block_order": "random"}, "--block-order random does nothing without --blocks", ""),
    ({"direction": "block(1)"}, "are chosen by --blocks layer or name patterns", ""),
    ({"direction": "lozo(2)"}, "lozo is a rule: --rule lozo", "--direction lowrank(r, nu=ν)"),
    ({"direction": "lowrank(0)"}, "direction 'lowrank': rank must be a whole number from 1, got 0", ""),
    ({"check_every": 4}, "--check-every 4 is for --estimator residual", "'central' estimates is not checked"),
    ({"estimator": "grzo", "queries": 2}, "--queries must be 1, got 2", ""),
    ({"direction": "sphere(2)"}, "unknown --direction 'sphere(2)'", ""),
]


@pytest.mark.parametrize(("given", "sentence", "advice"), TOGETHER, ids=lambda each: str(each))
def test_options_that_do_not_go_together_are_named_as_they_were_typed(
    given: dict[str, object], sentence: str, advice: str
) -> None:
    options = TuneOptions(model="MODEL", data="rows.jsonl", out="RUN", **given)  # type: ignore[arg-type]
    with pytest.raises(ZOError) as told:
        check_options(options)
    message = str(told.value)
    assert sentence in message and advice in message and "\n" not in message and "='" not in message, message


def test_groups_with_blocks_pass() -> None:
    check_options(TuneOptions(model="M", data="d", out="RUN", blocks=["layer"], rule_option=["groups=true"]))
