"""What an audit finds: each finding with the name it is about, the likely cause and the fix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_freeze._lightning import MisconfigurationException
from lightning_freeze.words import counted, listed

Kind = (
    Literal["frozen_value_moved", "frozen_statistics_moved", "frozen_in_step", "no_gradient"]
    | Literal["in_no_optimizer", "in_two_optimizers", "graph_kept", "replicas_differ"]
)

_TITLES: dict[Kind, str] = {
    "frozen_value_moved": "frozen, but its value moved",
    "frozen_statistics_moved": "running statistics or another buffer of a frozen module that moved",
    "frozen_in_step": "frozen, but an optimizer moves it",
    "no_gradient": "trainable, but it gets no gradient",
    "in_no_optimizer": "trainable, but in no optimizer",
    "in_two_optimizers": "trainable, but held by optimizers twice",
    "graph_kept": "keeps a graph alive between steps",
    "replicas_differ": "differs between processes",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Args:
        kind: What is wrong, see :class:`GradientAudit`.
        name: The parameter's or buffer's dotted name; for ``"graph_kept"`` the way to it, such as ``self.losses[3]``.
        cause: Why it most likely is so.
        fix: What to do about it.
        step: How many batches the fit had trained when it was found.

    Example:
        >>> print(Finding("in_no_optimizer", "head.bias", "It was forgotten.", "Add it.", step=0))
        head.bias: trainable, but in no optimizer
          cause: It was forgotten.
          fix:   Add it.
    """

    kind: Kind
    name: str
    cause: str
    fix: str
    step: int

    @property
    def title(self) -> str:
        """What is wrong, in words."""
        return _TITLES[self.kind]

    def __str__(self) -> str:
        return described([self])


class Report(list[Finding]):
    """The findings of an audit in the order in which they were made; ``str`` returns a readable text.

    Attributes:
        checks: At how many points something was checked.
        parameters: How many parameters the module has.

    Example:
        >>> report = Report([Finding("in_no_optimizer", "bias", "Forgotten.", "Add it.", 0)], checks=4, parameters=62)
        >>> report.summary, report.of("in_no_optimizer"), report.of("no_gradient")
        ('audit: 1 finding in 4 checks over 62 parameters', ['bias'], [])
    """

    def __init__(self, findings: Iterable[Finding] = (), *, checks: int = 0, parameters: int = 0) -> None:
        super().__init__(findings)
        self.checks = checks
        self.parameters = parameters

    def of(self, kind: Kind) -> list[str]:
        """Return the names that the findings of one kind are about."""
        return [finding.name for finding in self if finding.kind == kind]

    @property
    def summary(self) -> str:
        """One line: how much was found in how many checks."""
        if not self and not self.checks:
            return "audit: nothing was audited in this process"
        found = counted(len(self), "finding") if self else "no finding"
        return f"audit: {found} in {counted(self.checks, 'check')} over {counted(self.parameters, 'parameter')}"

    def __str__(self) -> str:
        return "\n".join([self.summary, *map(described, alike(self))])


class AuditError(MisconfigurationException):
    """What :class:`GradientAudit` raises with ``on_violation="raise"``; ``report`` has the findings as data."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


def subject(finding: Finding) -> tuple[str, str]:
    """Return what of two findings only one is reported for."""
    return finding.kind, container(finding.name)


def container(way: str) -> str:
    """Return the way to what a tensor is kept in: the same for all that is in one list or dict.

    Example:
        >>> container("self.outputs[31]['loss']"), container("self.last"), container("self.a[2]._base (… is a view)")
        ('self.outputs', 'self.last', 'self.a')
    """
    return re.split(r"[\[{]|\._base ", way)[0]


def alike(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Return findings in groups of one kind, cause and fix."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.kind, finding.cause, finding.fix), []).append(finding)
    return list(groups.values())


def described(findings: Sequence[Finding]) -> str:
    """Return findings that are alike as one text."""
    first, names = findings[0], listed((finding.name for finding in findings), most=20)
    return f"{names}: {first.title}\n  cause: {first.cause}\n  fix:   {first.fix}"


def merged(by_rank: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Return the findings of all processes, each once, with the ranks that made it if not all did."""
    made: dict[tuple[str, str], dict[str, Finding]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            made.setdefault(subject(finding), {})[str(rank)] = finding
    found = []
    for ranks in made.values():
        first = next(iter(ranks.values()))
        only = f" (On rank {', '.join(ranks)} only.)" if len(ranks) < len(by_rank) else ""
        found.append(replace(first, cause=first.cause + only))
    return found
