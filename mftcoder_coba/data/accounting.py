"""Where every sample of the files went, per task and split, in samples and tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

PRINTED_SKIPS = 10


@dataclass(frozen=True)
class Count:
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Skipped:
    """A line that could not be used under `"on_error": "skip"`."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class SplitAccounting:
    """One split of one task. The parts of `read` are `skipped`, `other_split`, `too_long`, `without_supervision`, `used`.

    Attributes:
        read: all lines that are not blank; tokens before anything is cut off. What is not tokenised has no tokens here.
        skipped: lines that could not be used.
        other_split: samples of the same files that belong to the split beside this one, by hash. Not tokenised here.
        too_long: samples dropped because they are longer than `sequence_length`.
        truncated: samples cut to `sequence_length`, and the tokens cut off. These samples are used or without supervision.
        without_supervision: samples with no token that can be learned: supervised and not a document's first token.
        used: what is trained or validated on.
        supervised_tokens: of `used`.
        duplicates: samples of `used` whose messages are those of an earlier one.
    """

    task: str
    split: str
    read: Count
    skipped: tuple[Skipped, ...]
    other_split: Count
    too_long: Count
    truncated: Count
    without_supervision: Count
    used: Count
    supervised_tokens: int
    duplicates: int

    def check(self) -> None:
        """Raises RuntimeError if a sample or a token got lost."""
        samples = len(self.skipped) + sum(part.samples for part in (self.other_split, self.too_long, self.without_supervision, self.used))
        tokens = sum(part.tokens for part in (self.too_long, self.truncated, self.without_supervision, self.used))
        if (samples, tokens) != (self.read.samples, self.read.tokens):
            raise RuntimeError(f"{self.task}/{self.split}: read {self.read}, but the parts sum to {samples} samples and {tokens} tokens")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SplitAccounting:
        skipped = tuple(Skipped(**line) for line in values["skipped"])
        parts = {key: Count(**value) if isinstance(value, dict) else value for key, value in values.items()}
        return cls(**parts | {"skipped": skipped})

    def lines(self) -> list[str]:
        """For people: one line with the figures, then the first skipped lines."""
        parts = {"skipped": len(self.skipped), "in the other split": self.other_split.samples, "too long": self.too_long.samples}
        parts |= {"truncated": self.truncated.samples, "without supervised tokens": self.without_supervision.samples, "duplicates": self.duplicates}
        notes = "".join(f", {number:,} {name}" for name, number in parts.items() if number)
        share = 100 * self.supervised_tokens / max(1, self.used.tokens)
        text = f"{self.task}/{self.split}: {self.used.samples:,} of {self.read.samples:,} samples used, {self.used.tokens:,} tokens"
        listed = [f"  skipped {line.file}:{line.line}: {line.reason}" for line in self.skipped[:PRINTED_SKIPS]]
        more = len(self.skipped) - len(listed)
        return [f"{text} ({share:.1f} % supervised){notes}", *listed, *([f"  and {more:,} more skipped lines"] if more else [])]
