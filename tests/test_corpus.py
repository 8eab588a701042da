"""The corpus: deterministic, clean, balanced enough to be a task."""

import collections

import pytest

from peft_xmask.cli.corpus import CHAPTERS, MAX_PER_CHAPTER, MAX_WORDS, MIN_WORDS, clean_docstring, docstring_corpus


@pytest.fixture(scope="module")
def corpus():
    return docstring_corpus()


def test_it_is_a_task_of_useful_size(corpus):
    examples = corpus.train + corpus.validation + corpus.test
    assert 1_500 <= len(examples) <= 4_000
    assert corpus.label_names == sorted(CHAPTERS)
    counts = collections.Counter(label for _, label in examples)
    assert set(counts) == set(range(len(corpus.label_names)))
    assert min(counts.values()) >= 60
    assert max(counts.values()) <= MAX_PER_CHAPTER


def test_texts_are_whole_clean_and_never_in_two_parts(corpus):
    texts = [text for text, _ in corpus.train + corpus.validation + corpus.test]
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert MIN_WORDS <= len(text.split()) <= MAX_WORDS
        assert ">>>" not in text
        assert "\n" not in text


def test_the_seed_decides_the_order(corpus):
    assert docstring_corpus() == corpus
    assert docstring_corpus(seed=1).train != corpus.train


def test_the_modules_name_signatures_and_doctests_are_taken_out():
    docstring = """frobnicate(x, /) -> int

    Turn the zlib stream inside out and back. Zlib does it for you.

    >>> frobnicate(1)
    2
    """
    assert clean_docstring(docstring, "zlib") == ("Turn the module stream inside out and back. module does it for you.")


def test_too_little_prose_is_nothing():
    assert clean_docstring("Return x.", "math") == ""
    assert clean_docstring("", "math") == ""
