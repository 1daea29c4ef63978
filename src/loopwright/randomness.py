"""The random generators that a run draws from: seeded, captured, put back."""

from __future__ import annotations

import array
import os
import random
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from loopwright.errors import CheckpointError
from loopwright.forms import check_form
from loopwright.scopes import scope


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's generators, on every device."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def generators_of(loader: object) -> list[torch.Generator]:
    """The generators of a loader's own: its, its sampler's and its batch sampler's, each once."""
    sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    found: list[torch.Generator] = []
    for owner in (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not other for other in found):
            found.append(generator)
    return found


class _Saved(TypedDict):
    python: tuple[int, Tensor, float | None] | None
    numpy: tuple[str, Tensor, int, int, float] | None
    torch_cpu: Tensor
    torch_cuda: list[Tensor]
    own: list[Tensor]


@dataclass(frozen=True)
class RandomState:
    """The state of every generator that training may draw from, at one moment.

    ``python`` and ``numpy`` are None where only torch's were of interest.
    """

    python: Any
    numpy: Any
    torch_cpu: Tensor
    torch_cuda: list[Tensor]
    own: list[Tensor]

    @classmethod
    def capture(cls, own: Iterable[torch.Generator] = (), *, torchs_only: bool = False) -> RandomState:
        """The present state of the global generators and of ``own``."""
        used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch has no annotation there
        cuda = torch.cuda.get_rng_state_all() if used else []
        at_torch = torch.get_rng_state(), cuda, [generator.get_state() for generator in own]
        if torchs_only:  # numpy takes a hundred times as long to tell its own
            return cls(None, None, *at_torch)
        import numpy as np

        return cls(random.getstate(), np.random.get_state(), *at_torch)

    def state_dict(self) -> dict[str, Any]:
        """As plain data and tensors: the rows of numbers are tensors, which are quick to save."""
        python, numpy = self.python, self.numpy
        return {
            # Through an array: torch would look at each number by itself, which takes eight times as long.
            "python": None if python is None else (python[0], _row(array.array("q", python[1])), python[2]),
            "numpy": None if numpy is None else (numpy[0], _row(numpy[1].astype("int64")), *numpy[2:]),
            "torch_cpu": self.torch_cpu,
            "torch_cuda": list(self.torch_cuda),
            "own": list(self.own),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RandomState:
        """What ``state_dict`` described, tried out on generators that nobody uses.

        Raises:
            CheckpointError: It is no state of these generators.
        """
        import numpy as np

        check_form(dict(state), _Saved, "$.random")
        python, numpy = state["python"], state["numpy"]
        try:
            if python is not None:
                if python[0] != 3:  # older versions differ
                    raise ValueError("the random generators in the checkpoint are not those of this python")
                python = (python[0], _numbers(python[1], 625), python[2])
                random.Random().setstate(python)
            if numpy is not None:
                kind, keys, position, *rest = numpy
                # numpy would read beyond its memory from a position that is not in there.
                if kind != "MT19937" or not 0 <= position <= 624:
                    raise ValueError("the random generators in the checkpoint are not those of this numpy")
                numpy = (kind, np.array(_numbers(keys, 624), dtype=np.uint32), position, *rest)
                np.random.RandomState().set_state(numpy)
            torch.Generator().set_state(state["torch_cpu"])
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                "the random generators refuse what the checkpoint holds for them", why=str(error)[:200]
            ) from error
        return cls(python, numpy, state["torch_cpu"], state["torch_cuda"], state["own"])

    def restore(self, own: Iterable[torch.Generator] = ()) -> None:
        """Put every generator back to where it was; ``own`` in the order in which they were captured."""
        if self.python is not None:
            random.setstate(self.python)
        if self.numpy is not None:
            import numpy as np

            np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda:  # there may be fewer devices now
            torch.cuda.set_rng_state_all(self.torch_cuda[: torch.cuda.device_count()])
        for generator, state in zip(own, self.own, strict=False):
            generator.set_state(state)


def _row(numbers: Any) -> Tensor:
    return torch.frombuffer(numbers, dtype=torch.int64)


def _numbers(row: Tensor, count: int) -> tuple[int, ...]:
    if row.dtype != torch.int64 or row.shape != (count,):
        raise ValueError(f"a generator's state is a row of {count} whole numbers")
    return tuple(row.tolist())


@scope
def deterministic_kernels() -> Generator[None]:
    """Deterministic kernels, or an error where torch has none, until the block ends."""
    cudnn = torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
    )
    # cuBLAS reads this once, when its first handle is made; setting it later does no harm.
    workspace = "CUBLAS_WORKSPACE_CONFIG"
    added = workspace not in os.environ
    if added:
        os.environ[workspace] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = before[2], before[3]
        if added:
            os.environ.pop(workspace, None)
