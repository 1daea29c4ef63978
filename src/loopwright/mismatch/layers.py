"""What a layer cannot take: another number format than that of its weights, or another number of features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence

Cause = tuple[str, str]
"""What was found, and what to do about it."""

CASTS: Mapping[torch.dtype, str] = {
    torch.float32: "float()",
    torch.float64: "double()",
    torch.float16: "half()",
    torch.bfloat16: "bfloat16()",
}
_SPACES = {1: "length", 2: "height, width", 3: "depth, height, width"}
_DIMENSIONS = {"BatchNorm1d": (2, 3), "BatchNorm2d": (4,), "BatchNorm3d": (5,)}


@dataclass(frozen=True)
class Given:
    """What is known of the step in which a layer was called.

    Attributes:
        model: What is trained; None where it was not found.
        arguments: The tensors that the model was called with; empty where only parts of it were called.
        batch: The tensors of the batch, each with its place in it.
        precision: The trainer's.
    """

    model: nn.Module | None = None
    arguments: list[Tensor] = field(default_factory=list)
    batch: list[tuple[str, Tensor]] = field(default_factory=list)
    precision: str = "fp32"

    @property
    def inputs(self) -> list[tuple[str, Tensor]]:
        """The tensors of the batch that the model was called with."""
        paths = {path for argument in self.arguments for path in self._paths(argument)}
        return [(path, tensor) for path, tensor in self.batch if path in paths]

    def origin(self, value: Tensor) -> str | None:
        """What of the batch a tensor is, or is certain to have been computed from; None where that is not certain."""
        inputs, floating = self.inputs, [a for a in self.arguments if a.is_floating_point()]
        if found := self._paths(value):
            alone = len(inputs) == 1 and found[0] == inputs[0][0]
            return None if len(found) > 1 else "the inputs" if alone else found[0]
        # No other floating numbers came in, and layers do not change a format.
        if value.is_floating_point() and floating and all(a.dtype == value.dtype for a in floating):
            return "the inputs" if any(tensor.dtype == value.dtype for _, tensor in inputs) else None
        return None

    def _paths(self, value: Tensor) -> list[str]:
        """Where in the batch a tensor is; else what begins at the same place in memory, else what lies in the same."""
        for alike in (_is_same, _begins_with, _overlap):
            if found := [path for path, tensor in self.batch if alike(tensor, value)]:
                return found
        return []


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one is other


def _begins_with(one: Tensor, other: Tensor) -> bool:
    return _overlap(one, other) and one.storage_offset() == other.storage_offset()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether both read the same memory in the same format, as a tensor and its views do."""
    if one is other:
        return True
    if one.layout != torch.strided or other.layout != torch.strided or one.dtype != other.dtype:
        return False
    return 0 != one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def of_layer(layer: nn.Module, value: Tensor, given: Given, *, of_types: bool) -> Cause | None:
    """What a layer of torch's cannot take of what it was given.

    Args:
        layer: Whose forward raised an error.
        value: Its input.
        given: What is known of the step around it.
        of_types: Whether the error speaks of types.
    """
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):  # it takes no numbers of its weights' format
        return None
    own = {p.dtype for p in layer.parameters(recurse=False)}
    places = {p.device for p in layer.parameters(recurse=False)}
    if len(places) == 1 and value.device not in places:
        return f"{layer} was given a tensor on {value.device}; its weights are on {places.pop()}", (
            "device=inputs.device where forward makes a tensor; or register_buffer() for one that the model keeps"
        )
    what = f"{layer} was given {short(value.dtype)} of shape {tuple(value.shape)}"
    if of_types and len(own) == 1 and (found := _of_types(layer, value, own.pop(), what, given)) is not None:
        return found
    if isinstance(layer, nn.Linear) and layer.in_features and value.ndim and value.shape[-1] != layer.in_features:
        return _of_features(layer, value, what)
    if isinstance(layer, _ConvNd) and layer.in_channels:
        return _of_channels(layer, value, what)
    if isinstance(layer, _BatchNorm) and value.ndim in _DIMENSIONS.get(type(layer).__name__, ()):
        return _of_norm(layer, value, what)
    return None


def of_other_kind(layer: nn.Module, value: object) -> Cause | None:
    """What a layer with weights was given in place of a tensor.

    Args:
        layer: Whose forward raised an error.
        value: Its input, which is no tensor.
    """
    if isinstance(value, PackedSequence) or not list(layer.parameters(recurse=False)):
        return None
    found, cure = kind_of(value, "what comes before it")
    return f"{layer} was given {found}; it takes a tensor", cure


def kind_of(value: object, maker: str = "") -> Cause:
    """What something is that should have been a tensor, and how ``maker``, which gave it, is to give one."""
    if value is None:
        return "None", f"return what is computed, in the forward of {maker}"
    if isinstance(value, (tuple, list)) and value:
        kinds = ", ".join(type(item).__name__ for item in value[:3]) + ", ..." * (len(value) > 3)
        name = f"a {type(value).__name__} of {len(value)}: ({kinds})"
        return name, "the tensor in it that is meant: the first is what an nn.LSTM and its like put out, for example"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, value))}", "the tensor in it that is meant"
    if hasattr(value, "__array_interface__"):
        return "an array of numpy's", "torch.from_numpy(array), in the dataset"
    return f"an object of type {type(value).__name__}", "a tensor"


def _of_types(layer: nn.Module, value: Tensor, dtype: torch.dtype, what: str, given: Given) -> Cause | None:
    what = f"{what}; its weights are {short(dtype)}"
    if value.dtype == dtype:
        return None
    if dtype.is_complex:
        return what, f".to({dtype}) on what it is given"
    if value.dtype.is_complex:
        return what, f"real numbers, as abs() or torch.view_as_real() make them; or a layer with dtype={value.dtype}"
    if dtype not in CASTS:
        return None
    if _brought_together(value.dtype, dtype, given):
        return None
    cast = CASTS[dtype]
    if given.model is None or all(module is not layer for module in given.model.modules()):
        return what, f".{cast} on what it is given"
    kinds = _kinds(given.model)
    if len(kinds) > 1 and value.is_floating_point():
        return _of_mixed(what, cast, kinds, given)
    numpy = _numpy(value.dtype)
    if (name := given.origin(value)) is not None:
        found = f"{name} {'are' if name.startswith('the ') else 'is'} {short(value.dtype)}{numpy}; "
        found += (
            f"the parameters are {short(dtype)}" if len(kinds) == 1 else f"the weights of {layer} are {short(dtype)}"
        )
        if not value.is_floating_point() and any(isinstance(m, nn.Embedding) for m in given.model.modules()):
            return found, f".{cast} on what {layer} is given"  # an embedding may need them as they are
        return found, _on_inputs(dtype, given, name)
    of_inputs = [path for path, t in given.inputs if t.dtype == value.dtype and t.is_floating_point()]
    if of_inputs:
        found = f"{what}; of the inputs {_listed(of_inputs)} {_is(of_inputs)} {short(value.dtype)}{numpy}"
        return found, f".{cast} on {_listed(of_inputs)} in the dataset; or on what the layer is given"
    buffers = [repr(n) for n, b in given.model.named_buffers() if b.dtype == value.dtype and b.is_floating_point()]
    if buffers:
        found = f"{what}; of the model's buffers {_listed(buffers)} {_is(buffers)} {short(value.dtype)}{numpy}"
        return found, f".{cast} on {_listed(buffers)}, where it is registered; or on what the layer is given"
    return what, f".{cast} on what it is given"


def of_arguments(given: Given) -> Cause | None:
    """Of an error of types somewhere in the model: whether all numbers that it was called with are of a wrong one."""
    floating = {tensor.dtype for tensor in given.arguments if tensor.is_floating_point()}
    kinds = {} if given.model is None else _kinds(given.model)
    if len(floating) != 1 or len(kinds) != 1 or floating == set(kinds) or not given.inputs:
        return None
    (value,), (dtype,) = floating, kinds
    if dtype not in CASTS or _brought_together(value, dtype, given):
        return None
    return f"the inputs are {short(value)}{_numpy(value)}; the parameters are {short(dtype)}", _on_inputs(dtype, given)


def _brought_together(one: torch.dtype, other: torch.dtype, given: Given) -> bool:
    """Whether autocast does not mind that they differ."""
    return given.precision != "fp32" and one in CASTS and torch.float64 not in (one, other)


def _numpy(dtype: torch.dtype) -> str:
    return ", as numpy's arrays are unless told otherwise" if dtype == torch.float64 else ""


def _on_inputs(dtype: torch.dtype, given: Given, name: str = "the inputs") -> str:
    if dtype == torch.float64 and given.precision != "fp32":
        return f"model.float(), for {given.precision} begins with that"
    single = "; or model.float()" * (dtype != torch.float32 and any(t.dtype == torch.float32 for _, t in given.inputs))
    return f"{name.removeprefix('the ')}.{CASTS[dtype]} in the dataset{single}"


def _kinds(model: nn.Module) -> dict[torch.dtype, list[str]]:
    """The names of the layers that have weights of each floating format; most layers first."""
    kinds: dict[torch.dtype, list[str]] = {}
    for name, module in model.named_modules():
        for dtype in {p.dtype: None for p in module.parameters(recurse=False) if p.is_floating_point()}:
            kinds.setdefault(dtype, []).append(repr(name) if name else "the model itself")
    return dict(sorted(kinds.items(), key=lambda kind: -len(kind[1])))


def _of_mixed(what: str, cast: str, kinds: Mapping[torch.dtype, list[str]], given: Given) -> Cause:
    """Of layers that are not of one format: which of them differ from the others."""
    (most, many), *_, (least, few) = kinds.items()
    if len(kinds) == 2 and len(few) < len(many):
        found = f"of the model's layers {_listed(few)} {_is(few)} {short(least)}, and the others {short(most)}"
    else:
        words = [f"{_listed(names)} {_is(names)} {short(dtype)}" for dtype, names in kinds.items()]
        found = f"the model's layers are not of one type: {', '.join(words)}"
        most = torch.float32 if torch.float32 in kinds else most
    others = any(tensor.is_floating_point() and tensor.dtype != most for _, tensor in given.inputs)
    one = CASTS.get(most, f"to({most})")
    return f"{what}; {found}", (
        f"model.{one}, for one type in all layers{f', and inputs.{one}' * others}; "
        f"or .{cast} on what this layer is given, where they are to differ"
    )


def _of_features(layer: nn.Linear, value: Tensor, what: str) -> Cause:
    last, wanted, out = value.shape[-1], layer.in_features, layer.out_features
    what = f"{what}, whose last dimension is to be {wanted}"
    flat = math.prod(value.shape[1:])
    if value.ndim == 1 and wanted == 1:
        return what, ".unsqueeze(-1) on what it is given, for one feature to a sample"
    if value.ndim > 2 and flat == wanted:
        return what, "nn.Flatten() before it"
    cure = f"nn.Linear({last}, {out}), or what it is given with {wanted} feature{'s' * (wanted != 1)}"
    return what, cure + f"; or nn.Flatten() before it, and nn.Linear({flat}, {out})" * (value.ndim > 2)


def _of_channels(layer: _ConvNd, value: Tensor, what: str) -> Cause | None:
    spaces, wanted, shape = len(layer.kernel_size), layer.in_channels, value.shape
    spaced = _SPACES.get(spaces, "...")
    takes = f"{what}; it takes the shape (batch, {wanted}, {spaced})"
    if value.ndim == spaces + 2:
        if shape[1] == wanted:
            return None
        if shape[-1] == wanted:
            return takes, ".movedim(-1, 1) on what it is given, for the channels to be the second dimension"
        made = f"nn.{type(layer).__name__}({shape[1]}, {layer.out_channels}, ...)"
        return takes, f"{made}, or what it is given with {wanted} channel{'s' * (wanted != 1)}"
    if value.ndim == spaces + 1:  # torch takes it for one sample without a batch
        if shape[0] == wanted:
            return None
        cure = (
            ".unsqueeze(1) on what it is given, for its one channel"
            if wanted == 1
            else "what it is given in that shape"
        )
        return takes, cure
    return (
        takes,
        f".unflatten(1, ({wanted}, {spaced})) on what it is given"
        if value.ndim == 2
        else "what it is given in that shape",
    )


def _of_norm(layer: _BatchNorm, value: Tensor, what: str) -> Cause | None:
    wanted, kind = layer.num_features, type(layer).__name__
    if value.shape[1] == wanted:
        if layer.training and value.numel() == wanted:
            cure = "drop_last=True in the training loader, or another batch_size"
            return f"{what}: one value for each feature, of which there is no variance", cure
        return None
    what = f"{what}, whose second dimension is to be its {wanted} features"
    if value.ndim > 2 and value.shape[-1] == wanted:
        return what, ".movedim(-1, 1) on what it is given, and back after it"
    return what, f"nn.{kind}({value.shape[1]}), or what it is given with {wanted}"


def short(dtype: torch.dtype) -> str:
    """A dtype without torch's name."""
    return str(dtype).removeprefix("torch.")


def shape_of(tensor: Tensor) -> str:
    """A tensor's shape in words; of a nested one, with a star where its parts differ."""
    if tensor.layout != torch.strided or not tensor.is_nested:
        return str(tuple(tensor.shape))
    sizes = []
    for dimension in range(tensor.ndim):
        try:
            sizes.append(str(tensor.size(dimension)))
        except RuntimeError:
            sizes.append("*")
    return f"({', '.join(sizes)})"


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _is(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"
