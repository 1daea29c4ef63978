"""What happens inside a step, written down: losses called, layers passed, values that cannot be used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its name everywhere
from torch.nn.modules import module as hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from loopwright.errors import DataError
from loopwright.nonfinite.census import each_tensor
from loopwright.sizes import batch_size

BY_CLASS: Mapping[Callable[..., Tensor], str] = {F.cross_entropy: "cross_entropy", F.nll_loss: "nll_loss"}
BINARY: Mapping[Callable[..., Tensor], str] = {
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
    F.binary_cross_entropy: "binary_cross_entropy",
}
ELEMENTWISE: Mapping[Callable[..., Tensor], str] = {
    F.mse_loss: "mse_loss",
    F.l1_loss: "l1_loss",
    F.smooth_l1_loss: "smooth_l1_loss",
    F.huber_loss: "huber_loss",
}
OUT_OF_RANGE = "a loss outside its range, or an index error that an accelerator reports late and cannot recover from"
IN_RANGE = "count from 0, and give the model one output for each class, or one row for each index"
_LOSSES = {**BY_CLASS, **BINARY, **ELEMENTWISE}
_DIFFERENCES = {"sub", "__sub__", "subtract", "rsub", "__rsub__"}
_FED_BY_DATA = (nn.Linear, _ConvNd, nn.RNNBase, nn.RNNCellBase)
_PASSED_OVER = ("ToCopy", "View", "UnsafeView", "Squeeze", "Unsqueeze", "Reshape", "ReshapeAlias", "Alias", "Clone")


@dataclass(frozen=True)
class LossCall:
    """One call of a loss function of torch's.

    Attributes:
        name: The function's.
        input: Its first argument, detached.
        target: Its second argument.
        ignore_index: The class that does not count, where there is one.
        made_by: The name of what computed the input, such as ``"Softmax"``.
    """

    name: str
    input: Tensor
    target: Tensor
    ignore_index: int
    made_by: str


@dataclass
class Record:
    """What was seen in the batches of one pass.

    Attributes:
        calls: The loss functions called.
        broadcasts: Shapes that were broadcast, in words.
        unusable: Labels or indices out of their range, in words.
        indexed: What was looked up or classified by index, and was in range, in words.
        layers: The inputs of the layers that the data feeds, features last, a tensor for each batch.
        norms: Values to each channel in one sample, for each batch norm in training mode.
        given: The tensors that the model was called with.
        marks: Fingerprints of what was computed, in order, each with the words that say what it is.
    """

    calls: list[LossCall] = field(default_factory=list)
    broadcasts: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    indexed: list[str] = field(default_factory=list)
    layers: dict[str, list[Tensor]] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    given: list[Tensor] = field(default_factory=list)
    marks: list[tuple[str, bytes]] = field(default_factory=list)


class Recorder(TorchFunctionMode):
    """While entered, writes into ``record`` what torch's functions and the model's modules are called with.

    Of what runs within a transform of ``torch.func`` it writes nothing.

    Args:
        record: Where to.
        names: The name of each module, by its id.
        root: The ids of the modules that are the model itself.
        batch: The batch that the step is given.
    """

    def __init__(self, record: Record, names: Mapping[int, str], root: set[int], batch: Any) -> None:
        super().__init__()
        self._record, self._names, self._root = record, names, root
        # Whether a tensor was computed from the batch.
        self._from_batch: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()
        for tensor in each_tensor(batch):
            self._from_batch[tensor] = True
        self._size = batch_size(batch)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Recorder:
        """Begin to record."""
        self._handles = [
            hooks.register_module_forward_pre_hook(self._before),
            hooks.register_module_forward_hook(self._after),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]  # torch has no annotation there
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch has no annotation there
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look at the arguments, then call the function."""
        kwargs = {} if kwargs is None else kwargs
        if _transformed(args):
            return func(*args, **kwargs)
        named = dict(zip(("input", "target"), args, strict=False)) | dict(kwargs)
        one, other = named.get("input"), named.get("target", named.get("other"))
        if isinstance(one, Tensor) and isinstance(other, Tensor) and not one.is_nested and not other.is_nested:
            if func in _LOSSES:
                self._loss(func, one, other, named)
            elif getattr(func, "__name__", "") in _DIFFERENCES:
                self._difference(one, other)
        if func is F.embedding and len(args) > 1:
            self._in_range("indices of an embedding", args[0], args[1].shape[0], "rows")
        output = func(*args, **kwargs)  # None, where it writes into its first argument, as __setitem__ does
        self._follow(getattr(func, "__name__", ""), args, kwargs, args[:1] if output is None else output)
        return output

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """What a function makes of the batch is of the batch; what it makes of weights or of numbers alone is not.

        Of some arguments it takes but shape and format: ``to`` and ``view_as`` of the second, ``zeros_like`` of all.
        """
        given = args[:1] if name == "to" or name.endswith("_as") else (*args, *kwargs.values())
        derived = any(self._is_from_batch(tensor) for tensor in each_tensor(given))
        derived = derived and not name.endswith("_like") and not name.startswith("new_")
        for tensor in each_tensor(output):
            self._from_batch[tensor] = derived

    def _is_from_batch(self, tensor: Tensor) -> bool:
        """As it was seen to be; of what was not seen to be made, such as a scripted module's output, by its graph."""
        return self._from_batch.get(tensor, not tensor.is_leaf)

    def _loss(self, func: Callable[..., Tensor], input: Tensor, target: Tensor, named: Mapping[str, Any]) -> None:
        ignore = named.get("ignore_index", -100)
        made_by = _made_by(input)
        self._record.calls.append(LossCall(_LOSSES[func], input.detach(), target.detach(), ignore, made_by))
        if func in ELEMENTWISE and input.shape != target.shape and _broadcast(input.shape, target.shape):
            self._record.broadcasts.append(
                f"{_LOSSES[func]} of a prediction {tuple(input.shape)} and a target {tuple(target.shape)}"
            )
        if func in BY_CLASS and not target.is_floating_point():
            classes = input.shape[1 if input.ndim > 1 else 0]
            self._in_range("labels", target[target != ignore], classes, "classes")
        if func in BINARY and target.numel():
            low, high = target.min().item(), target.max().item()
            words = f"targets of {_LOSSES[func]} from {low:g} to {high:g}"
            (self._record.unusable if low < 0 or high > 1 else self._record.indexed).append(words)

    def _in_range(self, what: str, indices: Tensor, count: int, of: str) -> None:
        """Raise before torch would: on an accelerator, its own error cannot be recovered from."""
        if indices.numel() == 0:
            return
        indices = indices.values() if indices.is_nested else indices
        low, high = int(indices.min()), int(indices.max())
        words = f"{what} from {low} to {high}, with {numbered(count, of)}"
        if low >= 0 and high < count:
            self._record.indexed.append(words)
            return
        self._record.unusable.append(words)
        raise DataError(words, why=OUT_OF_RANGE, fix=IN_RANGE)

    def _difference(self, one: Tensor, other: Tensor) -> None:
        """Of a column and a row, both computed from the batch, one with a gradient: every one against every other.

        So a target is one in whatever view or format, scaled, or made by another model. Parameters, and what is made
        of them alone, are none, such as centres that happen to be as many as the samples.
        """
        prediction, target = (one, other) if one.requires_grad else (other, one)
        size = self._size
        if target.requires_grad or not prediction.requires_grad or size is None or size < 2:
            return
        shapes = {tuple(prediction.shape), tuple(target.shape)}
        if shapes == {(size,), (size, 1)} and self._is_from_batch(prediction) and self._is_from_batch(target):
            self._record.broadcasts.append(
                f"the difference of a prediction {tuple(prediction.shape)} and a target {tuple(target.shape)}"
            )

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if _transformed(args):
            return
        if id(module) in self._root:
            self._record.given += each_tensor(args)
        name = self._names.get(id(module))
        value = args[0].data if args and isinstance(args[0], PackedSequence) else args[0] if args else None
        if name is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        if isinstance(module, _BatchNorm) and module.training and value.ndim > 1 and not value.is_nested:
            self._record.norms[name] = value.numel() / value.shape[1] / (self._size or len(value))
        trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if isinstance(module, _FED_BY_DATA) and trained and not value.requires_grad and value.numel():
            self._record.layers.setdefault(name, []).append(_features_last(module, value.detach()))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._names.get(id(module))
        if name is not None and not _transformed(output):
            self.mark(f"the output of {name or 'the model'}", output)

    def mark(self, what: str, value: Any) -> None:
        """Take down a fingerprint of all tensors in the value."""
        self._record.marks.append((what, fingerprint(each_tensor(value))))


def numbered(count: int, of: str) -> str:
    """So many classes or rows, and the numbers that they have, in words."""
    if count == 1:
        return f"1 {'class' if of == 'classes' else 'row'}, which is 0"
    return f"{count} {of}: 0 to {count - 1}"


def _transformed(value: Any) -> bool:
    """Whether torch.func is at work, whose tensors stand for many, and have no values once its function has returned.

    Within a transform, what is computed of other tensors is of its kind too.
    """
    if torch._C._functorch.maybe_current_level() is not None:
        return True
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in each_tensor(value))


def fingerprint(tensors: Iterable[Tensor]) -> bytes:
    """The same for the same bits; unlike, as good as certainly, for others."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        if is_lazy(tensor):
            continue  # its first forward pass is still to come
        tensor = tensor.detach()
        if tensor.is_nested:
            digest.update(str([tuple(part.shape) for part in tensor.unbind()]).encode())
            tensor = tensor.values()
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        data = tensor.cpu().contiguous().reshape(-1)
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        if data.numel():
            digest.update(data.resolve_conj().resolve_neg().view(torch.uint8).numpy().data)
    return digest.digest()


def _broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(a == b or 1 in (a, b) for a, b in zip(reversed(one), reversed(other), strict=False))


def _made_by(tensor: Tensor) -> str:
    """What computed a tensor, past casts and changes of shape, as its node in the graph is called."""
    node: Any = tensor.grad_fn
    while node is not None:
        name = str(node.name()).partition("Backward")[0]
        if name not in _PASSED_OVER or not node.next_functions:
            return name
        node = node.next_functions[0][0]
    return ""


def _features_last(module: nn.Module, value: Tensor) -> Tensor:
    if value.is_nested:
        return torch.cat([_features_last(module, part) for part in value.unbind()])
    if isinstance(module, _ConvNd):
        value = value.movedim(1 if value.ndim > len(module.kernel_size) + 1 else 0, -1)
    return value.reshape(-1, value.shape[-1]) if value.ndim else value.reshape(1, 1)
