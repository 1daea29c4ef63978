"""Puts tensors back to what they were: their values, their shape, and the memory that they share with others."""

from __future__ import annotations

import torch
from torch import Tensor

from loopwright.checks.recorder import fingerprint

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class TensorAsFound:
    """Puts a tensor back, whatever was written to it, and whatever it was made to stand for.

    It stays the very same object. Where its shape, number format or memory was exchanged, as by ``resize_``, ``set_``
    or an assignment to ``data``, it is given its own memory again, so that it shares that with its views and with tied
    tensors as before. A tensor that has been moved to another device stays there, for the model may have been, and gets
    memory of its own where its shape has changed; so does one that is not strided.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        # In main memory: an accelerator may have no room for a third copy.
        copied = tensor.detach() if tensor.layout == torch.strided else tensor.detach().clone()  # to() would share it
        self._values = copied.to("cpu", copy=True)
        self._alias = tensor.detach()  # its place in memory, which it keeps alive
        self._place = _place(tensor)
        self._bytes = 0 if self._place is None else tensor.untyped_storage().nbytes()
        self._is_leaf, self._requires_grad = tensor.is_leaf, tensor.requires_grad

    def restore(self) -> None:
        """Put back what was found. What is as it was is not written to."""
        tensor, values = self._tensor, self._values
        if self._place is not None and tensor.device == self._alias.device:
            storage = self._alias.untyped_storage()
            if storage.nbytes() < self._bytes:  # one that has grown stays so: others may have come to look into it
                storage.resize_(self._bytes)
            if _place(tensor) != self._place:
                tensor.data = self._alias
            _write(self._alias, values)
        elif tensor.layout == torch.strided and (tensor.shape, tensor.dtype) == (values.shape, values.dtype):
            _write(tensor.detach(), values)
        elif fingerprint([tensor]) != fingerprint([values]):
            _exchange(tensor, values)
        self._restore_graph()

    def _restore_graph(self) -> None:
        """It is a leaf of the graph again, and asks for a gradient or does not, as before."""
        tensor = self._tensor
        if self._is_leaf and not tensor.is_leaf and not tensor._is_view():  # of a view its base is detached
            tensor.detach_()
        if self._is_leaf and tensor.is_leaf and tensor.requires_grad != self._requires_grad:
            tensor.requires_grad_(self._requires_grad)


def _write(tensor: Tensor, values: Tensor) -> None:
    """Make a tensor without a graph hold the values, if it does not."""
    if fingerprint([tensor]) != fingerprint([values]):
        # An expanded dimension has one element, which can be written to but once.
        once = tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())
        with torch.inference_mode(tensor.is_inference()):  # such a tensor takes no other writing
            tensor[once].copy_(values[once])


def _exchange(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor a shape and values that its memory may have no room for."""
    if tensor.layout in _COMPRESSED:  # an assignment to data changes nothing of what these hold
        with torch.no_grad():
            tensor.resize_as_sparse_(values).copy_(values)
    else:
        tensor.data = values.to(tensor.device, copy=True)


def of_one_piece(tensor: Tensor) -> Tensor:
    """The tensor, or of a nested one that which holds the elements of all its parts."""
    return tensor.detach().values() if tensor.is_nested else tensor


def _place(tensor: Tensor) -> tuple[object, ...] | None:
    """Where in memory a tensor lies, and how it is read; None for those that do not lie in one piece."""
    if tensor.layout != torch.strided:
        return None
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a kind without memory of its own, such as one that wraps others
        return None
    signs = tensor.is_conj(), tensor.is_neg()
    return storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, signs
