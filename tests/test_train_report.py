from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Page, in_browser
from PIL import Image

from train.evaluate.result import EvalResult, Material, Score
from train.report import write_report, write_samples
from train.report.charts import Chart, Series, moving_average, render, short, ticks
from train.report.page import _history, make_charts, read_metrics
from train.report.samples import agreement
from train.report.words import duration, number, percent, plain

HOSTILE = '</p><script>document.title="owned"</script><img src=x onerror=alert(1)> & "quotes" {{ 7 * 7 }}'
PICTURES, CAPTIONS = 24, 3


def material(pictures: int = PICTURES, size: int = 64) -> Material:
    """Pictures of noise and embeddings that retrieve most, not all, of them."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(pictures).repeat_interleave(CAPTIONS)
    image = torch.nn.functional.normalize(torch.randn(pictures, 16, generator=generator), dim=1)
    text = torch.nn.functional.normalize(
        image[owner] + 0.4 * torch.randn(len(owner), 16, generator=generator), dim=1
    )
    pixels = torch.randint(0, 256, (pictures, size, size, 3), generator=generator, dtype=torch.uint8)
    captions = [[f"caption {i} number {c} of a picture" for c in range(CAPTIONS)] for i in range(pictures)]
    captions[0] = [HOSTILE] * CAPTIONS
    captions[1][0] = "averyveryverylongword" * 12
    masks = torch.zeros(6, 2, 2, dtype=torch.bool)
    masks[:, 0, 1] = masks[:, 1, 1] = True
    return Material(
        keys=[f"heldout-000000/{i}" for i in range(pictures)],
        captions=captions,
        image_embeddings=image,
        text_embeddings=text,
        image_of_text=owner,
        generated=[HOSTILE, *(f"caption {i} of a thing" for i in range(1, pictures))],
        thumbnails=pixels,
        masks=masks,
        restored=pixels[:6],
    )


def result() -> EvalResult:
    scores = {
        f"{way}/R@{k}": Score(0.2 + k / 20, {"chance": k / 500, "shuffled": k / 480})
        for way in ("text_to_image", "image_to_text")
        for k in (1, 5, 10)
    }
    return EvalResult(
        {
            "retrieval": scores,
            "perplexity": {"perplexity": Score(4.21, {"shuffled": 31.7, "unigram": 88.3})},
            "scenes": {"f1": Score(0.91, {"shuffled": 0.3})},
            "mim": {"error": Score(0.31, {"mean_color": 0.52})},
        },
        {"images": PICTURES, "captions": PICTURES * CAPTIONS},
        material(),
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run with every file that the report reads."""
    run = tmp_path / "aurora-test"
    run.mkdir()
    lines: list[dict[str, Any]] = []
    for step in range(1, 401):
        losses = {
            name: 5 * math.exp(-step / 90) + 0.1 * math.sin(step) for name in ("mim", "itc", "caption", "mlm")
        }
        train = {
            "kind": "train",
            "step": step,
            "losses": losses,
            "loss": sum(losses.values()),
            "lr": 1e-3 / step,
        }
        lines.append(train | {"images_per_second": 200 + step % 7, "grad_norm": 1.0, "seconds": 0.3 * step})
        if step % 100 == 0:
            scores = dict.fromkeys(("text_to_image/R@1", "image_to_text/R@1", "perplexity"), step / 500)
            lines.append({"kind": "eval", "step": step, "seconds": 0.3 * step, "scores": scores})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "name": "aurora-test",
        "model": {"family": "Aurora", "size": "tiny", "parameters": 8_512_345, "image_size": 64},
        "data": {
            "train_pairs": 8000,
            "train_uncaptioned": 4000,
            "evaluation_images": PICTURES,
            "vocab_size": 712,
        },
        "steps": 400,
        "seconds": 118.2,
        "images": 51200,
        "device": "cpu (2 threads)",
        "precision": "fp32",
        "seed": 0,
        "command": "python -m train.pretrain aurora-tiny --name <x>",
        "checkpoint": "checkpoints/step-000400",
        "finished": "2026-01-31T12:00:00+00:00",
        "versions": {"auroraio": "0.1.0", "torch": "2.13.0"},
        "evaluation": result().to_json(),
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.json").write_text(json.dumps({"optim": {"lr": 0.001}, "note": HOSTILE}))
    write_samples(result(), run)
    return run


def test_the_page_holds_what_was_measured(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    for text in (
        "aurora-test",
        "8.5 million",
        "8,000 captioned and 4,000 uncaptioned pictures of 64 × 64 pixels",
        "24 held-out pictures",
        "25.0%",  # R@1
        "chance 0.20%",
        "shuffled pictures 0.21%",
        "4.21",
        "88.3",  # unigram
        "Contrastive loss",
        "Learning rate",
        "python -m train.pretrain aurora-tiny --name <x>",
        '"lr": 0.001',
    ):
        assert text in page.text, text
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) > 60 and all(p["alt"] for p in pictures)
    assert "has no" not in page.text


def test_the_page_loads_nothing(run_dir: Path) -> None:
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            target = attributes.get(name)
            assert not target or target.startswith(("data:", "#")), target
    styles = re.findall(
        r"url\(|@import", (Path(write_report.__code__.co_filename).parent / "style.css").read_text()
    )
    assert styles == []


def test_captions_are_text_and_never_markup(run_dir: Path) -> None:
    """A hostile caption appears in all places that show captions, letter by letter, and makes no element."""
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert page.text.count(HOSTILE) >= 2
    assert not [a for tag, a in page.tags if "onerror" in a or a.get("src") == "x"]
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    charts = sum(a.get("type") == "application/json" for a in scripts)
    assert len(scripts) == charts + 1


def test_missing_files_are_left_out_and_said(run_dir: Path) -> None:
    (run_dir / "samples.json").unlink()
    (run_dir / "summary.json").unlink()
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert "Left out, as the run directory has no summary.json, samples.json." in page.text
    assert "Contrastive loss" in page.text and "A caption finds its picture" not in page.text
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="neither metrics.jsonl nor summary.json"):
        write_report(run_dir)


def test_a_run_without_held_out_pictures_has_a_report(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text()) | {"evaluation": None}
    summary["data"]["evaluation_images"] = 0
    (run_dir / "summary.json").write_text(json.dumps(summary))
    (run_dir / "samples.json").unlink()
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert "How well it does" not in page.text and "All scores are on" not in page.text


def test_samples_tell_the_truth(tmp_path: Path) -> None:
    """Ranks and marks in samples.json against a plain sort of the similarities."""
    m = material()
    samples = json.loads(write_samples(result(), tmp_path).read_text())
    similarity = m.text_embeddings @ m.image_embeddings.T  # [C, I]
    flat = [caption for captions in m.captions for caption in captions]
    assert len(samples["text_to_image"]) == len(samples["image_to_text"]) == 6
    for example in samples["text_to_image"]:
        candidates = [c for c, text in enumerate(flat) if text == example["caption"]]
        orders = [similarity[c].argsort(descending=True).tolist() for c in candidates]
        assert example["top"] in [order[:5] for order in orders]
        order = next(order for order in orders if order[:5] == example["top"])
        assert order.index(example["right"]) + 1 == example["rank"]
        assert int(m.image_of_text[candidates[0]]) == example["right"]
    for example in samples["image_to_text"]:
        order = similarity[:, example["image"]].argsort(descending=True)
        assert [t["caption"] for t in example["top"]] == [flat[int(c)] for c in order[:3]]
        own = (m.image_of_text[order] == example["image"]).tolist()
        assert [t["right"] for t in example["top"]] == own[:3]
        assert example["rank"] == own.index(True) + 1
    places = [s["place"] for s in samples["generated"]]
    assert places == ["top"] * 4 + ["middle"] * 4 + ["bottom"] * 4
    scores = [s["agreement"] for s in samples["generated"]]
    assert scores == sorted(scores, reverse=True)


def test_masked_pictures_hide_what_the_mask_hides(tmp_path: Path) -> None:
    samples = json.loads(write_samples(result(), tmp_path).read_text())
    picture = base64.b64decode(samples["restored"][0]["masked"].split(",")[1])
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    assert pixels.shape == (64, 64, 4)
    assert (pixels[:, 32:] == 0).all()  # the right half is masked: transparent, and no color is left to read
    assert (pixels[:, :32, 3] == 255).all()
    assert np.array_equal(pixels[:, :32, :3], material().thumbnails[0, :, :32].numpy())  # type: ignore[index]


def test_samples_need_pictures(tmp_path: Path) -> None:
    without = dataclasses.replace(result(), material=dataclasses.replace(material(), thumbnails=None))
    with pytest.raises(ValueError, match="keep_images=True"):
        write_samples(without, tmp_path)


def test_agreement_is_word_f1_with_the_closest_caption() -> None:
    assert agreement("A dog runs.", ["a dog runs"]) == 1
    assert agreement("a dog runs", ["cats sleep", "a dog sleeps on grass"]) == pytest.approx(2 * 2 / (3 + 5))
    assert agreement("", ["a dog"]) == agreement("", [""]) == 0


def test_metrics_of_a_resumed_and_killed_run(tmp_path: Path) -> None:
    """Of a step told twice the later line counts; a last line that was cut short is left out, no other is."""
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"kind": "train", "step": s, "loss": loss} for s, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 8.5))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st')
    assert [(e["step"], e["loss"]) for e in read_metrics(path)["train"]] == [(1, 9.0), (2, 8.5), (3, 7.0)]
    path.write_text('{"kind": "tr\n' + json.dumps(lines[0]) + "\n")
    with pytest.raises(json.JSONDecodeError):
        read_metrics(path)


def test_ticks_are_round_and_cover() -> None:
    assert ticks(0, 5.2) == [0, 2, 4, 6]
    assert ticks(0, 400) == [0, 100, 200, 300, 400]
    assert ticks(0, 0.00015) == pytest.approx([0, 5e-5, 1e-4, 1.5e-4])
    assert ticks(3, 3)[0] <= 3 <= ticks(3, 3)[-1] and len(ticks(3, 3)) > 1
    assert [short(x) for x in (0, 1500, 2_000_000, 0.25, 1.5e-4)] == ["0", "1.5k", "2M", "0.25", "1.5e-4"]


def test_charts_of_long_and_of_broken_runs() -> None:
    """A hundred thousand steps become few points; NaN losses leave gaps and do not break the axes."""
    steps = [float(s) for s in range(100_000)]
    chart = render(Chart("loss", [Series("loss", steps, [1 / (1 + s) for s in steps], smooth=True)]))
    assert len(str(chart["svg"])) < 20_000
    values = [math.nan if s % 2 else 1.0 for s in range(10)]
    broken = render(Chart("loss", [Series("loss", [float(s) for s in range(10)], values)]))
    assert "nan" not in str(broken["svg"]).lower() and len(broken["hover"]["x"]) == 5  # type: ignore[index]
    assert moving_average([2.0, 2.0, 2.0]) == [2.0, 2.0, 2.0]
    noisy = [s + (-1) ** s for s in range(400)]
    assert moving_average(noisy)[200] == pytest.approx(200, abs=0.2)  # no lag


def test_scores_of_several_views_are_a_line_of_their_own() -> None:
    """They are not what the scores of one view became."""
    names = ("text_to_image/R@1", "image_to_text/R@1", "text_to_image/R@10", "image_to_text/R@10")
    told = [(100, 1, 0.2), (200, 1, 0.3), (1000, 14, 0.5)]
    lines = [{"step": step, "views": views, "scores": dict.fromkeys(names, y)} for step, views, y in told]
    charts = make_charts({"train": [], "eval": lines})
    assert [(s.name, s.x, s.y) for s in charts[0].series] == [
        ("caption → picture", [100, 200], [0.2, 0.3]),
        ("picture → caption", [100, 200], [0.2, 0.3]),
        ("caption → picture, 14 views", [1000], [0.5]),
        ("picture → caption, 14 views", [1000], [0.5]),
    ]
    assert render(charts[0])["hover"]
    assert [step for step, _ in _history(lines)["rows"]] == ["100", "200", "1,000 (14 views)"]
    for line in lines:
        del line["views"]  # of an older run
    assert [len(s.x) for s in make_charts({"train": [], "eval": lines})[0].series] == [3, 3]


def test_figures_are_readable() -> None:
    assert [percent(x) for x in (0, 0.002, 0.0345, 1)] == ["0.0%", "0.20%", "3.5%", "100.0%"]
    assert [plain(x) for x in (4.213, 31.7, 1234.5)] == ["4.21", "31.7", "1,234"]
    assert [number(x) for x in (950, 8_512_345, 3_703_100_000)] == ["950", "8.5 million", "3.7 billion"]
    spaces = [duration(x).replace("\N{NO-BREAK SPACE}", " ") for x in (0, 59.6, 118.2, 3600, 100_000)]
    assert spaces == ["0 s", "1 min 0 s", "1 min 58 s", "1 h", "1 d 3 h"]


ASK = """
  const pictures = [...document.images];
  pictures.forEach((picture) => { picture.loading = "eager"; });
  await Promise.all(pictures.map((one) => one.decode().catch(() => problems.push("picture: " + one.alt))));
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
  const svg = document.querySelector(".chart svg");
  const readout = document.querySelector(".chart .readout"), legend = readout.textContent;
  const key = (name) => svg.dispatchEvent(new KeyboardEvent("keydown", { key: name }));
  key("Home"); const first = readout.textContent;
  key("End"); const last = readout.textContent;
  svg.dispatchEvent(new Event("blur"));
  const box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2 }));
  const hover = readout.textContent;
  svg.dispatchEvent(new Event("pointerleave"));
  return {
    first, last, hover, restored: readout.textContent === legend,
    pictures: pictures.length, shown: pictures.filter((one) => one.clientWidth > 20).length,
  };
"""


def test_the_page_in_a_browser(run_dir: Path, chromium_command: list[str]) -> None:
    """Phone and desktop: no sideways overflow, no errors, all pictures show, charts answer, no requests."""
    phone, desktop = in_browser(chromium_command, write_report(run_dir), (390, 1280), ASK)
    assert (phone["width"], desktop["width"]) == (390, 1280)
    for answer in (phone, desktop):
        assert answer["problems"] == []
        assert answer["wanted"] <= answer["width"]
        assert answer["pictures"] == answer["shown"] > 60
        assert answer["requests"] == 0
        assert answer["title"].startswith("aurora-test")  # not "owned"
        assert answer["first"] == "step 100: caption → picture 20%, picture → caption 20%"
        assert answer["last"] == "step 400: caption → picture 80%, picture → caption 80%"
        assert answer["hover"].startswith("step 200:") and answer["restored"]


def test_the_page_in_the_dark(run_dir: Path, chromium_command: list[str]) -> None:
    dark = [*chromium_command, "--blink-settings=preferredColorScheme=0"]
    (answer,) = in_browser(dark, write_report(run_dir), (1280,), ASK)
    brightness = [sum(map(int, re.findall(r"\d+", answer[name])[:3])) for name in ("background", "color")]
    assert brightness[0] < 150 and brightness[1] > 500
    assert answer["problems"] == []
