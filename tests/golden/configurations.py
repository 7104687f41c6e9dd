"""The table of golden runs: one line each."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace

import torch

from tests.golden.models import mean_loss_of_words
from tests.golden.runs import Run, run_command, run_given_losses, run_steps, run_trainer
from zowrap import rules


@dataclass(frozen=True)
class Configuration:
    """One golden run.

    Attributes:
        run: makes it, in an empty folder.
        default: it belongs to the suite that always runs; the others are slow tests.
        portable: its bits are the same on every processor.
        loose: on another processor its numbers are nearly the same within wider tolerances: it rounds to few bits.
        needs: packages that it needs beside the required ones.
    """

    run: Run
    default: bool = False
    portable: bool = False
    loose: bool = False
    needs: tuple[str, ...] = ()


_BF16, _FP16 = torch.bfloat16, torch.float16
_BNB, _AO, _PEFT = ("bitsandbytes",), ("torchao",), ("peft",)
_LORA = ("--use-peft", "--lora-r", "2", "--lora-target-modules", "query,value")


def _halve(step: int) -> float:
    return 2.0 ** -(6 + step // 10)


# Every rule and its variants, by forward passes.
_RULES = {
    "zo_sgd": run_steps("words", rules.zo_sgd(), lr=1e-3),
    "zo_sgd momentum": run_steps("words", rules.zo_sgd(momentum=0.9), lr=1e-4),
    "zo_sgd sign": run_steps("words", rules.zo_sgd(sign="scalar"), lr=1e-3),
    "zo_sgd elementwise sign": run_steps("words", rules.zo_sgd(sign="elementwise"), lr=1e-3),
    "zo_sgd conservative": run_steps("words", rules.zo_sgd(conservative=True), lr=1e-3),
    "zo_rmsprop": run_steps("words", rules.zo_rmsprop(), lr=1e-3),
    "zo_adam": run_steps("words", rules.zo_adam(), lr=1e-3),
    "zo_adamm": run_steps("words", rules.zo_adamm(), lr=1e-3),
    "zo_adamm without amsgrad": run_steps("words", rules.zo_adamm(amsgrad=False), lr=1e-3),
    "radazo": run_steps("words", rules.radazo(bias_correction=True), lr=1e-3),
    "meazo": run_steps("words", rules.meazo(), lr=1e-3),
    "meazo printed": run_steps("words", rules.meazo(beta=0.9, moment="printed"), lr=1e-3),
    "conmezo": run_steps("words", rules.conmezo(warmup=200), lr=1e-3),
    "lozo": run_steps("words", rules.lozo(rank=2, nu=10), lr=1e-3),
    "lozo_m": run_steps("words", rules.lozo_m(rank=2, nu=10), lr=1e-3),
    "sparse_mezo": run_steps("words", rules.sparse_mezo(refresh=4), lr=1e-3),
    "fzoo": run_steps("words", rules.fzoo(), lr=3e-6),
    "hizoo": run_steps("words", rules.hizoo(a=1e-4), lr=1e-3),
}
# The same without a forward pass.
_GIVEN = {
    "zo_sgd": run_given_losses(rules.zo_sgd()),
    "zo_sgd momentum": run_given_losses(rules.zo_sgd(momentum=0.9)),
    "zo_sgd conservative": run_given_losses(rules.zo_sgd(conservative=True)),
    "zo_rmsprop": run_given_losses(rules.zo_rmsprop()),
    "zo_adam": run_given_losses(rules.zo_adam()),
    "zo_adamm": run_given_losses(rules.zo_adamm()),
    "radazo": run_given_losses(rules.radazo()),
    "meazo": run_given_losses(rules.meazo()),
    "conmezo": run_given_losses(rules.conmezo()),
    "lozo": run_given_losses(rules.lozo()),
    "lozo_m": run_given_losses(rules.lozo_m(nu=10)),
    "sparse_mezo": run_given_losses(rules.sparse_mezo()),
    "fzoo": run_given_losses(rules.fzoo(), lr=2.0**-16),
    "hizoo": run_given_losses(rules.hizoo()),
    "rademacher": run_given_losses(rules.zo_sgd(), direction="rademacher"),
    "sphere": run_given_losses(rules.zo_sgd(), direction="sphere", queries=2),
    "blocks": run_given_losses(rules.zo_sgd(), blocks="layer", block_order="random_permutation"),
    "population": run_given_losses(rules.meazo(), estimator="population"),
    "bfloat16": run_given_losses(rules.zo_sgd(), dtype=_BF16),
    "float16": run_given_losses(rules.zo_sgd(), dtype=_FP16),
    "masters": run_given_losses(rules.meazo(), dtype=_BF16, masters=True),
    "weight decay": run_given_losses(rules.meazo(), weight_decay=2.0**-5),
}
# Of these, the ones without matrix products, roots or powers.
_PORTABLE = (
    *("zo_sgd", "zo_sgd momentum", "zo_sgd conservative", "sparse_mezo"),
    *("rademacher", "sphere", "blocks", "bfloat16", "float16"),
)
_STEPS = {
    "direction/rademacher": run_steps("words", "zo_sgd", direction="rademacher", lr=1e-3),
    "direction/sphere": run_steps("words", "zo_sgd", direction="sphere", lr=1e-3),
    "direction/unit_sphere": run_steps("words", "zo_sgd", direction="unit_sphere", lr=1.0, eps=0.05),
    "direction/lowrank": run_steps("words", "zo_adam", direction="lowrank(2)", lr=1e-3),
    "direction/lowrank lazy": run_steps("words", "zo_sgd", direction="lowrank(2, nu=10)", lr=1e-3),
    "direction/sparse": run_steps("words", "meazo", direction="sparse(0.5, refresh=5)", lr=1e-3),
    "direction/cone": run_steps("words", "meazo", direction="cone(theta=1.3)", lr=1e-3),
    "estimator/forward": run_steps("words", "zo_sgd", estimator="forward", queries=3, lr=1e-3),
    "estimator/forward gradient": run_steps("words", "zo_sgd", estimator="forward_gradient", lr=1e-3),
    "estimator/several queries": run_steps("words", "meazo", queries=3, direction="sphere", lr=1e-3),
    "estimator/population": run_steps("words", "meazo", estimator="population", lr=1e-3, replay=True),
    "estimator/population of a llama": run_steps("llama", "zo_sgd", estimator="population", lr=1e-3),
    "estimator/population in parts": run_steps("llama", "meazo", estimator="population", micro_batches=2, lr=1e-3),
    "blocks/layer": run_steps("words", "meazo", blocks="layer", lr=1e-3),
    "blocks/descending": run_steps("gpt2", "zo_adam", blocks="layer", block_order="descending", lr=1e-3),
    "blocks/flip_flop": run_steps("words", "meazo", blocks="layer", block_order="flip_flop", lr=1e-3),
    "blocks/permutation": run_steps("llama", "meazo", blocks="layer", block_order="random_permutation", lr=1e-3),
    "blocks/random": run_steps("words", "zo_sgd", blocks=["layers.*", "embed*"], block_order="random", lr=1e-3),
    "dtype/bfloat16": run_steps("words", "meazo", dtype=_BF16, lr=1e-3, eps=1e-2),
    "dtype/float16": run_steps("words", "meazo", dtype=_FP16, lr=1e-3, eps=1e-2),
    "dtype/masters": run_steps("words", "zo_adam", dtype=_BF16, masters=True, lr=1e-3, eps=1e-2),
    "dtype/along evaluated": run_steps("words", "meazo", dtype=_BF16, along="evaluated", lr=1e-3, eps=1e-2),
    "dtype/bfloat16 blocks": run_steps("tied llama", "conmezo", dtype=_BF16, blocks="layer", lr=1e-3, eps=1e-2),
    "step/weight decay": run_steps("words", "zo_sgd", weight_decay=0.1, lr=1e-2),
    "step/micro-batches": run_steps("llama", "hizoo", micro_batches=3, lr=1e-3),
    "step/conservative micro-batches": run_steps("llama", rules.zo_sgd(conservative=True), micro_batches=2, lr=1e-3),
    "step/one loss per batch": run_steps("words", "meazo", loss_fn=mean_loss_of_words, lr=1e-3),
    "step/trainable": run_steps("llama", "zo_adam", trainable=["*q_proj*", "*norm*"], lr=1e-3, save=True),
    "step/schedule": run_steps("words", "zo_sgd", schedule=_halve, lr=1e-3),
    "step/resumed": run_steps("words", "lozo_m", resume_at=13, lr=1e-3),
    "step/replayed": run_steps("words", rules.sparse_mezo(refresh=4), replay=True, lr=1e-3),
    "model/llama": run_steps("llama", "zo_sgd", lr=1e-3, save=True),
    "model/tied llama": run_steps("tied llama", "meazo", lr=1e-3, save=True),
    "model/gpt2": run_steps("gpt2", "meazo", direction="lowrank(1)", lr=1e-3, save=True),
    "model/bert": run_steps("bert", "meazo", lr=1e-3, save=True),
    "model/t5": run_steps("t5", "meazo", lr=1e-3, save=True),
    "model/mixtral": run_steps("mixtral", "meazo", lr=1e-3),
}
_QUANTIZED = {
    "int8 scales": run_steps("wide opt", "meazo", scheme="int8", quantized="scales", lr=1e-2),
    "int8 codes": run_steps("wide opt", "meazo", scheme="int8", quantized="codes", lr=1e-3),
    "int8 codes, queries": run_steps("wide opt", "zo_sgd", scheme="int8", quantized="codes", queries=3, lr=1e-3),
    "int8 adapters": run_steps("wide opt", "meazo", scheme="int8", quantized="adapters", lr=1e-2),
    "4-bit adapters": run_steps("wide opt", "meazo", scheme="nf4", quantized="adapters", lr=1e-2),
}
_COMPILED = {
    "zo_sgd": run_steps("words", "zo_sgd", "compiled", lr=1e-3),
    "llama": run_steps("tied llama", "meazo", "compiled", queries=2, lr=1e-3, replay=True),
    "sequential": run_steps("words", "zo_adam", "compiled", memory="sequential", weight_decay=0.1, lr=1e-3),
    "blocks": run_steps("words", "conmezo", "compiled", blocks="layer", lr=1e-3),
    "population": run_steps("words", "meazo", "compiled", estimator="population", lr=1e-3),
    "bfloat16 along evaluated": run_steps(
        "words", "meazo", "compiled", dtype=_BF16, along="evaluated", lr=1e-3, eps=1e-2
    ),
    "lowrank in parts": run_steps("bert", "lozo_m", "compiled", micro_batches=2, lr=1e-3),
}
CONFIGURATIONS: dict[str, Configuration] = {
    **{f"rule/{name}": Configuration(run) for name, run in _RULES.items()},
    **{f"given/{name}": Configuration(run, portable=name in _PORTABLE) for name, run in _GIVEN.items()},
    **{name: Configuration(run) for name, run in _STEPS.items()},
    **{f"quantized/{name}": Configuration(run, needs=_BNB) for name, run in _QUANTIZED.items()},
    "quantized/torchao scales": Configuration(
        run_steps("wide opt", "meazo", scheme="torchao", quantized="scales", lr=1e-2), needs=_AO
    ),
    "model/lora": Configuration(run_steps("adapters", "zo_adam", lr=1e-2, save=True), needs=_PEFT),
    **{f"compiled/{name}": Configuration(run) for name, run in _COMPILED.items()},
    "compiled/given zo_adam": Configuration(run_given_losses(rules.zo_adam(), "compiled")),
    "compiled/int8 codes": Configuration(
        run_steps("wide opt", "meazo", "compiled", scheme="int8", quantized="codes", lr=1e-3), needs=_BNB
    ),
    "compiled/trainer": Configuration(
        run_trainer("words", "meazo", "compiled", break_at=13, learning_rate=1e-3, memory="paired")
    ),
    "trainer/llama": Configuration(run_trainer("llama", "meazo", learning_rate=1e-3)),
    "trainer/accumulation and schedule": Configuration(
        run_trainer(
            "llama",
            "zo_adam",
            learning_rate=1e-3,
            gradient_accumulation_steps=3,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            weight_decay=0.01,
        )
    ),
    "trainer/broken off": Configuration(
        run_trainer(
            "llama", "conmezo", break_at=13, learning_rate=1e-3, lr_scheduler_type="linear", rule_options={"beta": 0.9}
        )
    ),
    "trainer/bfloat16 broken off": Configuration(
        run_trainer("bert", "zo_adam", dtype=_BF16, masters=True, eps=1e-2, break_at=17, learning_rate=1e-3)
    ),
    "trainer/population": Configuration(
        run_trainer("words", "meazo", estimator="population", learning_rate=1e-3, gradient_accumulation_steps=2)
    ),
    "trainer/blocks": Configuration(
        run_trainer("t5", "meazo", blocks="layer", block_order="random_permutation", break_at=7, learning_rate=1e-3)
    ),
    "trainer/int8 scales": Configuration(
        run_trainer("wide opt", "meazo", scheme="int8", quantized="scales", learning_rate=1e-2, break_at=13), needs=_BNB
    ),
    "command/classification": Configuration(
        run_command("sequence", "--lr", "1e-3", then=("--format same", "replay", "--dtype bfloat16"))
    ),
    "command/sentence encoder": Configuration(
        run_command("encoder", "--lr", "1e-3", "--rule", "zo_adam", then=("replay",))
    ),
    "command/label words": Configuration(
        run_command("causal", "--lr", "1e-3", "--rule", "lozo", "--rule-option", "nu=10", then=("replay",))
    ),
    "command/lm": Configuration(
        run_command(
            "causal",
            "--lr",
            "1e-3",
            "--dtype",
            "bfloat16",
            "--masters",
            "--grad-accum",
            "2",
            "--lr-schedule",
            "cosine",
            task="lm",
            then=("replay", "--format same", "--format fp32"),
        )
    ),
    "command/int8 scales": Configuration(
        run_command("sequence", "--lr", "1e-2", "--load-in-8bit", then=("replay", "--format same", "--format bf16")),
        needs=_BNB,
    ),
    "command/int8 codes": Configuration(
        run_command("sequence", "--lr", "1e-3", "--load-in-8bit", "--quantized", "codes", then=("--format fp32",)),
        needs=_BNB,
    ),
    "command/adapters": Configuration(
        run_command(
            "sequence",
            "--lr",
            "1e-2",
            "--load-in-8bit",
            *_LORA,
            then=("replay", "--format adapters", "--format merged", "--format bf16"),
        ),
        needs=(*_BNB, *_PEFT),
    ),
    "command/4-bit adapters": Configuration(
        run_command("causal", "--lr", "1e-2", "--load-in-4bit", task="lm", then=("--format bf16",)), needs=_BNB
    ),
}
# Runs whose numbers are rounded to 16, 8 or 4 bits somewhere.
_LOOSE = ("dtype/*", "quantized/*", "*int8*", "*4-bit*", "*bfloat16*", "*adapters", "command/lm")
# What the default suite runs: some of each kind that take no more than a few seconds.
_DEFAULT = (
    *("rule/conmezo", "rule/zo_adam", "rule/fzoo", "rule/lozo_m", "rule/hizoo", "given/zo_sgd momentum"),
    *("given/bfloat16", "given/sphere", "given/zo_adamm", "direction/sparse", "estimator/population", "dtype/masters"),
    *("blocks/permutation", "step/replayed", "model/t5", "quantized/int8 codes", "trainer/broken off"),
    *("command/classification", "compiled/zo_sgd"),
)
for _name, _configuration in CONFIGURATIONS.items():
    _loose = any(fnmatch.fnmatchcase(_name, pattern) for pattern in _LOOSE)
    CONFIGURATIONS[_name] = replace(_configuration, default=_name in _DEFAULT, loose=_loose)
