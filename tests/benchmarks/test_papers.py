"""The experiments run, their verdicts have teeth, and the page is what the committed results say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.papers import docs, list_experiments, load_experiment
from benchmarks.papers.__main__ import main
from benchmarks.papers.common import Claim, half_decades, mean, spread

TOYS = ["E1", "E2", "E3", "E4", "E5"]
# Small enough for the default suite: the same code paths as --quick, fewer steps.
SMALL = {
    "E1": ["--steps", "200", "--seeds", "0"],
    "E2": ["--steps", "10", "--size", "50", "--seeds", "0", "1"],
    "E3": ["--steps", "10", "12", "--seeds", "0", "1"],
    "E4": ["--steps", "20"],
    "E5": ["--steps", "5"],
}
COMMITTED = docs.read_committed()


def run(name: str, out: Path, *options: str) -> dict[str, Any]:
    assert main([name, "--quick", "--out", str(out), *options]) == 0
    stem = name.lower()
    assert (out / f"{stem}.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")
    result = json.loads((out / f"{stem}.json").read_text(encoding="utf-8"))
    assert load_experiment(name).report(result) == (out / f"{stem}.md").read_text(encoding="utf-8")
    return result


@pytest.mark.parametrize("name", TOYS)
def test_an_experiment_writes_result_figure_and_section(name: str, tmp_path: Path) -> None:
    result = run(name, tmp_path, *SMALL[name])
    assert result["quick"] and result["name"] == name and {"settings", "expected", "versions"} <= set(result)
    assert len(load_experiment(name).claims(result)) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_the_quick_mode_runs_as_it_is(name: str, tmp_path: Path) -> None:
    assert run(name, tmp_path)["seconds"] < 120


def test_the_same_seed_gives_the_same_result(tmp_path: Path) -> None:
    first, second = (run("E2", tmp_path / part, *SMALL["E2"]) for part in "ab")
    assert first["results"] == second["results"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["E1", "--quick", "--seeds", "1", "1"], "--seeds"),
        (["E1", "--quick", "--steps", "5"], "--steps must be a positive multiple of 100"),
        (["E5", "--quick", "--queries", "0"], "--queries"),
        (["E4", "--quick", "--steps", "0"], "--steps"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "none").exists()


# --- the committed results ----------------------------------------------------------------------------------------


def test_the_page_is_what_the_committed_results_say() -> None:
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page(COMMITTED)


@pytest.mark.parametrize("name", TOYS)
def test_a_result_is_committed_at_full_settings_with_its_figure(name: str) -> None:
    assert not COMMITTED[name]["quick"]
    figure = docs.FIGURES / f"{list_experiments()[name]}.svg"
    assert figure.stat().st_size < 150_000


def held(name: str, result: dict[str, Any], start: str) -> list[bool]:
    claims: list[Claim] = [claim for claim in load_experiment(name).claims(result) if claim.what.startswith(start)]
    assert claims, start
    return [claim.holds for claim in claims]


def doctored(name: str) -> dict[str, Any]:
    return copy.deepcopy(COMMITTED[name])


def test_e1_lies_in_its_band() -> None:
    result = doctored("E1")
    assert all(held("E1", result, "ratio"))
    for outside in (1.79, 3.21):
        result["ratio"] = outside
        assert not any(held("E1", result, "ratio"))


def test_e2_holds_on_every_function() -> None:
    result = doctored("E2")
    for function in ("quadratic", "cubic", "levy", "rosenbrock"):
        start = f"{function}: R-AdaZO / ZO-AdaMM, common"
        assert all(held("E2", result, start))
        found = result["results"][function]
        at = result["factors"].index(1.0)
        # Were ZO-AdaMM's decrease half of R-AdaZO's, the advantage would be 2.
        found["zo_adamm"]["final"][at] = [(1 + value) / 2 for value in found["radazo"]["final"][at]]
        assert not any(held("E2", result, start))


def test_e3a_holds_at_every_step_size() -> None:
    result = doctored("E3")
    assert all(held("E3", result, "a: MEAZO /")) and all(held("E3", result, "a: MEAZO finite"))
    for at in (0, -1):
        changed = doctored("E3")
        changed["a"]["meazo"]["final"][at] = [1.12 * value for value in changed["a"]["zo_adam"]["final"][at]]
        assert not any(held("E3", changed, "a: MEAZO /"))
    result["a"]["meazo"]["final"][-1][0] = None
    assert not any(held("E3", result, "a: MEAZO finite"))


def test_e3b_lies_below_its_bound() -> None:
    result = doctored("E3")
    assert all(held("E3", result, "b: scalar per block"))
    result["b"]["one scalar per block"]["final"] = [
        [2 * value for value in row] for row in result["b"]["one scalar per block"]["final"]
    ]
    assert not any(held("E3", result, "b: scalar per block"))


def test_e4_holds_for_every_order() -> None:
    result = doctored("E4")
    for order in ("ascending", "descending", "flip_flop", "random_permutation", "random"):
        assert all(held("E4", result, f"{order}: progress"))
        for power in (0.8, 1.25):
            changed = doctored("E4")
            changed["orders"][order] = [[value**power for value in row] for row in changed["mezo"]]
            assert not any(held("E4", changed, f"{order}: progress"))


def test_e5_succeeds_and_radazo_is_no_slower() -> None:
    result = doctored("E5")
    for k, found in result["iterations"].items():
        assert all(held("E5", result, f"K {k}: successes")) and all(held("E5", result, f"K {k}: median"))
        found["radazo"], found["zo_adamm"] = found["zo_adamm"], found["radazo"]
        assert not any(held("E5", result, f"K {k}: median"))
        found["meazo"] = [[[None] * 3 + row[3:] for row in rows] for rows in found["meazo"]]
        assert not any(held("E5", result, f"K {k}: successes"))


# --- the small helpers --------------------------------------------------------------------------------------------


def test_a_run_without_a_number_counts_as_infinite() -> None:
    assert mean([1.0, None]) == float("inf") and spread([1.0, None]) == "diverged"
    assert spread([1.0, 3.0]) == "2 ± 1.4"


def test_grids_are_even_on_a_logarithmic_axis() -> None:
    assert half_decades(1e-3, 1e-1) == [0.001, 0.00316, 0.01, 0.0316, 0.1]
    assert len(half_decades(1e-7, 1e-4, 4)) == 13
