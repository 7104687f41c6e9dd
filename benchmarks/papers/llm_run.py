"""Run the papers' tables on large language models.

    python -m benchmarks.papers llm --model facebook/opt-1.3b --tasks sst2 rte --rules zo_sgd conmezo

For someone who has the models and a GPU: OPT-1.3B and OPT-13B on 1000 training, 500 dev and 1000 test examples, and
RoBERTa-large on k examples per class, with the prompts, batch sizes, steps and step sizes of the MeZO paper. The best
η on seed 0 is the one with the lowest dev loss at its best evaluation; the other seeds are run at it. Finished runs
are lines of ``OUT/llm.jsonl``; a run that was stopped goes on from its folder below ``OUT/runs``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.papers import docs
from benchmarks.papers.finetune import minilm, rule_of, variant
from benchmarks.papers.llm_models import Prepared, is_masked, prepare
from benchmarks.papers.llm_tasks import CAUSAL, MASKED, LlmTask, draw
from zowrap import rules
from zowrap.errors import ZOError, nearest
from zowrap.tasks.loading import Source, choose_dtype, open_source

NAME = "llm"
TITLE = "The papers' tables on OPT and RoBERTa-large, for someone who has the models"

# The MeZO paper's, appendix: (family, tuning) → step sizes of its grid, ε, batch, steps.
PAPER: dict[tuple[str, str], dict[str, Any]] = {
    ("causal", "full"): {"lrs": (1e-6, 1e-7), "eps": 1e-3, "batch": 16, "steps": 20_000},
    ("causal", "lora"): {"lrs": (1e-4, 5e-5), "eps": 1e-2, "batch": 16, "steps": 20_000},
    ("masked", "full"): {"lrs": (1e-7, 1e-6, 1e-5), "eps": 1e-3, "batch": 64, "steps": 100_000},
    ("masked", "lora"): {"lrs": (1e-5, 5e-5, 1e-4), "eps": 1e-3, "batch": 64, "steps": 100_000},
}
# Rules that divide by the size of ĝ have η on another scale, about how far each weight moves in a step; no paper
# states a grid for these models, so this one is ours.
SCALE_FREE_LRS = (1e-6, 1e-5, 1e-4)
SPLITS = (1000, 500, 1000)
QUICK_SPLITS = (16, 8, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="causal or masked language model: directory or hub name")
    parser.add_argument("--tasks", nargs="+", help=f"causal: {' '.join(CAUSAL)}; masked: {' '.join(MASKED)}")
    parser.add_argument("--rules", nargs="+", default=["zo_sgd"])
    parser.add_argument("--tuning", choices=("full", "lora"), default="full")
    parser.add_argument("--lrs", nargs="+", type=float, help="step sizes of the grid; default: the MeZO paper's")
    parser.add_argument("--eps", type=float, help="default: the MeZO paper's")
    parser.add_argument("--steps", type=int, help="default: 20000 (causal) or 100000 (masked)")
    parser.add_argument("--batch-size", type=int, help="default: 16 (causal) or 64 (masked)")
    parser.add_argument("--seeds", type=int, help="default: 1 (causal) or 5 (masked)")
    parser.add_argument("--per-class", type=int, default=512, help="k of masked models: 16 or 512 in the papers")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of prompt and candidate, at most")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 or auto; default: float32 where it fits")
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"), help="local data, before the hub")
    parser.add_argument("--engine", choices=("compiled", "eager"), help="default: compiled where possible")
    parser.add_argument(
        "--keep-runs", action="store_true", help="keep the folders of finished runs, with their weights"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Make the missing runs, and return the numbers of the tables."""
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            options = _quick(options, Path(folder))
        if options.model is None:
            raise ZOError("name a model with --model, for example facebook/opt-1.3b or FacebookAI/roberta-large")
        source = open_source(options.model)
        masked = is_masked(source)
        tasks = MASKED if masked else CAUSAL
        names = options.tasks or list(tasks)
        for name in names:
            if name not in tasks:
                raise ZOError(f"{options.model} has no task {name!r}{nearest(name, tasks)}")
        paper = PAPER["masked" if masked else "causal", options.tuning]
        settings = {
            "model": "a tiny random model" if options.quick else options.model,
            "family": "masked" if masked else "causal",
            "tuning": options.tuning,
            "steps": options.steps or paper["steps"],
            "batch_size": options.batch_size or paper["batch"],
            "eps": options.eps or paper["eps"],
            "per_class": (4 if options.quick else options.per_class) if masked else None,
            "splits": QUICK_SPLITS if options.quick else SPLITS,
            "max_length": options.max_length,
            "seeds": options.seeds or (5 if masked else 1),
            "quick": options.quick,
        }
        results = []
        for name in names:
            for rule in options.rules:
                lrs = options.lrs or (SCALE_FREE_LRS if _scale_free(rule) else paper["lrs"])
                results.append(_table_entry(source, tasks[name], name, rule, lrs, settings, options))
    return {"settings": settings, "results": results, "versions": docs.describe_versions()}


def _scale_free(rule: str) -> bool:
    return rules.REGISTRY[rule_of(rule, 1).name].scale_free


def _quick(options: argparse.Namespace, folder: Path) -> argparse.Namespace:
    """The options of a quick run with a tiny random OPT, two tasks and four steps, to show that the machinery works."""
    options.steps, options.batch_size, options.seeds = options.steps or 4, options.batch_size or 4, options.seeds or 1
    options.engine, options.max_length = options.engine or "eager", min(options.max_length, 128)
    options.lrs = options.lrs or [1e-4]
    if options.model is None:
        options.model, options.tasks = str(tiny_model(folder)), options.tasks or ["sst2", "copa"]
    if not options.data_dir.is_dir():
        raise ZOError(f"there is no data folder {options.data_dir}: name the one that holds sst2, copa … by --data-dir")
    return options


def tiny_model(folder: Path, masked: bool = False) -> Path:
    """Save a two-layer OPT (or BERT with a masked-LM head) with random weights and a real tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, OPTConfig, OPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    if masked:
        BertForMaskedLM(BertConfig(**size, intermediate_size=64)).save_pretrained(folder)
        return folder
    ends: dict[str, Any] = {
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    OPTForCausalLM(
        OPTConfig(**size, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=512, **ends)
    ).save_pretrained(folder)
    return folder


# --- one entry of a table -----------------------------------------------------------------------------------------


def _table_entry(
    source: Source, task: LlmTask, name: str, rule: str, lrs: Sequence[float], settings: dict[str, Any], options: Any
) -> dict[str, Any]:
    def line(lr: float, seed: int) -> dict[str, Any]:
        return _line(source, task, {**settings, "task": name, "rule": rule, "lr": lr, "seed": seed}, options)

    grid = [line(lr, 0) for lr in lrs]
    best = min(grid, key=lambda found: math.inf if found["dev_loss"] is None else found["dev_loss"])
    seeds = [best, *(line(best["lr"], seed) for seed in range(1, settings["seeds"]))]
    return {"task": name, "rule": rule, "metric": best["metric"], "grid": grid, "seeds": seeds}


def _line(source: Source, task: LlmTask, what: dict[str, Any], options: Any) -> dict[str, Any]:
    """The line of a run, from the file or made now."""
    file = None if options.quick else options.out / "llm.jsonl"
    key = json.dumps(what, sort_keys=True)
    for text in file.read_text(encoding="utf-8").splitlines() if file is not None and file.is_file() else ():
        found = json.loads(text)
        if json.dumps({name: found.get(name) for name in what}, sort_keys=True) == key:
            return found
    found = {**what, **_train(source, task, what, options)}
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(found, allow_nan=False) + "\n")
    print(
        f"{what['task']} {what['rule']} lr {what['lr']:g} seed {what['seed']}: {found['metric']} {found['score']:.1f}",
        file=sys.stderr,
    )
    return found


def _train(source: Source, task: LlmTask, what: dict[str, Any], options: Any) -> dict[str, Any]:
    splits = draw(task, what["task"], options.data_dir, what["splits"], what["per_class"])
    dtype, _ = choose_dtype(options.dtype, source)
    prepared = prepare(source, task, splits, dtype, what["seed"], what["max_length"], what["tuning"] == "lora")
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) if options.quick else options.out / "runs"
        name = "-".join(str(what[field]) for field in ("task", "rule", "lr", "seed", "tuning")).replace("/", "_")
        trainer = _trainer(prepared, source, what, runs / name, options.engine)
        trainer.train(resume_from_checkpoint=trainer.run.exists())
        if trainer.interrupted:
            raise ZOError(f"stopped after step {trainer.zm.step_count} of {name}; the same command goes on from there")
        found = {"dev_loss": trainer.best_metric, "best_step": trainer.best_step, "metric": prepared.metric}
        found["score"] = prepared.score()
        if not options.keep_runs:
            shutil.rmtree(runs / name)
    return {**found, "dtype": str(dtype).removeprefix("torch."), "versions": docs.describe_versions()}


def _trainer(prepared: Prepared, source: Source, what: dict[str, Any], folder: Path, engine: str | None) -> Any:
    from transformers import PrinterCallback

    from zowrap import ZOConfig, ZOTrainer

    config = ZOConfig(
        output_dir=str(folder),
        rule=variant(what["rule"]).rule,
        rule_options=dict(rule_of(what["rule"], what["steps"]).hyper),
        learning_rate=what["lr"],
        eps=what["eps"],
        max_steps=what["steps"],
        per_device_train_batch_size=what["batch_size"],
        per_device_eval_batch_size=what["batch_size"],
        eval_steps=0.2,  # the papers evaluate five times and keep the best
        save_steps=0.2,
        load_best_model_at_end=True,
        seed=what["seed"],
        engine=engine,
        **variant(what["rule"]).wrap,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = ZOTrainer(
        model=prepared.model,
        args=config,
        train_dataset=prepared.train,
        eval_dataset=prepared.dev,
        data_collator=prepared.collator,
        processing_class=source.tokenizer,
        loss_fn=prepared.loss_fn,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
