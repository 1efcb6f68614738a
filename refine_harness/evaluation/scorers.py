"""The benchmarks' own scores of one answer, each from 0 to 1: RULER's matches and LongBench's metrics.

Each follows the benchmark's published evaluation, quirks included, because scores are only worth comparing when
they are computed alike. Where lm-eval's stock tasks differ, the docstring says so. Chinese text is cut into words by
jieba, whose dictionary decides what a word is; the version is part of the score and pinned.

Left out: which task uses which score (evaluation/niah.py, longqa.py, longbench.py).
"""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"\d+")

# LongBench's list of Chinese marks, by code point; it has the closing bracket 》 but not the opening one.
_CHINESE_MARKS = (
    "–—‘’‛“”„‟…‧、。〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿﹏"
    "！＂＃＄％＆＇（）＊＋，－／：；＜＝＞？＠［＼］＾＿｀｛｜｝～｟｠｡｢｣､"
)
_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_MARKS)


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """RULER, needles: the share of references that occur in the prediction, whatever their case."""
    found = _ruler_text(prediction)
    return sum(reference.lower() in found for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """RULER, questions: 1 if any reference occurs in the prediction, whatever its case.

    lm-eval 0.4.13 averages over the references instead, which lowers scores where there are several.
    """
    found = _ruler_text(prediction)
    return float(any(reference.lower() in found for reference in references))


def _ruler_text(prediction: str) -> str:
    return _CONTROL.sub("\n", prediction.strip()).strip().lower()


def first_line(prediction: str) -> str:
    """What LongBench scores of an answer to trec, triviaqa, samsum and lsht: its first line that is not empty.

    lm-eval stops generating at a newline instead, so that an answer that begins with one is empty.
    """
    return prediction.lstrip("\n").split("\n")[0]


def qa_f1(prediction: str, reference: str) -> float:
    """F1 of the bags of words, without case, punctuation and articles (SQuAD's)."""
    return _bag_f1(_normal(prediction).split(), _normal(reference).split())


def qa_f1_zh(prediction: str, reference: str) -> float:
    """F1 of the bags of Chinese words (jieba's), without case and punctuation."""
    return _bag_f1(_normal_words_zh(prediction), _normal_words_zh(reference))


def _bag_f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    same = sum((Counter(ours) & Counter(theirs)).values())
    if not same:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


def _normal(text: str) -> str:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))


def _normal_words_zh(text: str) -> list[str]:
    """Cut first, cleaned afterwards, as published: a mark is a word of its own and vanishes whole."""
    words = ("".join(word.lower().translate(_CHINESE_PUNCTUATION).split()) for word in words_zh(text))
    return [word for word in words if word]


def words_zh(text: str) -> list[str]:
    """The words that jieba cuts `text` into, white space and marks among them; nothing is lost.

    Raises ImportError where jieba is not installed.
    """
    return list(_jieba().cut(text, cut_all=False))


@lru_cache(maxsize=1)
def _jieba() -> Any:
    with warnings.catch_warnings():
        # Its sources hold escapes that newer Pythons warn of, and it looks for pkg_resources, which warns too.
        warnings.simplefilter("ignore")
        import jieba

    tokenizer = jieba.Tokenizer()
    # Its own loading keeps a copy in the shared temporary folder, as marshal data that it would read back from
    # whoever put it there. The dictionary takes less than a second to read.
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer


def count(prediction: str, reference: str) -> float:
    """passage_count: the share of the numbers in the prediction that are the reference; 0 without a number."""
    numbers = _NUMBER.findall(prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str, *, mark: str = "Paragraph ") -> float:
    """passage_retrieval: as `count`, for the number that follows `mark` in the reference ("Paragraph 7").

    The prediction's numbers count wherever they stand, with the mark or without. Raises ValueError for a reference
    without such a number.
    """
    found = re.search(re.escape(mark) + r"(\d+)", reference)
    if found is None:
        raise ValueError(f"{reference!r} names no paragraph; expected {mark}and a number")
    return count(prediction, found[1])


def retrieval_zh(prediction: str, reference: str) -> float:
    """passage_retrieval_zh: as `retrieval`, where references read 段落7."""
    return retrieval(prediction, reference, mark="段落")


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 / (classes named in the prediction) if the right one is among them, else 0.

    A class that is a part of the right one's name does not count against it. The published code drops such names
    while it walks over the same list, and so passes over the one after each; that is kept.
    """
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):
        if named[place] in reference and named[place] != reference:
            # The published loop removes the first equal entry and then steps on regardless.
            named.remove(named[place])
        place += 1
    return 1.0 / len(named) if reference in named else 0.0


def code_similarity(prediction: str, reference: str) -> float:
    """Similarity, in whole percent, of the reference and the first line that looks like neither comment nor Markdown.

    The published code calls fuzzywuzzy, whose ratio depends on what else is installed: difflib's, unless
    python-Levenshtein is there. LongBench's requirements do not list it, so this is difflib's; with it, scores come
    out a few points higher. An empty line counts as the first line (lm-eval 0.4.13 skips it).
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F1 of whole summaries, as the `rouge` package computes it, which LongBench uses.

    Sentences end at every full stop; words are what white space separates, with case and punctuation. For each
    sentence of the reference, the words of its longest common subsequences with the prediction's sentences are
    united, as *sets* over the whole summary, and divided by the number of *different* words on either side. This is
    neither the F1 of sequence lengths nor what the `rouge_score` package computes.

    White space at the end counts, after a full stop even as an empty word; lm-eval strips answers before.
    The package walks back recursively: where two sentences together have some thousand words outside their common
    subsequence, Python stops it and LongBench counts 0. Here there is no such bound.
    """
    ours, theirs = _sentences(prediction), _sentences(reference)
    if not ours or not theirs:
        return 0.0
    common: set[str] = set()
    for sentence in theirs:
        for candidate in ours:
            common.update(_common_words(sentence, candidate))
    precision = len(common) / len({word for sentence in ours for word in sentence})
    recall = len(common) / len({word for sentence in theirs for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_zh(prediction: str, reference: str) -> float:
    """ROUGE-L F1 of Chinese summaries: `rouge_l` of jieba's words. The Chinese full stop ends no sentence."""
    return rouge_l(" ".join(words_zh(prediction)), " ".join(words_zh(reference)))


def _sentences(text: str) -> list[list[str]]:
    # A piece of white space only is a sentence of one empty word, as in the package.
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common_words(left: Sequence[str], right: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several, the one that the package walks back to."""
    in_right = set(right)
    lengths = [[0] * (len(right) + 1)]
    for word in left:
        above = lengths[-1]
        if word not in in_right:  # most words of two summaries: their row is the one above
            lengths.append(above)
            continue
        row, longest = [0], 0
        for j, other in enumerate(right):
            if word == other:
                longest = above[j] + 1
            elif above[j + 1] > longest:
                longest = above[j + 1]
            row.append(longest)
        lengths.append(row)
    words: list[str] = []
    i, j = len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            words.append(left[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
