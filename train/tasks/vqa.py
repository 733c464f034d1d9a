"""Visual question answering: the answer is written by the text stack, or chosen among frequent ones; official accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataload.annotated import Item, Items, Maker, TaskBatch
from dataload.annotations import Annotations, Question
from dataload.images import mirror_caption, normalize
from dataload.tokenizer import BOS, EOS, Tokenizer
from dataload.views import squashed_view, training_view
from models.answering import Chooser
from models.base import new_base
from models.generation import generate
from models.tokens import IGNORE
from models.writing import Writer
from train.config import ConfigError
from train.evaluate.result import Score
from train.generate.writing import KnownPieces
from train.scores.vqa import Truth, best_constant, score_vqa, truth_of
from train.scores.vqa import accuracy as official
from train.scores.vqa import normalize as plain
from train.tasks.base import Example, Prediction, TaskResult, item_of
from train.tasks.config import FinetuneConfig, TaskConfig
from train.tasks.detection import view_of


def longest_answer(length: int) -> int:
    """Tokens of a written answer, its end included, where prompt and answer have `length` together."""
    return min(8, length // 3)


class QuestionAnswering:
    """An item is one question."""

    name, media = "vqa", "image"
    families: tuple[str, ...] = ("Aurora", "PerceiverIO")
    needs: tuple[str, ...] = ("questions",)
    ragged: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def parts(self, one: Annotations) -> int:
        return len(one.questions)

    def learnable(self, one: Annotations, part: int) -> bool:
        """Whether a question can be learned from: somebody answered it."""
        return bool(one.questions[part].answers)

    def complete(self, task: TaskConfig, items: Items) -> TaskConfig:
        """A classifier's answers: the most frequent ones of the training questions, where the task names none. Raises
        ConfigError where none of the task's is an answer to a training question."""
        if task.head == "written":
            return task
        questions = [question for one in items.all() for question in one.questions]
        counts = Counter(plain(answer) for question in questions for answer in given(question))
        if not task.classes:
            return replace(task, classes=spelled(questions, counts.most_common(task.answers)))
        if not counts.keys() & set(map(plain, task.classes)):
            common = ", ".join(repr(answer) for answer, _ in counts.most_common(12))
            raise ConfigError(
                f"task.classes: no training question has one of these {len(task.classes)} answers; common ones are {common}"
            )
        return task

    def model(self, config: FinetuneConfig) -> nn.Module:
        if config.task.head == "chosen":
            return Chooser(new_base(config.model), len(config.task.classes))
        return Writer(new_base(config.model))

    def maker(self, config: FinetuneConfig, tokenizer: Tokenizer) -> Maker:
        size, length, view_config = config.model.image_size, config.model.text_length, view_of(config)
        classes = config.task.classes
        chosen = config.task.head == "chosen"

        def make(items: Items, item: Item, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
            encoded = items.index.image(item.sample)
            question = items.annotations(item).questions[item.part]
            if rng is None:
                view = squashed_view(encoded, size, config.data.interpolation)
            else:
                view = training_view(encoded, view_config, rng)

            def said(text: str) -> str:
                return mirror_caption(text) if view.flipped else text

            ids = tokenizer.encode(asked(said(question.question), config.task))
            if chosen:
                made = {"images": view.pixels, "tokens": tokenizer.row(ids, length)}
                if rng is not None:
                    made["scores"] = worth(question, classes, said)
                return made
            if rng is None:
                return {"images": view.pixels, "tokens": tokenizer.row(ids, length - longest_answer(length))}
            answer = said(question.answers[int(rng.integers(len(question.answers)))])
            tokens, targets = written(ids, tokenizer.encode(answer), length)
            return {"images": view.pixels, "tokens": tokens, "targets": targets}

        return make

    def counts(self, batch: TaskBatch, config: FinetuneConfig) -> Sequence[float]:
        if config.task.head == "chosen":
            return [float(len(batch))]
        return [float((batch["targets"][:, 1:] != IGNORE).sum())]

    def forward(
        self, module: nn.Module, batch: TaskBatch, config: FinetuneConfig, shares: Sequence[float]
    ) -> dict[str, Tensor]:
        images = normalize(batch["images"])
        losses: dict[str, Tensor]
        if config.task.head == "chosen":
            losses = module(images, batch["tokens"], batch["scores"], shares[0])
        else:
            losses = module(
                images, batch["tokens"], batch["targets"], shares[0], config.objectives.label_smoothing
            )
        return losses

    def predict(
        self, model: Any, batch: TaskBatch, items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> list[Prediction]:
        images = normalize(batch["images"])
        if config.task.head == "chosen":
            best = model.answers(images, batch["tokens"]).argmax(1).tolist()
            answers = [config.task.classes[i] for i in best]
        else:
            base = model.base
            answers = write(base, base.image_memory(images), batch["tokens"], config, tokenizer)
        return [Prediction(number, answer) for number, answer in zip(batch.items, answers, strict=True)]

    def score(
        self, predictions: Sequence[Prediction], items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> TaskResult:
        questions = [
            items.annotations(item_of(items, one)).questions[item_of(items, one).part] for one in predictions
        ]
        # question ids are unique within the official sets; others may number each picture's anew
        unique = len({q.question_id for q in questions}) == len(questions)
        submission = [
            {"question_id": q.question_id, "answer": one.value}
            for q, one in zip(questions, predictions, strict=True)
        ]
        files = {"vqa_results.json": submission}
        about: dict[str, Any] = {"prompt": config.task.prompt, "head": config.task.head}
        if not any(q.answers for q in questions):
            reason = "the questions come without answers (a test split): hand in vqa_results.json"
            about["not_scored"] = {"accuracy": reason}
            return TaskResult(self.name, {}, {"questions": len(questions)}, about=about, files=files)
        about["questions_without_answers"] = sum(not q.answers for q in questions)
        predictions = [one for one, q in zip(predictions, questions, strict=True) if q.answers]
        questions = [q for q in questions if q.answers]
        keyed = (
            questions
            if unique
            else [replace(q, question_id=one.item) for q, one in zip(questions, predictions, strict=True)]
        )
        truth = truth_of(keyed)
        said = {q.question_id: str(one.value) for q, one in zip(keyed, predictions, strict=True)}
        found = score_vqa(said, truth)
        constant = best_constant(truth)
        baselines = {
            f"always {constant[0]!r}": constant[1] / 100,
            BY_QUESTION: by_question(keyed, truth),
        }
        scores = {"accuracy": Score(found.accuracy / 100, baselines)}
        scores |= {f"accuracy, {kind}": Score(v / 100) for kind, v in found.per_answer_type.items() if kind}
        examples = [
            Example(
                one.item,
                found.per_question[q.question_id] / 100,
                [("asked", q.question), ("said", str(one.value)), ("people", people(truth[q.question_id]))],
            )
            for q, one in zip(keyed, predictions, strict=True)
        ]
        examples.sort(key=lambda one: one.score)
        table = {kind: v / 100 for kind, v in found.per_question_type.items() if kind}
        return TaskResult(self.name, scores, dict(found.counts), examples, table, about, files)


def asked(question: str, task: TaskConfig) -> str:
    """What the text stack reads."""
    return task.prompt.replace("{question}", question) if task.prompt else question


def written(prompt: Sequence[int], answer: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, targets) int64 [length]: BOS prompt EOS answer EOS, of which the answer and its end are to be predicted. A long
    prompt is cut at its end, a long answer too."""
    answer = [*answer[: longest_answer(length) - 1], EOS]
    prompt = [BOS, *prompt[: length - 2 - len(answer)], EOS]
    tokens, targets = np.zeros(length, np.int64), np.full(length, IGNORE, np.int64)
    end = len(prompt) + len(answer)
    tokens[:end] = [*prompt, *answer]
    targets[len(prompt) : end] = answer
    return tokens, targets


def write(
    base: Any, memory: Tensor, tokens: Tensor, config: FinetuneConfig, tokenizer: Tokenizer,
    longest: int | None = None,
) -> list[str]:  # fmt: skip
    """Written answers to prompts int64 [B, T] (BOS prompt EOS, padded): those of one length go together. longest: tokens of
    an answer at most, its end included (None: `longest_answer`)."""
    if longest is None:
        longest = longest_answer(config.model.text_length)

    lengths = (tokens != 0).sum(1)
    answers = [""] * len(tokens)
    speaker = KnownPieces(base, tokenizer)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        ids = generate(
            speaker,
            memory[rows],
            method="beam" if config.task.beams > 1 else "greedy",
            beams=config.task.beams,
            length_penalty=config.task.length_penalty,
            max_length=length + longest,
            prompt=tokens[rows, :length],
        )
        for row, one in zip(rows.tolist(), ids, strict=True):
            answers[row] = tokenizer.decode(one).strip()
    return answers


def worth(question: Question, classes: tuple[str, ...], said: Callable[[str], str]) -> np.ndarray:
    """float32 [C]: the official accuracy of each answer that people gave and that can be chosen."""
    numbers, scores = numbered(classes), np.zeros(len(classes), np.float32)
    people = [said(answer) for answer in given(question)]
    for answer in set(people):
        number = numbers.get(answer.strip(), numbers.get(plain(answer)))
        if number is not None:
            scores[number] = official(answer, people)
    return scores


@lru_cache(maxsize=4)
def numbered(classes: tuple[str, ...]) -> dict[str, int]:
    """An answer as it is written among the classes, or normalised -> its number."""
    normal: dict[str, int] = {}
    for i, answer in enumerate(classes):
        normal.setdefault(plain(answer), i)
    return normal | {answer: i for i, answer in enumerate(classes)}


def given(question: Question) -> tuple[str, ...]:
    """The answers of people that the official rule compares with: OK-VQA's are stemmed."""
    return question.stemmed_answers or question.answers


def spelled(questions: Sequence[Question], answers: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """Normalised answers as people spell them. Where all people gave the same, the official rule compares as is, so the
    spelling that most of such questions have is taken ("two", not "2"); elsewhere it normalises, and any will do."""
    alike, all_of = Counter[str](), Counter[str]()
    for question in questions:
        people = [answer.strip() for answer in given(question)]
        all_of.update(people)
        if len(set(people)) == 1:
            alike[people[0]] += 1
    best: dict[str, str] = {}
    for answer in sorted(all_of, key=lambda one: (-alike[one], -all_of[one], one)):
        best.setdefault(plain(answer), answer)
    return tuple(best[answer] for answer, _ in answers)


BY_QUESTION = "the best answer to each question's text, by the scored answers themselves"


def by_question(questions: Sequence[Question], truth: Mapping[Any, Truth]) -> float:
    """Accuracy of the best answer to each question text, without a look at the picture: what habit can reach at most. The
    answers are chosen by the people's answers that they are scored on, so that no model can really know them all."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.question, []).append(question)
    total = 0.0
    for group in groups.values():
        ids = {q.question_id: truth[q.question_id] for q in group}
        total += best_constant(ids)[1] / 100 * len(group)
    return total / len(questions)


def people(truth: Truth) -> str:
    """The answers with how many gave each."""
    counts: Iterable[tuple[str, int]] = Counter(truth.answers).most_common(4)
    return ", ".join(f"{answer} ({count})" for answer, count in counts)


def prompt_tokens(question: str, config: FinetuneConfig, tokenizer: Tokenizer) -> Tensor:
    """int64 [1, P] of one question, for a written answer: BOS prompt EOS."""
    length = config.model.text_length
    ids = tokenizer.encode(asked(question, config.task))[: length - longest_answer(length) - 2]
    return torch.tensor([[BOS, *ids, EOS]])
