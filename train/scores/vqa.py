"""Visual question answering: the official accuracy of VQA v2 and OK-VQA, and the official results file.

    truth = read_truth(Path("v2_mscoco_val2014_annotations.json"))
    found = score_vqa({262148000: "down", ...}, truth)
    found.accuracy, found.per_answer_type, found.per_question[262148000]          # percent

An answer is compared with those of ten people, leaving each of them out in turn: an answer that 3 of the other nine gave
is right, 2 is 2/3, 1 is 1/3. This is not min(n / 3, 1). Before that, numbers, articles, contractions and punctuation are
made the same, unless all ten people gave the same answer: then the official code compares as is, and so does this one.
Where the official code does something odd, it is done here too, and a comment says so.

Rule: https://visualqa.org/evaluation.html and its code (GT-Vision-Lab/VQA at a013f004); Antol et al., VQA, ICCV 2015.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dataload.annotations import Question
from train.scores.results_file import ResultsFile, load_json, ordered

QuestionId = int | str
ANSWER_FIELDS = ("auto", "answer", "raw_answer")

_NUMBERS = {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = (
    32  # the official code hands re.UNICODE, which is 32, to the argument that counts replacements
)
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's "
    "how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock "
    "oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd "
    "someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's "
    "they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all "
    "y'all'll y'all'd've you'd you'd've you'll you're you've"
).split()


def _spellings() -> dict[str, str]:
    """A contraction that lost one of its apostrophes -> the whole one."""
    found = {
        word[:place] + word[place + 1 :]: word
        for word in _CONTRACTIONS
        for place, letter in enumerate(word)
        if letter == "'"
    }
    return found | {"somebody'd": "somebodyd"}  # the official table has this one the other way round


_SPELLINGS = _spellings()


@dataclass(frozen=True)
class Truth:
    """What people answered to one question."""

    answers: tuple[str, ...]
    question_type: str = ""
    answer_type: str = ""


@dataclass(frozen=True)
class VqaScores:
    """Accuracies in percent, not rounded (the official code prints two decimals)."""

    accuracy: float
    per_answer_type: dict[str, float]
    per_question_type: dict[str, float]
    per_question: dict[QuestionId, float]
    counts: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """For a results file, without the single questions."""
        return {
            "accuracy": self.accuracy,
            "per_answer_type": self.per_answer_type,
            "per_question_type": self.per_question_type,
            "counts": self.counts,
        }


@lru_cache(maxsize=1 << 17)  # the same few answers come again and again
def normalize(answer: str) -> str:
    """An answer as the official code compares it: small letters, digits for numbers up to ten, no articles, no
    punctuation, apostrophes back in contractions."""
    joined = _COMMA_IN_NUMBER.search(answer) is not None
    text = answer
    for sign in _PUNCTUATION:
        # A sign beside a space goes, and so do all signs of an answer with a number such as 1,000; others become spaces.
        alone = sign + " " in answer or " " + sign in answer
        text = text.replace(sign, "" if alone or joined else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, people: Iterable[str]) -> float:
    """Official accuracy of one answer, 0 to 1. ValueError where nobody answered."""
    answer, given = _plain(answer), [_plain(one) for one in people]
    if not given:
        raise ValueError("VQA accuracy needs the answers of people")
    if len(set(given)) > 1:
        answer, given = normalize(answer), [normalize(one) for one in given]
    same = sum(one == answer for one in given)
    # Leaving one out who said the same leaves one fewer.
    return (same * min(1.0, (same - 1) / 3) + (len(given) - same) * min(1.0, same / 3)) / len(given)


def _plain(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def score_vqa(answers: Mapping[QuestionId, str], truth: Mapping[QuestionId, Truth]) -> VqaScores:
    """Scores one answer per question. ValueError where the questions are not the same ones, or there is none."""
    if not truth:
        raise ValueError("there are no questions to score")
    unknown = [number for number in answers if number not in truth]
    missing = [number for number in truth if number not in answers]
    if unknown or missing:
        raise ValueError(
            f"answers and annotations do not fit: {len(missing):,} of {len(truth):,} questions have no answer, "
            f"{len(unknown):,} of {len(answers):,} answers belong to no question; the first is {(missing or unknown)[0]!r}"
        )
    found = {number: 100 * accuracy(answers[number], truth[number].answers) for number in ordered(truth)}
    by_answer: dict[str, list[float]] = {}
    by_question: dict[str, list[float]] = {}
    for number, value in found.items():
        by_answer.setdefault(truth[number].answer_type, []).append(value)
        by_question.setdefault(truth[number].question_type, []).append(value)
    counts = {"questions": len(found), "answers": sum(len(one.answers) for one in truth.values())}
    return VqaScores(_mean(list(found.values())), _means(by_answer), _means(by_question), found, counts)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _means(parts: dict[str, list[float]]) -> dict[str, float]:
    return {name: _mean(values) for name, values in sorted(parts.items())}


def best_constant(
    truth: Mapping[QuestionId, Truth], candidates: Iterable[str] | None = None
) -> tuple[str, float]:
    """(answer, accuracy in percent) of the one answer that does best on all questions: what a model has to beat.

    candidates: answers to try; None = the hundred that people gave most often."""
    if candidates is None:
        counts: dict[str, int] = {}
        for one in truth.values():
            for answer in one.answers:
                counts[answer] = counts.get(answer, 0) + 1
        candidates = sorted(counts, key=lambda answer: (-counts[answer], answer))[:100]
    scored = ((score_vqa(dict.fromkeys(truth, answer), truth).accuracy, answer) for answer in candidates)
    best, answer = max(scored, key=lambda pair: pair[0])
    return answer, best


# --- official files ------------------------------------------------------------------------------------------


def truth_of(questions: Iterable[Question], field: str = "auto") -> dict[QuestionId, Truth]:
    """People's answers of packed questions, by id; `field` as in `read_truth`. ValueError where one has none, or comes
    twice."""
    found: dict[QuestionId, Truth] = {}
    for one in questions:
        answers = one.answers
        if field == "answer" or (field == "auto" and one.stemmed_answers):
            answers = one.stemmed_answers or one.answers
        if not answers:
            raise ValueError(f"question {one.question_id} has no answers: a test split cannot be scored here")
        if one.question_id in found:
            raise ValueError(f"question {one.question_id} comes twice: the same samples in two shards?")
        found[one.question_id] = Truth(answers, one.question_type, one.answer_type)
    return found


def read_truth(annotations: Path, field: str = "auto") -> dict[QuestionId, Truth]:
    """People's answers by question id, from an official annotations file (also .gz).

    field: OK-VQA's annotations have a stemmed "answer" and a "raw_answer"; its official score compares with "answer",
    which is what "auto" takes. VQA v2 has "answer" alone. Raises OSError, and ValueError for another file.
    """
    if field not in ANSWER_FIELDS:
        raise ValueError(f"no field of answers is called {field!r}; there are {', '.join(ANSWER_FIELDS)}")
    name = "answer" if field == "auto" else field
    try:
        found: dict[QuestionId, Truth] = {}
        for entry in load_json(annotations)["annotations"]:
            answers = tuple(str(one[name]) for one in entry["answers"])
            found[entry["question_id"]] = Truth(
                answers, str(entry.get("question_type", "")), str(entry.get("answer_type", ""))
            )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{annotations} is no file of VQA annotations, {{"annotations": [{{"question_id", "answers": [{{"{name}"}}]}}]}}: '
            f"{type(error).__name__}: {error}"
        ) from None
    return found


RESULTS = ResultsFile(
    "VQA results file",
    "question_id",
    "answer",
    '[{"question_id": 262148000, "answer": "down"}]',
    "questions have more than one answer",
)
write_results, read_results = RESULTS.write, RESULTS.read
