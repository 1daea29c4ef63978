"""The checks that judge the data: labels, batches, inputs, validation, order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loopwright.checks.failure import failed_by, failed_step
from loopwright.checks.recorder import BINARY, BY_CLASS, IN_RANGE, OUT_OF_RANGE, numbered
from loopwright.checks.sampling import all_tensors, in_order, is_shuffled, shared_samples, sizes_of, structure
from loopwright.checks.seen import OFFSET, ROWS, ROWS_FOR_SPREAD, Seen, calls_of, listed, why_unseen
from loopwright.preflight import Check

# Of a layer's inputs, where standardised ones have a root mean square of 1.
RMS_LARGE, RMS_SMALL = 50.0, 1e-3


def labels(seen: Seen) -> Check:
    """Labels, and what an embedding looks up, are in their range."""
    name = "labels and indices"
    passes = [run for run in (seen.first, seen.validated) if run is not None]
    bad = [words for run in passes for words in run.record.unusable]
    bad += _labels_of_all(seen)
    if bad:
        return Check(
            name,
            "failed",
            bad[0],
            OUT_OF_RANGE,
            f"{IN_RANGE}; targets of a binary loss are from 0 to 1",
        )
    found = [words for run in passes for words in run.record.indexed]
    if found:
        return Check(name, "passed", found[0])
    return Check(name, "not applicable", why_unseen(seen) or "nothing is looked up or classified by index")


def _labels_of_all(seen: Seen) -> list[str]:
    """Labels out of range anywhere in data whose tensors are at hand."""
    calls = [c for c in calls_of(seen) if c.name in BY_CLASS.values() and not c.target.is_floating_point()]
    if len({c.input.shape[1] for c in calls if c.input.ndim > 1}) != 1 or seen.subject.loss is None:
        return []
    classes, ignore, found = calls[0].input.shape[1], calls[0].ignore_index, []
    for words, data in (("training", seen.train_data), ("validation", seen.val_data)):
        tensors = all_tensors(data)
        if tensors is None or len(tensors) != 2 or tensors[1].is_floating_point():
            continue
        targets = tensors[1]
        wrong = targets[(targets != ignore) & ((targets < 0) | (targets >= classes))]
        if wrong.numel():
            what = f"{wrong.numel()} labels of the {words} data are out of range, such as {int(wrong[0])}"
            found.append(f"{what}; the model has {numbered(classes, 'classes')}")
    return found


def batch_norm(seen: Seen) -> Check:
    """No batch of one sample meets a batch norm that would have one value to a channel."""
    name, first = "batch norm and batch sizes", seen.first
    norms = {} if first is None else first.record.norms
    if not norms:
        return Check(name, "not applicable", why_unseen(seen) or "no batch norm is in training mode")
    alone = [norm for norm, values in norms.items() if values <= 1]
    if not alone:
        return Check(name, "passed", f"{len(norms)}: even one sample gives them several values to a channel")
    sizes = sizes_of(seen.train_data)
    if sizes is None:
        return Check(name, "not applicable", "the loader does not tell the sizes of its batches")
    if 1 in sizes:
        others = " and ".join(str(size) for size in sorted(sizes, reverse=True))
        return Check(
            name,
            "failed",
            f"batches are of {others}; {listed([_layer(name) for name in alone])} would see a batch of one",
            "there is no variance of one value: torch raises an error in training",
            "drop_last=True in the training loader, or another batch_size",
        )
    return Check(name, "passed", f"batches are of {', '.join(map(str, sorted(sizes)))}, none of 1")


def inputs(seen: Seen) -> Check:
    """What the data feeds into layers is of a size that they can learn from."""
    name, first = "inputs are normalised", seen.first
    if first is None:
        return Check(name, "not applicable", why_unseen(seen))
    fed = {layer: torch.cat(rows).double() for layer, rows in first.record.layers.items() if _alike(rows)}
    fed = {layer: values for layer, values in fed.items() if values.numel()}
    if not fed:
        why = why_unseen(seen) or "no linear, convolutional or recurrent layer that is trained is fed by the data"
        return Check(name, "not applicable", why)
    for layer, values in fed.items():
        if (wrong := _not_normal(values, shuffled=is_shuffled(seen.train_data))) is not None:
            evidence, cause, fix = wrong
            return Check(name, "failed", f"{_layer(layer)}: {evidence}", cause, fix)
    layer, values = next(iter(fed.items()))
    return Check(
        name,
        "passed",
        f"{_layer(layer)}: mean {float(values.mean()):.3g}, standard deviation {float(values.std(correction=0)):.3g}",
    )


def _layer(name: str) -> str:
    return f"layer {name}" if name else "the model"


def _alike(rows: list[Tensor]) -> bool:
    return len({(row.shape[-1], row.device) for row in rows}) == 1


def _not_normal(values: Tensor, *, shuffled: bool) -> tuple[str, str, str] | None:
    """Evidence, cause and fix, of one layer's inputs."""
    count = values.shape[1]
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        places = bad.any(0).nonzero().flatten().tolist()
        return (
            f"{int(bad.sum())} of {values.numel()} values are NaN or infinite, in {_features(places, count)}",
            "each of them makes the loss NaN, and then every weight",
            "fill in or drop what is missing before it reaches the model",
        )
    if len(values) < ROWS:
        return None
    rms = values.square().mean(0).sqrt()
    fix = "subtract the mean and divide by the standard deviation of the training data"
    if bool((rms > RMS_LARGE).any()):
        places = (rms > RMS_LARGE).nonzero().flatten().tolist()
        return (
            f"values of about {float(rms.max()):.3g} (root mean square) in {_features(places, count)}",
            f"standardised ones are of about 1; above {RMS_LARGE:g} the first steps are far too large or too small",
            f"{fix}; pixels may be divided by 255",
        )
    if 0 < float(rms.max()) < RMS_SMALL:
        return (
            f"no feature is larger than {float(rms.max()):.3g} (root mean square)",
            "the outputs hardly depend on such inputs, and the gradients are as small",
            fix,
        )
    mean, spread = values.mean(0), values.std(0, correction=0)
    offset = (mean.abs() > OFFSET * spread) & (spread > 0) & (mean.abs() > 1)
    if shuffled and len(values) >= ROWS_FOR_SPREAD and bool(offset.any()):
        place = int(offset.nonzero()[0])
        return (
            f"{_features([place], count)} has mean {float(mean[place]):.4g} and standard deviation "
            f"{float(spread[place]):.3g}",
            "the offset hides what differs between samples",
            fix,
        )
    return None


def _features(places: list[int], count: int) -> str:
    if len(places) == count:
        return "all features" if count > 1 else "its only feature"
    return f"feature{'s' if len(places) > 1 else ''} {listed([str(place) for place in places])} of {count}"


def validation_runs(seen: Seen) -> Check:
    """The step runs on a validation batch in eval mode, and the metrics take what it returns."""
    name, sample, run = "a validation step runs", seen.val_sample, seen.validated
    if sample is None:
        return Check(name, "not applicable", "there is no validation data")
    if sample.error is not None:
        return failed_by(name, sample.error, "the loader raised it", "mend the dataset or its loader")
    if sample.why_none:
        return Check(name, "not applicable", sample.why_none)
    if run is None:
        return Check(
            name, "failed", "the validation data gave no batch", fix="check the dataset and how it is filtered"
        )
    if run.error is not None:
        unlike = _unlike(seen.sample.batches[0], sample.batches[0]) if seen.sample.batches else ""
        fix = "mend it; fit would end with the same error after its first epoch"
        return failed_step(name, run, sample.batches[0], unlike, fix)
    if not math.isfinite(run.losses[0]):
        return Check(
            name,
            "failed",
            f"the loss of the first validation batch is {run.losses[0]}",
            "such a score counts as no improvement",
            "look for NaN in the validation data, and at what the model does in eval mode",
        )
    taken = f", taken in by {', '.join(seen.subject.metrics)}" if seen.subject.metrics else ""
    return Check(name, "passed", f"loss {run.losses[0]:.4g}{taken}")


def _unlike(train_batch: Any, val_batch: Any) -> str:
    one, other = structure(train_batch), structure(val_batch)
    for path in [*one, *(path for path in other if path not in one)]:
        if one.get(path) != other.get(path):
            return (
                f"{path} is {one.get(path, 'not there')} in training and {other.get(path, 'not there')} in validation"
            )
    return ""


def separate_data(seen: Seen) -> Check:
    """No sample is both trained on and validated with."""
    name = "training and validation apart"
    if seen.val_data is None:
        return Check(name, "not applicable", "there is no validation data")
    shared, words = shared_samples(seen.train_data, seen.val_data)
    if shared is None:
        return Check(name, "not applicable", words)
    if not shared:
        return Check(name, "passed", words)
    return Check(
        name,
        "failed",
        words,
        "the validation would score what the model has been shown",
        "hold samples out, for example with torch.utils.data.random_split",
    )


def shuffled_classes(seen: Seen) -> Check:
    """A training loader in the dataset's order does not give one class after the other."""
    name, tensors = "order of the classes", all_tensors(seen.train_data)
    if seen.subject.loss is None:
        return Check(name, "not applicable", "what the labels are is not known with a step of one's own")
    by_class = _is_of(seen, BY_CLASS, (nn.CrossEntropyLoss, nn.NLLLoss))
    if not by_class and not _is_of(seen, BINARY, (nn.BCEWithLogitsLoss, nn.BCELoss)):
        return Check(name, "not applicable", why_unseen(seen) or "no loss of classes was called")
    targets = tensors[1] if tensors is not None and len(tensors) == 2 else None
    if targets is not None and not by_class:
        targets = _one_label_each(targets)
        if targets is None:
            return Check(name, "not applicable", "the targets are not one 0 or 1 for each sample")
    if targets is None or targets.ndim != 1 or targets.is_floating_point():
        return Check(name, "not applicable", "the labels of the whole training data are not at hand")
    if not in_order(seen.train_data):
        return Check(name, "passed", "the training data is shuffled")
    changes = int((targets[1:] != targets[:-1]).sum())
    classes = len(set(targets.tolist()))
    if changes == classes - 1 and classes > 1 and len(targets) > 4 * classes:
        return Check(
            name,
            "failed",
            f"all {len(targets)} samples come class by class, and the loader keeps that order",
            "each batch pulls the model towards one class",
            "shuffle=True in the training loader",
        )
    return Check(name, "passed", f"the class changes {changes} times over {len(targets)} samples")


def _is_of(seen: Seen, functions: Mapping[Callable[..., Tensor], str], kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether the loss is such a one: by its kind, which needs no step, or as one of a user's own was seen to call."""
    loss = seen.subject.loss
    known = isinstance(loss, kinds) or any(loss is function for function in functions)
    return known or any(call.name in functions.values() for call in calls_of(seen))


def _one_label_each(targets: Tensor) -> Tensor | None:
    """The labels of a binary loss as whole numbers, where there is one for each sample, and it is 0 or 1."""
    flat = targets.squeeze(1) if targets.ndim == 2 and targets.shape[1] == 1 else targets
    if flat.ndim != 1 or not bool(((flat == 0) | (flat == 1)).all()):
        return None
    return flat.long()
