"""Where every sample of the files went, per task and split, in samples and tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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

    With `"too_long": "split"`, the last two count documents: one sample may be several.

    Attributes:
        read: all lines that are not blank; tokens before anything is cut off. What is not tokenised has no tokens here.
        skipped: lines that could not be used.
        other_split: samples of the same files that belong to the split beside this one, by hash. Not tokenised here.
        too_long: samples dropped because they are longer than `sequence_length`.
        truncated: samples cut to `sequence_length`, and the tokens cut off. These samples are used or without supervision.
        split_samples: samples that were split into documents.
        added_documents: documents that there are more for it: a sample split into three adds two.
        without_supervision: samples with no token that can be learned: supervised and not a document's first token.
        used: what is trained or validated on.
        supervised_tokens: of `used`.
        duplicates: samples of `used` whose messages are those of an earlier one.
        lengths: (n, samples of at most n tokens and more than the n before), over all samples that were tokenised, as they came.
    """

    task: str
    split: str
    read: Count
    skipped: tuple[Skipped, ...]
    other_split: Count
    too_long: Count
    truncated: Count
    split_samples: int
    added_documents: int
    without_supervision: Count
    used: Count
    supervised_tokens: int
    duplicates: int
    lengths: tuple[tuple[int, int], ...]

    def check(self) -> None:
        """Raises RuntimeError if a sample or a token got lost."""
        tokenised = self.read.samples - len(self.skipped) - self.other_split.samples
        if tokenised != sum(samples for _, samples in self.lengths):
            raise RuntimeError(f"{self.task}/{self.split}: {tokenised} samples were tokenised, but the histogram holds {self.lengths}")
        samples = len(self.skipped) + sum(part.samples for part in (self.other_split, self.too_long, self.without_supervision, self.used))
        tokens = sum(part.tokens for part in (self.too_long, self.truncated, self.without_supervision, self.used))
        if (samples, tokens) != (self.read.samples + self.added_documents, self.read.tokens):
            raise RuntimeError(
                f"{self.task}/{self.split}: read {self.read} and added {self.added_documents} documents, "
                f"but the parts sum to {samples} samples and {tokens} tokens"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SplitAccounting:
        skipped = tuple(Skipped(**line) for line in values["skipped"])
        parts = {key: Count(**value) if isinstance(value, dict) else value for key, value in values.items()}
        return cls(**parts | {"skipped": skipped, "lengths": tuple(map(tuple, values["lengths"]))})

    def summary(self) -> str:
        """One line for people."""
        parts = {"skipped": len(self.skipped), "in the other split": self.other_split.samples, "too long": self.too_long.samples}
        parts |= {"truncated": self.truncated.samples, "split": self.split_samples, "without supervised tokens": self.without_supervision.samples}
        notes = "".join(f", {number:,} {name}" for name, number in parts.items() if number)
        return f"{self.task}/{self.split}: {self.used.samples:,} of {self.read.samples:,} samples used, {self.used.tokens:,} tokens{notes}"
