"""What an audit found, check by check: verdicts, the report as text and as JSON values."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

SHOWN = 10  # details of a check in the text report; JSON has all


class Verdict(StrEnum):
    """ok: checked, and no leak. LEAK: novel supervision, or test pictures, were used. unknown: this could not be
    checked.

    report: a diagnosis or a disclosure, which is no leak.
    """

    OK = "ok"
    LEAK = "LEAK"
    UNKNOWN = "unknown"
    REPORT = "report"


@dataclass(frozen=True, slots=True)
class Check:
    """One check. `details`: what and where, a line each; `numbers`: the same for scripts, JSON values."""

    name: str
    verdict: Verdict
    text: str
    details: tuple[str, ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Findings:
    """What the check of a name found on its way: its verdict is the gravest of them."""

    name: str
    leaks: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cannot(self, why: str) -> Check:
        """The check, if it ends here: it cannot be made, or made any further."""
        self.unknown.append(why)
        return self.check("")

    def check(self, fine: str, numbers: dict[str, Any] | None = None) -> Check:
        """`fine`: the text if there is nothing else to say."""
        verdict = Verdict.LEAK if self.leaks else Verdict.UNKNOWN if self.unknown else Verdict.OK
        lines = [*self.leaks, *self.unknown]
        text = lines[0] if len(lines) == 1 else f"{len(lines)} findings" if lines else fine
        return Check(self.name, verdict, text, tuple((lines if len(lines) > 1 else []) + self.notes), numbers or {})


@dataclass(frozen=True, slots=True)
class AuditReport:
    """`about`: what was audited, by name."""

    about: dict[str, Any]
    checks: tuple[Check, ...]

    def count(self, verdict: Verdict) -> int:
        return sum(check.verdict is verdict for check in self.checks)

    @property
    def leaks(self) -> int:
        return self.count(Verdict.LEAK)

    def lines(self) -> list[str]:
        """The report as text: a line a check, its details below it."""
        lines = ["audit", *(f"  {name:12s}{value}" for name, value in self.about.items()), ""]
        for check in self.checks:
            lines.append(f"{check.verdict:9s}{check.name:22s}{check.text}")
            shown = check.details if len(check.details) <= SHOWN + 1 else check.details[:SHOWN]
            lines += [f"{'':31s}{detail}" for detail in shown]
            if len(shown) < len(check.details):
                lines.append(f"{'':31s}and {len(check.details) - len(shown)} more: --json lists all")
        unknown = self.count(Verdict.UNKNOWN)
        verdict = f"{self.leaks} LEAK{'S' if self.leaks > 1 else ''}" if self.leaks else "no leak found"
        return [
            *lines,
            "",
            f"{verdict}; {unknown} of {len(self.checks)} checks could not be made in full" if unknown else verdict,
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        checks = [
            {
                "name": c.name,
                "verdict": str(c.verdict),
                "text": c.text,
                "details": list(c.details),
                "numbers": c.numbers,
            }
            for c in self.checks
        ]
        return {"about": self.about, "leaks": self.leaks, "unknown": self.count(Verdict.UNKNOWN), "checks": checks}
