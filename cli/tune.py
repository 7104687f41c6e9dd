"""``zowrap tune``: from a model and a data file to a run that loads with ``from_pretrained``.

    check the options ─► read the data ─► open the model ─► tokenise ─► load the weights ─► train ─► report

Whatever can be wrong is found before the first write; the loop itself is :class:`zowrap.ZOTrainer`'s.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from zowrap.cli.checks import check_at_once, check_options, check_out_is_free, to_config
from zowrap.cli.console import Interrupted, begin, quiet_libraries, result, say
from zowrap.cli.options import TuneOptions, load_plugins, takes
from zowrap.cli.restore import restore_options, saved_options
from zowrap.cli.scope import list_asked
from zowrap.cli.spelling import spelled_for
from zowrap.cli.summary import dev_facts, lines, unseen_facts
from zowrap.cli.tasks import resolve_task, saved_task, say_counts
from zowrap.errors import ZOError
from zowrap.storage.folder import RunFolder
from zowrap.storage.lock import check_one_process, lock_folder
from zowrap.storage.safetensors import START_VECTORS


@takes(TuneOptions)
def tune(context: typer.Context, options: TuneOptions) -> None:
    """Fine-tune MODEL on labelled or plain text, with forward passes alone."""
    began = time.time()
    check_one_process()
    given = options
    options, finished = restore_options(context, given)
    if finished is not None:
        say(f"{options.out} is finished: nothing is left to do")
        result(finished, options.json, lines(finished))
        return
    # A run that goes on has told which options differ from its own, and uses its own.
    goes_on = given.resume and given.out is not None and saved_task(given.out) is not None
    asked = frozenset() if goes_on else list_asked(context, given)
    check_at_once(options, asked)
    begin(options.model, options.data)
    quiet_libraries()

    load_plugins(options.plugin)
    check_options(options)
    assert options.out is not None
    with lock_folder(options.out):
        check_out_is_free(options)  # another process may have been at work there until now
        train(options, began, asked)


def train(options: TuneOptions, began: float, asked: frozenset[str] = frozenset()) -> None:
    """Prepare, train and report, as the one process that writes into ``--out``.

    Args:
        began: when the command began, in seconds since the epoch.
        asked: the options that the user gave.
    """
    from zowrap.cli.progress import Progress

    plan = prepare(options, asked)
    model, options = load(plan, options)
    trainer = build_trainer(plan, model, options)
    probes = "residual credit" if options.eps is None else f"eps {options.eps:g}"
    say(f"{len(plan.train)} examples, {trainer.zm.rule.describe()}, lr {options.lr}, {probes}")
    try:
        trainer.train(resume_from_checkpoint=options.resume)
    finally:
        trainer.pop_callback(Progress).stop()
    record = report(trainer, options, time.time() - began)
    if trainer.interrupted:
        steps = trainer.zm.step_count
        raise Interrupted(
            f"stopped after step {steps} of {options.steps}, everything is saved; go on with: "
            f"zowrap tune --resume --out {options.out}",
            record,
        )
    record |= report_test(trainer, plan, options)
    trainer.run.update_status(result=record)
    result(record, options.json, lines(record))


@dataclass
class Plan:
    """The data and the task, before any weight is loaded.

    Attributes:
        source: the model's configuration and tokenizer.
        task: every choice about the data made.
        train, evaluation, test: tokenised; None without ``--eval-data``, ``--test-data``.
    """

    source: Any
    task: Any
    train: Any
    evaluation: Any
    test: Any = None

    def identify_data(self) -> dict[str, Any]:
        """What tells the data from other data, by the option that names them."""
        sets = {"data": self.train, "eval_data": self.evaluation, "test_data": self.test}
        return {name: examples.identity() for name, examples in sets.items() if examples is not None}


def prepare(options: TuneOptions, asked: frozenset[str] = frozenset()) -> Plan:
    """Read and check the data, open the model, tokenise."""
    from zowrap.quant.schemes import check_config
    from zowrap.storage.safetensors import adapters_base
    from zowrap.tasks.loading import open_source
    from zowrap.tasks.rows import read_rows, sample

    assert options.data is not None and options.model is not None  # check_options asked for them
    rows = read_rows(options.data, default_split="train")
    eval_rows = None
    if options.eval_data is not None:
        eval_rows = sample(read_rows(options.eval_data, default_split="test"), options.max_eval_examples)
    test_rows = None if options.test_data is None else read_rows(options.test_data, default_split="test")
    source = open_source(options.model, options.trust_remote_code)
    base = adapters_base(source.name)
    if base is not None:
        raise ZOError(
            f"{options.model} holds adapters: go on with their run (--resume), start from what they stand on "
            f"({base}), or from the two made one: zowrap export {options.model} --to DIR --format merged"
        )
    if not options.use_peft and options.quantized != "adapters":
        with spelled_for(options):
            check_config(source.config)
    saved = RunFolder(str(options.out)).config() if options.resume and saved_task(str(options.out)) else {}
    task, why = _restore(saved, options) if saved else resolve_task("tune", options, asked, rows, source)
    task.check(rows)
    for others in (eval_rows, test_rows):
        if others is not None:
            task.check(others)
    say(why)
    train = _tokenise(task, rows, source, "training rows")
    evaluation = None if eval_rows is None else _tokenise(task, eval_rows, source, "evaluation rows")
    test = None if test_rows is None else _tokenise(task, test_rows, source, "test rows")
    plan = Plan(source, task, train, evaluation, test)
    _check_same_data(plan, saved.get("data") or {}, options)
    show(train, source, options.show_examples)
    return plan


def _restore(saved: dict[str, Any], options: TuneOptions) -> tuple[Any, str]:
    """The task of a run that goes on."""
    from zowrap.tasks.resolve import restore_task

    return restore_task(saved["task"]), f"{saved['task'].get('kind')} as {options.out} began"


def _check_same_data(plan: Plan, saved: dict[str, Any], options: TuneOptions) -> None:
    """Raise :class:`ZOError` where a run would go on with other data than it began with."""
    now = plan.identify_data()
    for name, before in saved.items():
        if name in now and now[name] != before:
            raise ZOError(
                f"the examples of {getattr(options, name)} differ from those that {options.out} began with "
                f"({now[name]['examples']} now, {before.get('examples')} then): bring the file back, or start anew "
                "with another --out"
            )


def _tokenise(task: Any, rows: Any, source: Any, what: str) -> Any:
    examples = task.examples(rows, source)
    say_counts(examples, task.max_length, what)
    if not len(examples):
        raise ZOError(f"none of the {len(rows)} {what} has anything to learn from")
    return examples


def show(examples: Any, source: Any, count: int) -> None:
    """Print the first ``count`` examples as tokens, what is learned apart from what is masked."""
    for number, item in enumerate(examples.items[:count], start=1):
        tokens = source.tokenizer.convert_ids_to_tokens(item["input_ids"])
        labels = item["labels"]
        if isinstance(labels, int):
            say(f"example {number}, class {labels}: {' '.join(tokens)}")
            continue
        say(f"example {number}:")
        start = 0
        for i in range(1, len(tokens) + 1):
            if i == len(tokens) or (labels[i] == -100) != (labels[start] == -100):
                say(f"  {'masked ' if labels[start] == -100 else 'learned'} | {' '.join(tokens[start:i])}")
                start = i


def load(plan: Plan, options: TuneOptions) -> tuple[Any, TuneOptions]:
    """Load the weights. Returns the model, and the options with the dtype resolved."""
    from zowrap.quant import modes
    from zowrap.quant.schemes import bitsandbytes_options
    from zowrap.tasks.loading import choose_dtype

    dtype, why = choose_dtype(options.dtype, plan.source)
    name = str(dtype).removeprefix("torch.")
    for asked, option in ((options.masters, "--masters"), (options.along == "evaluated", "--along evaluated")):
        if asked and name == "float32":
            raise ZOError(f"{option} is for 16-bit weights: add --dtype bfloat16, or leave it out")
    plan.source.quantization = bitsandbytes_options(dataclasses.asdict(options))
    start = Path(str(options.out)) / START_VECTORS
    if options.resume and start.is_file():
        plan.source.label_vectors = start
    model = plan.task.build(plan.source, dtype, options.seed)
    say(f"{plan.source.name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M weights in {name} ({why})")
    quantized, eps = options.quantized, options.eps
    with spelled_for(options):
        mode = modes.choose_from_options(model, dataclasses.asdict(options), options.seed)
    if mode is not None and getattr(plan.task, "form", None) == "vectors":
        raise ZOError(f"--head vectors is for plain weights, and those of {plan.source.name} are quantised")
    if mode is not None:
        quantized = mode.name
        where = " where --trainable selects them" if options.trainable else ""
        say(f"{quantized} move{where} ({mode.why})")
    if options.estimator != "residual":  # which perturbs nothing
        eps = eps if eps is not None else modes.EPS_PLAIN if quantized is None else modes.EPS[quantized]
    return model, replace(options, dtype=name, quantized=quantized, eps=eps)


def build_trainer(plan: Plan, model: Any, options: TuneOptions) -> Any:
    """The trainer with this command's callbacks in place of the Trainer's printing ones."""
    from transformers import PrinterCallback, ProgressCallback

    from zowrap.cli.progress import Progress
    from zowrap.training.trainer import ZOTrainer

    config = to_config(options)
    if not options.trainable and options.quantized is None and not options.use_peft:
        config.trainable = plan.task.default_trainable(model)
    with spelled_for(options):
        trainer = ZOTrainer(
            model=model,
            args=config,
            train_dataset=plan.train,
            eval_dataset=plan.evaluation,
            data_collator=_collator(plan, config.device.type),
            processing_class=plan.source.tokenizer,
            loss_fn=plan.task.loss_fn,
            batch_metrics=plan.task.metrics,
            base_model=options.model,
            config={
                "model": options.model,
                "options": saved_options(options),
                "task": plan.task.record(),
                "data": plan.identify_data(),
            },
        )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    rows = None if plan.evaluation is None or options.task != "classification" else len(plan.evaluation)
    trainer.add_callback(Progress(trainer, rows))
    if getattr(plan.task, "form", None) == "vectors":
        trainer.add_callback(keep_start_vectors(trainer))
    if plan.test is not None:
        trainer.add_callback(measure_test_first(trainer, plan))
    return trainer


def keep_start_vectors(trainer: Any) -> Any:
    """A callback that keeps the label vectors which the run begins with.

    They come from a forward pass, whose last bits another machine or number of threads may give otherwise: what goes on
    with the run or replays it takes them from there.
    """
    from transformers import TrainerCallback

    from zowrap.storage.save import write_separate_part

    class KeepsStart(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                write_separate_part(trainer.zm.model.vectors, trainer.run.path / START_VECTORS)

    return KeepsStart()


def measure_test_first(trainer: Any, plan: Plan) -> Any:
    """A callback that measures the untuned model on the test data, once the run's folder is there.

    What it came to stays in the folder: a resumed run, whose model has moved, reads it there.
    """
    from transformers import TrainerCallback

    class TestFirst(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                found = measure_test(trainer, plan)
                trainer.run.keep_before("test", {**found.means(), "rows": found.rows()})

    return TestFirst()


def measure_test(trainer: Any, plan: Plan) -> Any:
    """The model as it stands on the test data, as ``zowrap eval`` measures it."""
    from zowrap.cli.eval import run_over

    args = trainer.args
    task, size = plan.task, args.per_device_eval_batch_size
    found = run_over(trainer.zm.model, task, plan.test, plan.source, size, args.device, task.metrics)
    if not math.isfinite(found.means()["loss"]):
        if not trainer.zm.step_count:
            trainer.mark_start_failed()
        raise ZOError("the loss on the test data is not finite: check its rows, or try --dtype float32")
    return found


def report_test(trainer: Any, plan: Plan, options: TuneOptions) -> dict[str, Any]:
    """The figures on the test data for ``--json``: of the untuned model and of the model in ``out``."""
    from zowrap.loss.evaluation import measure_certainty
    from zowrap.training.checkpoint import load_weights

    before = trainer.run.before().get("test") or {}
    metric = _metric(options)
    if plan.test is None:
        return unseen_facts({}, {}, {}, metric)
    if trainer.best_step is not None and trainer.best_step != trainer.zm.step_count:
        load_weights(trainer.run.path, trainer.zm)
    found = measure_test(trainer, plan)
    after = {**found.means(), "examples": found.examples}
    return unseen_facts(before, after, measure_certainty(found.rows(), before.get("rows")), metric)


def _metric(options: TuneOptions) -> str:
    """The metric that chooses the best model: accuracy for classes, the loss for a language model."""
    return "accuracy" if options.task == "classification" else "loss"


def _collator(plan: Plan, device: str) -> Any:
    """Batches of few lengths for a GPU, where each kind of batch is recorded; as short as can be elsewhere."""
    from zowrap.model.cuda_graphs import MOST
    from zowrap.tasks.batches import even_lengths

    collator = plan.task.collator(plan.source)
    if device != "cuda":
        return collator
    return replace(collator, lengths=even_lengths(max(plan.train.lengths), MOST))


def report(trainer: Any, options: TuneOptions, seconds: float) -> dict[str, Any]:
    """The record for ``--json``; ``loss`` and ``accuracy`` are those of the model in ``out``, where there is data."""
    from zowrap.cli.picture import draw, read_metrics

    out = Path(str(options.out))
    steps, evaluations = read_metrics(out / "metrics.jsonl")
    try:
        draw(out / "loss.png", steps, evaluations)
    except (ZOError, OSError) as error:
        say(f"loss.png is left out: {error}")
    done = trainer.zm.step_count
    facts = trainer.zm.inspect()
    best = trainer.best_step
    final: dict[str, Any] = next((e for e in reversed(evaluations) if best is None or e["step"] == best), {})
    chosen_with = (trainer.lr_choice or {}).get("forwards", 0)
    recent = [s["loss"] for s in steps[-50:] if s.get("loss") is not None]
    return {
        "out": str(options.out),
        "rule": trainer.zm.rule.name,
        "lr": trainer.args.learning_rate,
        "steps": done,
        "steps_run": done - trainer.resumed_from,
        "resumed_from": trainer.resumed_from,
        "loss": final.get("eval_loss", sum(recent) / len(recent) if recent else None),
        "accuracy": final.get("eval_accuracy"),
        "best_step": best,
        **dev_facts(evaluations, best, _metric(options)),
        "skipped_steps": trainer.skipped_steps,
        "forwards": done * facts.forwards * options.grad_accum + chosen_with,
        "lr_forwards": chosen_with,
        "engine": facts.engine,
        "memory": facts.schedule,
        "full_rows": facts.full_rows and facts.full_rows[0],
        "seconds": round(seconds, 2),
    }
