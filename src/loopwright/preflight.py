"""What a preflight found: its checks, each with a verdict and the evidence, and the table of them."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loopwright.errors import ConfigError, nearest

Verdict: TypeAlias = Literal["passed", "failed", "not applicable"]

_WIDTH = 120  # of the table, where its words allow


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a preflight looked at.

    Attributes:
        name: What was looked at, such as ``"loss is finite"``; the names do not change.
        verdict: ``"passed"``, ``"failed"``, or ``"not applicable"`` where it cannot be known.
        evidence: What was seen, or why nothing could be.
        cause: Of a failure: what it comes from, or leads to.
        fix: Of a failure: what to do about it.

    Examples:
        >>> trainer = Trainer(model, optimizer, nn.MSELoss())
        >>> check = trainer.preflight(train_loader)["loss is finite"]
        >>> check.verdict, check.fix
        ('passed', '')
    """

    name: str
    verdict: Verdict
    evidence: str
    cause: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Preflight:
    """What ``Trainer.preflight`` returns; as text it is a table.

    Attributes:
        checks: All of them, in the order of the table.

    Examples:
        >>> trainer = Trainer(model, optimizer, nn.MSELoss())
        >>> report = trainer.preflight(train_loader)
        >>> report.ok
        True
        >>> report["loss is finite"].verdict
        'passed'
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.verdict == "failed")

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        names = [check.name for check in self.checks]
        words = [f"there is no check {name!r}", nearest(name, names), f"there are {', '.join(map(repr, names))}"]
        raise KeyError("; ".join(word for word in words if word))

    def __str__(self) -> str:
        return "\n".join([*self._rows(), self._summary()])

    def raise_failures(self) -> None:
        """Do nothing where no check failed.

        Raises:
            ConfigError: One did; the table is in the message.
        """
        if self.ok:
            return
        raise ConfigError(
            f"the preflight found {len(self.failed)} of {len(self.checks)} checks failed",
            why="fit(preflight=True) trains only where none does\n" + textwrap.indent(str(self), "  "),
            fix="\n    ".join([*self._fixes(), "or preflight=False, to train all the same"]),
        )

    def _fixes(self) -> list[str]:
        """What to do, each but once, after the names of the checks that it is for."""
        names: dict[str, list[str]] = {}
        for check in self.failed:
            names.setdefault(check.fix, []).append(check.name)
        return [f"{', '.join(checks)}: {fix}" for fix, checks in names.items()]

    def _rows(self) -> list[str]:
        name_width = max(len(check.name) for check in self.checks)
        verdict_width = len("not applicable")
        indent = " " * (name_width + verdict_width + 4)
        rows = []
        for check in self.checks:
            start = f"{check.name:<{name_width}}  {check.verdict:<{verdict_width}}  "
            parts = [check.evidence, check.cause and f"cause: {check.cause}", check.fix and f"fix: {check.fix}"]
            for number, part in enumerate(part for part in parts if part):
                rows += textwrap.wrap(
                    part,
                    _WIDTH,
                    initial_indent=indent if number else start,
                    subsequent_indent=indent + ("       " if number else ""),
                    break_long_words=False,
                    break_on_hyphens=False,
                )
        return rows

    def _summary(self) -> str:
        counts = {
            verdict: sum(check.verdict == verdict for check in self.checks)
            for verdict in ("passed", "failed", "not applicable")
        }
        return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
