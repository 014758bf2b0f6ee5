"""Checks of the user's model, task and data before anything is measured. Errors are `InputError`s of one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from mpsearch.batches import Batch
from mpsearch.errors import InputError
from mpsearch.layer import check_finite, kind_of
from mpsearch.quality import Quality
from mpsearch.tasks.base import SPLITS, Task
from mpsearch.tree import map_tensors, tensors_in

# Of the largest output: between two runs on the same input only the order of a GPU's sums may differ.
SAME = 1e-4
QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torchao.", "bitsandbytes.", "mpsearch.packed")


def check_model(model: Any) -> nn.Module:
    """The model, if it is a float32 `nn.Module` with weights, called module by module; an `InputError` for any other."""
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        hint = " Give the module that was exported." if kind == "ExportedProgram" else ""
        raise InputError(f"The model is a {kind}; it must be (a function that returns) a torch.nn.Module.{hint}")
    for name, module in model.named_modules():
        where = f"Module '{name}'" if name else "The model"
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{where} is scripted or traced (torch.jit); its layers are not called one by one. Give the original."
            )
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise InputError(
                f"{where} is compiled (torch.compile); its layers are not called one by one. Give the original module, which "
                "torch.compile keeps as model._orig_mod, and compile what is exported."
            )
        if isinstance(module, fx.GraphModule) and any(isinstance(n.target, torch._ops.OpOverload) for n in module.graph.nodes):
            raise InputError(
                f"{where} is a graph of operators (torch.export), without layers. Give the module that was exported."
            )
        if f"{type(module).__module__}.".startswith(QUANTIZED):
            raise _quantized(where, type(module).__name__)
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            _check_tensor(f"{name}.{key}" if name else key, tensor, kind_of(module) is not None)
    return model


def _check_tensor(name: str, tensor: Tensor, in_layer: bool) -> None:
    if is_lazy(tensor):
        raise InputError(f"'{name}' has no shape yet (a lazy module). Run the model once before it is given.")
    if tensor.is_meta:
        raise InputError(f"'{name}' is on the meta device: it has a shape and no values. Load the model's weights into memory.")
    if tensor.is_quantized or hasattr(tensor, "__tensor_flatten__"):
        raise _quantized(f"'{name}'", type(tensor).__name__ if type(tensor) is not Tensor else str(tensor.dtype))
    half = isinstance(tensor, nn.Parameter) and tensor.dtype in (torch.float16, torch.bfloat16)
    if half or (in_layer and tensor.is_floating_point() and tensor.dtype != torch.float32):
        raise InputError(
            f"Parameter '{name}' is {tensor.dtype}; layers are quantized from float32, and compared with their float32 outputs. "
            "Call model.float() before it is given, and give inputs in float32."
        )
    if isinstance(tensor, nn.Parameter):  # a buffer may be a mask of infinities
        check_finite(name, tensor.detach())


def _quantized(where: str, kind: str) -> InputError:
    return InputError(f"{where} is quantized already ({kind}). Give the float32 model that it was made of.")


def check_repeatable(task: Task, model: nn.Module, inputs: Any) -> None:
    """Run twice what must give the same twice: the task's data, and the model on one batch; `InputError` where it differs."""
    for split in SPLITS:
        first, second = (task.digest(split) for _ in range(2))
        if first != second:
            raise InputError(
                f"The task's data are not the same twice: two calls of batches('{split}') give other samples or another order. "
                "Take the same samples in the same order each time: no shuffling (shuffle=False) and no random augmentation."
            )
    given = map_tensors(Tensor.clone, inputs)
    with torch.no_grad():
        one = task.forward(model, inputs)
        if not all(torch.equal(a, b) or bool((a != a).any()) for a, b in zip(tensors_in(inputs), tensors_in(given), strict=True)):
            raise InputError(
                "The model writes into its input (an in-place operation on it), so that every run on the same batch sees other "
                "data. Let the task's forward give it a copy: model(inputs.clone())."
            )
        two = task.forward(model, inputs)
    if not isinstance(one, Tensor) or not one.is_floating_point() or not torch.isfinite(one).all():
        return  # said where outputs are checked
    if one.shape != two.shape or not torch.allclose(one, two, rtol=0, atol=SAME * float(one.abs().max()), equal_nan=True):
        differ = f" by up to {(one - two).abs().max():.2g}" if one.shape == two.shape else ""
        raise InputError(
            f"The model is not deterministic: its outputs for the same input differ{differ} between two runs in eval mode "
            "(dropout with training=True, random noise, or a state that it keeps?). Make it give the same outputs each time."
        )


def check_output(logits: Any) -> None:
    """Raise `InputError` unless it is a tensor [n, columns]."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = f"the shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise InputError(
            f"The model's output must be [n, columns], as logits [samples, classes] are; got {got}. Override the task's forward "
            "to return that: one of several tensors, or one row per prediction where there are more dimensions (flatten(0, 1))."
        )
    if not torch.isfinite(logits).all():
        raise InputError(
            f"The float model gives NaN or infinite outputs on the first calibration batch, in "
            f"{int((~torch.isfinite(logits)).any(1).sum()):,} of {len(logits):,} rows. Check the model and its input."
        )


def check_qualities(qualities: Tensor, n: int, quality: Quality) -> None:
    """Raise `InputError` unless they are at most `n` numbers of the quality's kind."""
    right = ((qualities >= 0) & (qualities <= 1)) if quality.kind == "share" else qualities.isfinite()
    if qualities.ndim > 1 or not 1 <= qualities.numel() <= n or not right.all():
        rule = "from 0 to 1" if quality.kind == "share" else "that are finite"
        raise InputError(
            f"The task's quality must be [{n}] numbers {rule}, one per sample (fewer where a sample has several rows), or one "
            f"number for all samples; got the shape {tuple(qualities.shape)}, from {float(qualities.min()):g} to "
            f"{float(qualities.max()):g}."
        )


def check_classes(batches: Sequence[Batch], split: str, n_classes: int) -> None:
    """Raise `InputError` where integer targets are no numbers of `n_classes` classes."""
    for _, targets in batches:
        if not targets.numel() or targets.is_floating_point() or targets.dim() > 1:
            continue
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= n_classes:
            raise InputError(
                f"Labels of the {split} split run from {low} to {high}; the model has {n_classes} outputs: they must "
                f"lie in 0..{n_classes - 1}."
            )
