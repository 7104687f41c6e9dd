"""Measure the peak memory of a step on quantised weights, and of a plain forward of the same model and batch.

The models are MiniLM, and a Llama of 134M random weights, whose activations are small compared with its weights. Each
form is measured in its own process, whose allocator returns freed memory at once.

    held    bytes of parameters, buffers and the rule's state, once the model is wrapped
    step    peak memory of a step above that, from the process's resident set
    forward peak memory of a plain forward of the model, with the libraries' own layers
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import torch

import zowrap
from benchmarks.papers.finetune import minilm
from benchmarks.quantized.forms import FORMS
from zowrap.bench.architectures import build_model, make_batch
from zowrap.bench.contenders import Contender
from zowrap.bench.measure import measure_peak_bytes
from zowrap.quant import lowering
from zowrap.step.parameters import weight_bytes

# Rows and tokens of the batch. MiniLM's loss is the size of its last hidden state; any loss needs the same forward.
BATCHES = {"minilm": (16, 32), "llama-130m": (1, 32)}


def measure_form(name: str) -> list[dict[str, Any]]:
    """Measure a form of :data:`benchmarks.quantized.forms.FORMS` on both models, and return one line for each."""
    code = f"from benchmarks.quantized.memory import print_line; print_line({name!r}, %r)"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    lines = []
    for model in BATCHES:
        done = subprocess.run([sys.executable, "-c", code % model], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(done.stderr)
        lines.append(json.loads(done.stdout.splitlines()[-1]))
    return lines


def print_line(name: str, kind: str) -> None:
    """Measure a form on one model, and print its line as JSON."""
    form = FORMS[name]
    model, batch = _load(kind, form.quantization, form.dtype)
    device = next(model.parameters()).device
    weights = weight_bytes(model)

    @torch.no_grad()
    def forward() -> None:
        model(**batch)

    plain = measure_peak_bytes(Contender("forward", forward), device)
    zm = zowrap.zo_wrap(
        model,
        "meazo",
        eps=form.eps,
        lr=1e-4,
        quantized=form.quantized,
        loss_fn=_size if kind == "minilm" else None,
        engine="compiled",
        trainable=(lambda name, tensor: tensor.is_floating_point()) if form.quantization is None else None,
        **form.wrap,
    )
    held = weight_bytes(model) + zm.inspect().state_bytes
    step = measure_peak_bytes(Contender("step", lambda: zm.step(**batch), wrapped=zm), device)
    line = {"form": name, "model": kind, "batch": BATCHES[kind], "weights": weights, "held": held}
    print(json.dumps({**line, "step": step, "forward": plain, "lowered": len(lowering.lowered_layers(model))}))


def _load(
    kind: str, quantization: dict[str, Any] | None, dtype: torch.dtype
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

    more: dict[str, Any] = {"dtype": dtype}
    if quantization is not None:
        more["quantization_config"] = BitsAndBytesConfig(**quantization)
    if kind == "minilm":
        model = AutoModel.from_pretrained(minilm(), **more).eval()
        rows, length = BATCHES[kind]
        ids = torch.randint(2, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with tempfile.TemporaryDirectory() as folder:
        made: Any = build_model(kind, dtype)
        made.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, **more).eval()
    return model, make_batch(model, *BATCHES[kind])


def _size(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).last_hidden_state.float().square().mean()
