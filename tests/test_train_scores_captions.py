"""Caption scores against the values of the reference implementations, and everything that can go wrong around Java."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.scores import captioning, java
from train.scores.captioning import (
    CaptionScorer,
    CaptionScores,
    check,
    read_results,
    score_captions,
    write_results,
)
from train.scores.cider import CiderD

NEEDS_JAVA = "needs Java: apt-get install default-jre-headless"
WITHOUT_JAVA = [name for name in captioning.METRICS if name not in ("METEOR", "SPICE")]
CANDIDATES = {7: "A dog runs.", 9: "Two men's hats", 30: "a red bus"}
REFERENCES = {
    7: ["a dog is running", "the dog runs fast"],
    9: ["two men wear hats"],
    30: ["a bus that is red", "the red bus stops", "a bus"],
}


@pytest.fixture(scope="module")
def scorer() -> CaptionScorer:
    """For all tests that need Java."""
    if shutil.which("java") is None:
        pytest.skip(NEEDS_JAVA)
    return CaptionScorer(check())


def oracle(real_data: Path, *names: str) -> Any:
    found = json.loads((real_data / "oracles" / "expected.json").read_text())
    for name in names:
        found = found[name]
    return found


def leave_one_out(file: Path) -> tuple[dict[Any, str], dict[Any, list[str]]]:
    """The caption with the lowest annotation id against the image's other four."""
    captions: dict[Any, list[str]] = {}
    for note in sorted(json.loads(file.read_text())["annotations"], key=lambda note: note["id"]):
        captions.setdefault(note["image_id"], []).append(note["caption"])
    return {n: texts[0] for n, texts in captions.items()}, {n: texts[1:] for n, texts in captions.items()}


def fakecap(real_data: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    entries = json.loads((real_data / "oracles" / "coco_fakecap_1k.json").read_text())
    return {e["image_id"]: e["test"] for e in entries}, {e["image_id"]: e["refs"] for e in entries}


@pytest.fixture(scope="module")
def coco_example(real_data: Path) -> CaptionScores:
    """The 1,000 captions that come with coco-caption, which are tokens already, without METEOR."""
    return score_captions(*fakecap(real_data), check(WITHOUT_JAVA, tokenizer="none"))


@pytest.mark.slow
def test_every_caption_oracle_to_its_digits(
    real_data: Path, scorer: CaptionScorer, coco_example: CaptionScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but SPICE, which is null with its reason. One process of METEOR serves three sets."""
    humans = oracle(real_data, "human_leave_one_out")
    sets = {
        "coco_mini": leave_one_out(real_data / "coco_mini" / "captions.json"),
        "flickr8k_2000": leave_one_out(real_data / "flickr8k_2000" / "captions_coco.json"),
    }
    for name, (candidates, references) in sets.items():
        found = scorer.score(candidates, references)
        assert found.counts["images"] == humans[name]["images"] == len(found.per_image)
        wanted = {key: value for key, value in humans[name].items() if key in captioning.METRICS}
        assert len(wanted) == 7
        assert {key: found.scores[key] for key in wanted} == pytest.approx(wanted, abs=1e-12)
        assert found.scores["SPICE"] is None and "stanford-corenlp-3.6.0.jar" in found.reasons["SPICE"]
        assert found.tokenizer == "ptb"
    # coco-caption's own example: as it is, and by the PTB tokenizer once more, which changes CIDEr alone
    candidates, references = fakecap(real_data)
    monkeypatch.setattr(scorer, "plan", check(["METEOR"], tokenizer="none"))
    meteor = scorer.score(candidates, references).scores
    scores = {**coco_example.scores, **meteor}
    assert scores == pytest.approx(oracle(real_data, "coco_fakecap_1k", "no_second_ptb_pass"), abs=1e-12)
    again = score_captions(candidates, references, check(["CIDEr"], tokenizer="ptb")).scores["CIDEr"]
    assert again == pytest.approx(
        oracle(real_data, "coco_fakecap_1k", "with_second_ptb_pass", "CIDEr"), abs=1e-12
    )
    published = {k: v for k, v in oracle(real_data, "coco_fakecap_1k", "published").items() if k != "SPICE"}
    assert scores == pytest.approx(published, abs=6e-4), "in three digits"


def test_a_reward_is_the_official_score_with_counts_that_are_kept(
    real_data: Path, coco_example: CaptionScores
) -> None:
    candidates, references = fakecap(real_data)
    cider = CiderD(references.values())
    ids = list(candidates)[:100]
    mine = cider([candidates[i] for i in ids], [[cider.weigh(t) for t in references[i]] for i in ids])
    assert mine == pytest.approx([coco_example.per_image[i]["CIDEr"] for i in ids], abs=1e-12)
    part = cider([candidates[i] for i in ids[:7]], [references[i] for i in ids[:7]])
    assert np.array_equal(part, mine[:7]), "whatever the batch"


def test_cider_of_shards_is_another_number(real_data: Path) -> None:
    candidates, references = leave_one_out(real_data / "coco_mini" / "captions.json")
    ids, plan = list(candidates), check(["CIDEr"], tokenizer="regex")
    whole = score_captions(candidates, references, plan).scores["CIDEr"]
    parts = [
        score_captions({i: candidates[i] for i in part}, {i: references[i] for i in part}, plan).scores[
            "CIDEr"
        ]
        for part in (ids[:40], ids[40:80], ids[80:])
    ]
    assert abs(np.mean(parts) - whole) > 0.03


def test_the_fallback_without_java_is_close_and_says_what_it_is(
    real_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    plan = check()
    assert plan.tokenizer == "regex" and set(plan.reasons) == {"METEOR", "SPICE"}
    assert (
        "apt-get install default-jre-headless" in plan.reasons["METEOR"] and "not by the PTB" in plan.notes[0]
    )
    candidates, references = leave_one_out(real_data / "coco_mini" / "captions.json")
    found = score_captions(candidates, references, plan)
    wanted = oracle(real_data, "human_leave_one_out", "coco_mini")
    for name in WITHOUT_JAVA:
        assert found.scores[name] == pytest.approx(wanted[name], abs=2e-3)
    assert found.scores["CIDEr"] != wanted["CIDEr"]
    assert found.scores["METEOR"] is None and found.tokenizer == "regex (not PTB)"
    json.dumps(found.to_json())
    with pytest.raises(ValueError, match="the PTB tokenizer needs Java"):
        check(tokenizer="ptb")


def test_white_space_and_signs_that_shift_lines(scorer: CaptionScorer) -> None:
    odd = [
        "one\rtwo",
        "three\x0bfour",
        "five\u2028six",
        "",
        "...",
        "seven\u00a0\x85eight",
        "d\ud83d",
        "Zoë's 😀 café",
    ]
    lines = scorer.tokenize([*odd, "the end"])
    assert lines[:4] == ["one two", "three four", "five six", ""]
    assert lines[5] == "seven eight" and lines[-1] == "the end" and len(lines) == 9
    assert lines[7] == "zoë 's café", "whatever the locale is"


def test_captions_that_vanish_or_hold_the_separator(scorer: CaptionScorer) -> None:
    """Punctuation alone is no token; "|||" separates the fields of METEOR's protocol."""
    found = scorer.score({1: "...", 2: "a ||| dog"}, {1: ["a cat", "!"], 2: ["a dog ||| runs"]})
    assert found.per_image[1]["METEOR"] == 0 and found.per_image[2]["METEOR"] > 0.3


def test_the_regex_tokenizer_by_hand() -> None:
    said = captioning.regex_tokenize(
        "A man's dog, which doesn't bark (much) -- 1,000 black-and-white dogs..."
    )
    assert said == "a man 's dog which does n't bark much 1,000 black-and-white dogs"


def test_what_does_not_fit_is_refused_with_counts() -> None:
    plan = check(["CIDEr"], tokenizer="none")
    with pytest.raises(
        ValueError, match=r"1 of 2 captions have no references, 2 of 3 images have no caption"
    ):
        score_captions({7: "a", 8: "b"}, REFERENCES, plan)
    with pytest.raises(ValueError, match="1 images have no reference"):
        score_captions({7: "a"}, {7: [" "]}, plan)
    with pytest.raises(ValueError, match="no captions"):
        score_captions({}, {}, plan)
    with pytest.raises(ValueError, match=r"no caption score is called 'BLEU'"):
        check(["BLEU"])
    with pytest.raises(ValueError, match="no tokenizer is called"):
        check(tokenizer="bert")


def test_one_image_has_no_cider_and_is_told() -> None:
    found = score_captions({1: "a dog"}, {1: ["a dog"]}, check(["CIDEr", "Bleu_1"], tokenizer="none"))
    assert found.scores["CIDEr"] == 0 and "of one image" in found.notes[0]
    assert found.scores["Bleu_1"] == pytest.approx(1)


def test_the_order_of_the_images_does_not_matter() -> None:
    plan = check(WITHOUT_JAVA, tokenizer="regex")
    first = score_captions(CANDIDATES, REFERENCES, plan)
    order = list(CANDIDATES)
    random.Random(1).shuffle(order)
    assert score_captions({i: CANDIDATES[i] for i in order}, REFERENCES, plan).scores == first.scores


def test_spice_is_asked_for_jars_before_any_work(tmp_path: Path) -> None:
    if shutil.which("java") is None:
        pytest.skip(NEEDS_JAVA)
    with pytest.raises(
        ValueError, match="lacks stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar"
    ):
        check(spice_jars=tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        check(spice_jars=tmp_path / "gone")
    for name in java.SPICE_JARS:
        (tmp_path / name).write_bytes(b"no jar")
    plan = check(["SPICE"], tokenizer="none", spice_jars=tmp_path)
    assert not plan.reasons
    # Java really starts SPICE, which misses CoreNLP's classes: its own words are in the reason, and the rest is scored.
    plan = check(["SPICE", "CIDEr"], tokenizer="none", spice_jars=tmp_path)
    found = score_captions(CANDIDATES, REFERENCES, plan)
    assert found.scores["SPICE"] is None and "edu/stanford/nlp" in found.reasons["SPICE"]
    without = score_captions(CANDIDATES, REFERENCES, check(["CIDEr"], tokenizer="none"))
    assert found.scores["CIDEr"] == without.scores["CIDEr"] != 0
    assert all(set(one) == {"CIDEr"} for one in found.per_image.values())


FAKE_JAVA = """#!{python}
import json, sys
words = sys.argv[1:]
if words == ["-version"]:
    sys.exit(print('openjdk version "17"', file=sys.stderr))
assert "edu.anu.spice.SpiceScorer" in words and "-cache" not in words and "-Xmx8G" in words, words
given = json.load(open(words[words.index("edu.anu.spice.SpiceScorer") + 1]))
scores = [{{"image_id": one["image_id"], "scores": {{"All": {{"f": len(one["refs"]) / 10}}}}}} for one in reversed(given)]
json.dump(scores, open(words[words.index("-out") + 1], "w"))
"""


def test_spice_scores_find_their_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A java that answers as SPICE does, in another order: CoreNLP's models are not at hand here."""
    import sys

    program = tmp_path / "bin" / "java"
    program.parent.mkdir()
    program.write_text(FAKE_JAVA.format(python=sys.executable))
    program.chmod(0o755)
    for name in java.SPICE_JARS:
        (tmp_path / name).touch()
    monkeypatch.setenv("PATH", str(program.parent))
    found = score_captions(CANDIDATES, REFERENCES, check(["SPICE"], tokenizer="none", spice_jars=tmp_path))
    assert found.scores["SPICE"] == pytest.approx((0.2 + 0.1 + 0.3) / 3)
    assert [found.per_image[i]["SPICE"] for i in (7, 9, 30)] == [0.2, 0.1, 0.3]


def test_a_java_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "java"
    program.write_text(
        '#!/bin/sh\n[ "$1" = -version ] && { echo version >&2; exit; }\necho out of memory >&2\nexit 1\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(java.JavaError, match=r"(?s)the PTB tokenizer ended with 1 .* out of memory"):
        score_captions(CANDIDATES, REFERENCES, check(["CIDEr"], tokenizer="ptb"))


def test_a_java_that_fails_loses_its_own_scores_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there when the plan is made, and dies when it is needed, after the model has run."""
    program = tmp_path / "java"
    program.write_text(
        '#!/bin/sh\n[ "$1" = -version ] && { echo version >&2; exit; }\necho out of memory >&2\nexit 1\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for name in java.SPICE_JARS:
        (tmp_path / name).touch()
    found = score_captions(CANDIDATES, REFERENCES, check(spice_jars=tmp_path))
    assert set(found.reasons) == {"METEOR", "SPICE"}
    assert all("out of memory" in reason for reason in found.reasons.values())
    assert found.tokenizer == captioning.NOT_PTB and "out of memory" in found.notes[0]
    rest = score_captions(CANDIDATES, REFERENCES, check(WITHOUT_JAVA, tokenizer="regex"))
    assert {name: value for name, value in found.scores.items() if value is not None} == rest.scores


def test_results_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, {391895: "a man", 42: "zwei Hünde"})
    assert json.loads(path.read_text())[0] == {"image_id": 42, "caption": "zwei Hünde"}
    assert read_results(path) == {42: "zwei Hünde", 391895: "a man"}
    path.write_text('[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]')
    with pytest.raises(ValueError, match="1 images have more than one caption"):
        read_results(path)
    path.write_text('{"1": "a"}')
    with pytest.raises(ValueError, match="no results file of COCO captions"):
        read_results(path)


def test_cider_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one image"):
        CiderD([])
    cider = CiderD([["a dog"], ["a cat"]])
    with pytest.raises(ValueError, match="2 captions, but references for 1"):
        cider(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="1 captions have no reference"):
        cider(["a", "b"], [["a"], []])
