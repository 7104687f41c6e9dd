"""The measuring tools: what they count and what they refuse. Times themselves are never tested."""

from __future__ import annotations

import json

import pytest
import torch
from zowrap.cli import main

from zowrap.bench import architectures, contenders, measure
from zowrap.errors import ZOError


@pytest.mark.parametrize(
    "options",
    [["--arch", "opt-125n"], ["--batch", "0"], ["--dtype", "int8"], ["--row", "gausian", "--arch", "opt-tiny"]],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(options, capsys, monkeypatch) -> None:
    monkeypatch.setattr(contenders, "PLAIN", ())  # nothing slow before the refusal
    assert main(["bench", "step", *options, "--json"]) == 2
    assert options[1] in json.loads(capsys.readouterr().out)["error"]


def test_a_row_longer_than_the_window_is_refused() -> None:
    with pytest.raises(ZOError, match="window of 64"):
        architectures.batch_for(architectures.build("opt-tiny"), 2, 65)


def test_classic_mezo_is_the_published_step() -> None:
    """θ + εz, θ − εz, back, then −η g z: after one step the weights moved by exactly that, to rounding."""
    torch.manual_seed(3)
    model = torch.nn.Linear(5, 4).double()
    start = {name: p.clone() for name, p in model.named_parameters()}
    x = torch.ones(3, 5).double()
    mezo = contenders.ClassicMeZO(model, lambda: model(x).square().sum(), lr=0.1, eps=1e-3)
    mezo.step()
    torch.manual_seed(0)
    z = {name: torch.normal(0.0, 1.0, p.shape, dtype=torch.float64) for name, p in model.named_parameters()}

    def loss(sign: float) -> torch.Tensor:
        return (
            (x @ (start["weight"] + sign * 1e-3 * z["weight"]).T + start["bias"] + sign * 1e-3 * z["bias"])
            .square()
            .sum()
        )

    g = (loss(1) - loss(-1)) / 2e-3
    for name, p in model.named_parameters():
        assert torch.allclose(p, start[name] - 0.1 * g * z[name], atol=1e-9)


def test_ratios_are_taken_round_by_round() -> None:
    times = {contenders.YARDSTICK: [1.0, 2.0, 4.0], "ours": [1.5, 3.0, 6.0]}
    assert measure.ratios(times, "ours") == [1.5, 1.5, 1.5]
    assert measure.spread([3.0, 1.0, 2.0])["median"] == 2.0


def test_a_sweep_counts_as_its_steps() -> None:
    slow = contenders.Contender("slow", lambda: None, per_call=4)
    fast = contenders.Contender("fast", lambda: None)
    times = measure.interleaved([slow, fast], 3)
    assert {name: len(t) for name, t in times.items()} == {"slow": 3, "fast": 3}
