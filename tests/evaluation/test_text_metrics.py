"""Metrics of answers: closed forms, and sacrebleu's own number."""

import pytest
from sacrebleu import corpus_bleu

from mftcoder_coba.evaluation.text_metrics import bleu, exact_match, normalised, span_f1


def test_tokens_are_those_of_squad():
    assert normalised("The  Eiffel-Tower, (Paris)!") == ["eiffeltower", "paris"]
    assert normalised("An apple a day; theatre") == ["apple", "day", "theatre"]
    assert normalised("১৯৪৭ সালে।") == ["১৯৪৭", "সালে।"]  # of other scripts only white space and ASCII punctuation divide
    assert normalised("café") != normalised("cafe\u0301")


def test_span_f1_is_the_harmonic_mean_of_precision_and_recall_of_the_best_reference():
    assert span_f1(["in Paris France"], [["Paris"]]) == pytest.approx(100 * 2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert span_f1(["in Paris France"], [["Rome", "Paris, France"]]) == pytest.approx(80.0)
    assert span_f1(["x x y"], [["x z"]]) == pytest.approx(40.0)
    assert span_f1(["Paris", "wrong"], [["the Paris"], ["right"]]) == 50.0
    assert span_f1([""], [[""]]) == 0.0


def test_an_exact_match_is_of_normalised_tokens():
    assert exact_match(["The Paris.", "paris france", "x"], [["paris"], ["Paris"], ["y", "X!"]]) == pytest.approx(200 / 3)


def test_bleu_is_sacrebleu_s_of_the_corpus():
    answers = ["the cat sat on the mat today", "a dog runs in the park"]
    references = [["the cat sat on the mat", "a cat is on the mat today"], ["a dog runs through the park"]]
    expected = corpus_bleu(answers, [["the cat sat on the mat", "a dog runs through the park"], ["a cat is on the mat today", None]])
    assert bleu(answers, references) == pytest.approx(expected.score)
    assert bleu(answers, [[answer] for answer in answers]) == pytest.approx(100.0)
