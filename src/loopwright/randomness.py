"""The random generators that a run draws from: seeded, captured, put back."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's generators, on every device."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def generators_of(loader: object) -> list[torch.Generator]:
    """The generators of a loader's own: its, its sampler's and its batch sampler's, each once."""
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = [loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


@dataclass(frozen=True)
class RandomState:
    """The state of every generator that training may draw from, at one moment."""

    python: Any
    numpy: Any
    torch_cpu: torch.Tensor
    torch_cuda: list[torch.Tensor]
    own: list[torch.Tensor]

    @classmethod
    def capture(cls, own: Iterable[torch.Generator] = ()) -> RandomState:
        """The present state of the global generators and of ``own``."""
        import numpy as np

        used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch has no annotation there
        cuda = torch.cuda.get_rng_state_all() if used else []
        return cls(
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
            cuda,
            [generator.get_state() for generator in own],
        )

    def restore(self, own: Iterable[torch.Generator] = ()) -> None:
        """Put every generator back to where it was; ``own`` in the order in which they were captured."""
        import numpy as np

        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda:
            torch.cuda.set_rng_state_all(self.torch_cuda)
        for generator, state in zip(own, self.own, strict=False):
            generator.set_state(state)


@contextlib.contextmanager
def undrawn_on_error(own: Iterable[torch.Generator]) -> Iterator[None]:
    """A block that draws nothing if it fails: it can be run again as if for the first time."""
    own = list(own)
    before = RandomState.capture(own)
    try:
        yield
    except BaseException:
        before.restore(own)
        raise


@contextlib.contextmanager
def deterministic_kernels() -> Iterator[None]:
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
