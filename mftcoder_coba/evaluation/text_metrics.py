"""Metrics of generated answers against references, from 0 to 100."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], float]


def normalised(text: str) -> list[str]:
    """The tokens of an answer: lower case, ASCII punctuation removed, the articles a, an, the removed, split at white space.

    The normalisation of SQuAD v1.1, which XTREME-UP uses for all of its languages: no Unicode normalisation, no other punctuation or articles.
    """
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def span_f1(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean over answers of the largest token F1 with one of its references. F1 is 0 where no token is shared, also of two empty texts."""
    return _mean(answers, references, _f1)


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The part of answers whose tokens are those of one of its references."""
    return _mean(answers, references, lambda answer, reference: float(normalised(answer) == normalised(reference)))


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of sacrebleu with its defaults: 13a tokens, exponential smoothing, case matters."""
    from sacrebleu.metrics import BLEU

    most = max(len(of) for of in references)
    streams = [[of[number] if number < len(of) else None for of in references] for number in range(most)]
    return BLEU().corpus_score(list(answers), streams).score


def _f1(answer: str, reference: str) -> float:
    found, wanted = Counter(normalised(answer)), Counter(normalised(reference))
    shared = (found & wanted).total()
    return 2 * shared / (found.total() + wanted.total()) if shared else 0.0  # the harmonic mean of precision and recall


def _mean(answers: Sequence[str], references: Sequence[Sequence[str]], score: Callable[[str, str], float]) -> float:
    best = [max(score(answer, reference) for reference in of) for answer, of in zip(answers, references, strict=True)]
    return 100.0 * sum(best) / len(best)


METRICS: dict[str, Metric] = {"span_f1": span_f1, "exact_match": exact_match, "bleu": bleu}
