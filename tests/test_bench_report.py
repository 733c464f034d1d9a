"""The page and the table that a run becomes; the figures in them: test_bench_figures.py."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
from bench_runs import BAD, FINE, make_run, row, typical
from browser import Page, in_browser

from bench.record import Accuracy, Ceilings, Paired, Run
from bench.report.markdown import safe
from bench.report.page import write_report
from bench.report.rows import verdict

HOSTILE = (
    '</script><script>document.title="owned"</script><img src=x onerror=alert(1)> | `a` & "b" {{ 7 * 7 }}'
)


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def classes(page: Page, tag: str) -> list[str]:
    return [attributes.get("class") or "" for name, attributes in page.tags if name == tag]


# --- the page -------------------------------------------------------------------------------------


def test_the_page_holds_what_was_measured(tmp_path: Path) -> None:
    path = write_report(typical(), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "index.html" and (path.parent / "report.md").is_file()
    text = read(path).text.replace("\N{NO-BREAK SPACE}", " ")
    for wanted in (
        "NVIDIA A100-SXM4-80GB",
        "pytest bench/ --profile a100",
        "1a90658c0ffe",
        "2026-03-14",
        "2.13.0",
        "3 cases of 2 subjects. 8 rows: 5 timed, 1 wrong, 1 failed, 1 absent.",
        "except 1 row.",  # the loader's, which carries no errors
        "ahead of the fastest other in 0 of 1 comparisons",
        "1.00 ms",
        "8.00 M tokens/s",
        "2.00 TFLOP/s",
        "20%memory",  # 10 MB at 50 GB/s take 0.2 ms of 1 ms; 2 GFLOP at 20 TFLOP/s 0.1 ms
        "5.00 MB",
        "25%out",  # 1e-7 of 4e-7
        "0.49–0.51×",
        "50.0 GB/s",
        "20.0 TFLOP/s",
        "6.4% of 312 TFLOP/s by the data sheet",  # peaks.py knows an A100
        "Forward and backward",
        "Loading",
        "compiled",
    ):
        assert wanted in text, wanted
    assert "rehearsed" not in text


def test_no_row_is_dropped(tmp_path: Path) -> None:
    """Each row is one line of a table; those without a time stand with their reason there and in their own list."""
    run = typical()
    page = read(write_report(run, tmp_path))
    lines = [name.split()[0] for name in classes(page, "tr") if name.split()[:1] and name.split()[0] in WORDS]
    listed = 3  # in "Rows without a time", after all tables
    assert sorted(lines[:-listed]) == sorted(verdict(one) for one in run.rows)
    assert sorted(lines[-listed:]) == ["absent", "failed", "wrong"]
    for why in ("ignores the shift", "flash-attn is not installed", "RuntimeError: no engine"):
        assert page.text.count(why) >= 2


WORDS = ("ok", "wrong", "absent", "failed")


def test_wrong_rows_are_unmissable_and_have_no_time(tmp_path: Path) -> None:
    """Even one that was timed, or that calls itself ok while an error is beyond its bound."""
    liar = row("liar", (0.00001,) * 9, accuracy=(FINE, BAD))
    timed = row("timed", (0.00001,) * 9, status="wrong", note="off by one")
    page = read(write_report(make_run((row(), liar, timed)), tmp_path))
    assert "banner wrong" in classes(page, "div") and "Wrong results." in page.text
    assert "liar in 1 row: dqkv: error 300% of what is allowed" in page.text
    assert "timed in 1 row: off by one" in page.text
    assert page.text.count("WRONG RESULT") == 2 + 2 + 2  # throughput, memory, table
    assert "10.0 µs" not in page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "banner wrong" not in classes(read(write_report(make_run((row(),)), tmp_path)), "div")


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    path = write_report(typical(), tmp_path)
    for _, attributes in read(path).tags:
        for name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            target = attributes.get(name)
            assert not target or target.startswith(("data:,", "#")), target
    assert re.findall(r"url\(|@import|https?:", path.read_text(encoding="utf-8")) == []


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    hostile = row(
        HOSTILE, case=HOSTILE, subject=HOSTILE, mode=HOSTILE, dtype=HOSTILE, shape=HOSTILE, note=HOSTILE, unit=HOSTILE,
        clock=HOSTILE, paired=(Paired(HOSTILE, 1.0, 0.9, 1.1),), accuracy=(dataclasses.replace(FINE, name=HOSTILE),),
    )  # fmt: skip
    wrong = dataclasses.replace(hostile, peer="w" + HOSTILE, status="wrong", ours=True)
    names = {"device": HOSTILE, "command": HOSTILE, "commit": HOSTILE, "profile": HOSTILE, "date": HOSTILE}
    run = make_run(
        (hostile, wrong), absent={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE}, rehearsed=True, **names
    )
    run = dataclasses.replace(run, ceilings=Ceilings(1e9, {HOSTILE: 1e12}))
    other = dataclasses.replace(run, device="other")
    page = read(write_report(run, tmp_path, previous=other, headline="x" + HOSTILE))
    assert page.text.count(HOSTILE) > 15
    assert not [a for _, a in page.tags if "onerror" in a or a.get("src") == "x"]
    scripts = [a for tag, a in page.tags if tag == "script"]
    assert len(scripts) == sum(a.get("type") == "application/json" for a in scripts) + 1
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<" not in re.sub(
        r"^    .*$", "", markdown, flags=re.MULTILINE
    )  # the command is an indented block
    heads = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in heads} <= {5, 10}


def test_banners_say_what_a_run_is_not(tmp_path: Path) -> None:
    here = make_run((row(),), device="AMD EPYC, 2 threads", kind="cpu")
    assert "Not run on" not in read(write_report(here, tmp_path)).text
    page = read(write_report(here, tmp_path, headline="A100-SXM4-80GB"))
    assert "Not run on A100-SXM4-80GB." in page.text and "say nothing about A100-SXM4-80GB" in page.text
    assert "Not run on A100-SXM4-80GB" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Not run on" not in read(write_report(typical(), tmp_path, headline="A100-SXM4-80GB")).text
    rehearsed = read(write_report(dataclasses.replace(here, rehearsed=True), tmp_path))
    assert "Only rehearsed." in rehearsed.text and "Not one time here is a GPU's." in rehearsed.text


@pytest.mark.parametrize(
    "run",
    [
        make_run(()),
        make_run((row(),), ceilings=None),
        make_run((row(seconds=(0.001,)),)),
        make_run((row(seconds=(math.nan, 0.1)), row("timm"))),
        make_run((row(seconds=(0.0, 0.1)), row("timm", (math.inf,)))),
        make_run((row(seconds=()), row("timm", accuracy=(dataclasses.replace(FINE, error=math.nan),)))),
        make_run((row(items=0.0, peak_memory=0), row("timm", items=math.nan, peak_memory=None))),
        make_run((row(flops=math.nan), row("timm", bytes=0.0), row("b", (1e-9,) * 9), row("c", (1e6,) * 9))),
        make_run((row(),), ceilings=Ceilings(0.0, {"bfloat16": math.nan})),
        make_run((row(), row("timm")), ceilings=Ceilings(1e9, {"bfloat16": 0.0})),
        make_run((row(paired=(Paired("timm", math.nan, math.nan, math.nan),)), row("timm", (0.002,) * 5))),
        make_run((row(accuracy=(Accuracy("out", 0.0, 0.0, 0.0, 0.0),)), row(dtype="float32"), row())),
    ],
)
def test_odd_runs_have_a_page(run: Run, tmp_path: Path) -> None:
    """Well-formed, without a figure that is none, and every row in a table or named as having no time."""
    path = write_report(
        run, tmp_path, previous=run if len({one.key for one in run.rows}) == len(run.rows) else None
    )
    page = read(path)
    lines = [one for one in classes(page, "tr") if one.split()[:1] and one.split()[0] in WORDS]
    assert len(lines) >= len(run.rows)
    for _, attributes in page.tags:
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "height"):
            assert not re.search("nan|inf", attributes.get(name) or ""), (name, attributes)
    assert not re.search(r"\bnan\b|\binf\b", page.text)
    if not run.rows:
        assert "nothing was measured" in page.text


def test_times_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    page = read(write_report(make_run((row(seconds=(math.nan, 0.1)), row("timm", ()))), tmp_path))
    assert "its times are not numbers" in page.text and "no time was recorded" in page.text


def test_changes_since_the_previous_run(tmp_path: Path) -> None:
    run = typical()
    slow = dataclasses.replace(run, date="2026-03-10", rows=tuple(r for r in run.rows if r.peer != "timm"))
    slow = dataclasses.replace(
        slow, rows=(row(seconds=(0.0008,) * 9, paired=run.rows[0].paired), *slow.rows[1:])
    )
    text = read(write_report(run, tmp_path, previous=slow)).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "Since the previous run" in text and "800 µs → 1.00 ms" in text and "Only in B: 1" in text
    assert "1.25×" in text  # 1 ms over 0.8 ms
    assert "Since the previous run" not in read(write_report(run, tmp_path)).text


def test_a_previous_run_that_can_not_be_compared_costs_no_report(tmp_path: Path) -> None:
    twice = make_run((row(), row()))
    text = read(write_report(typical(), tmp_path, previous=twice)).text
    assert (
        "A has more than one row window_attention/tiny/forward/bfloat16/triton" in text and "8 rows" in text
    )


def test_peaks_can_be_given(tmp_path: Path) -> None:
    peaks = {"copy": 1e11, "bfloat16": 4e13}
    text = read(write_report(typical(), tmp_path, peaks=peaks)).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "50% of 100 GB/s by the data sheet" in text and "50% of 40.0 TFLOP/s by the data sheet" in text
    assert "data sheet" not in read(write_report(typical(), tmp_path, peaks={})).text


# --- Markdown --------------------------------------------------------------------------------------


def test_the_markdown(tmp_path: Path) -> None:
    write_report(typical(), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    lines = text.splitlines()
    assert lines[0] == "# Benchmark: NVIDIA A100-SXM4-80GB"
    assert "> **WRONG RESULTS: 1.** They are named below and have no time." in lines
    assert "    pytest bench/ --profile a100" in lines
    timm = "| tiny | timm | 2.00 ms | 2.00–2.00 ms | 4.00 M tokens/s | 2.00× (1.96–2.04×) | 10% memory | 5.00 MB | 25% (out) |"
    assert timm in lines
    assert (
        "| tiny | **triton** | 1.00 ms | 1.00–1.00 ms | 8.00 M tokens/s |  | 20% memory | 5.00 MB | 25% (out) |"
        in lines
    )
    wrong = "| **WRONG** | Window attention: transformers | ignores the shift; dqkv: error 300% of what is allowed "
    assert wrong + "| tiny · forward · bfloat16 |" in lines
    assert (
        "| absent | Window attention: flash-attn | flash-attn is not installed | tiny · forward · bfloat16 |"
        in lines
    )
    rows = [
        dataclasses.replace(one, note="with a\nmask | a bias." if one.peer == "timm" else "")
        for one in typical().rows
    ]
    write_report(dataclasses.replace(typical(), rows=rows), tmp_path)
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines.count(r"timm: with a mask \| a bias.") == 1
    assert safe("a|b\n`c` <d> [e](f) *g* h_i") == r"a\|b \`c\` &lt;d&gt; \[e\](f) \*g\* h_i"


# --- in a browser ---------------------------------------------------------------------------------

ASK = """
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
  const read = (figure) => {
    const svg = figure.querySelector(".plot svg"), readout = figure.querySelector(".readout");
    const ring = svg.querySelector(".ring"), hint = readout.textContent;
    const key = (name) => svg.dispatchEvent(new KeyboardEvent("keydown", { key: name }));
    key("Home"); const first = readout.textContent;
    key("ArrowDown"); const second = readout.textContent;
    key("End"); const last = readout.textContent;
    svg.dispatchEvent(new Event("blur"));
    const mark = svg.querySelectorAll(".mark")[1].getBoundingClientRect();
    const middle = { clientX: mark.left + mark.width / 2, clientY: mark.top + mark.height / 2 };
    svg.dispatchEvent(new PointerEvent("pointermove", middle));
    const hover = readout.textContent, box = ring.getBoundingClientRect();
    const off = Math.hypot(box.left + box.width / 2 - middle.clientX, box.top + box.height / 2 - middle.clientY);
    svg.dispatchEvent(new Event("pointerleave"));
    return { first, second, last, hover, off, restored: hint && readout.textContent === hint };
  };
  const texts = [...document.querySelectorAll(".plot text")].map((text) => [text, text.getBoundingClientRect()]);
  const cut = texts.filter(([text, box]) => {
    const card = text.closest(".card").getBoundingClientRect();
    return box.left < card.left || box.right > card.right;
  }).map(([text]) => text.textContent);
  return {
    lanes: read(document.querySelector("#s0m0 + .plots .lanes")), roofline: read(document.querySelector(".roofline")),
    cut, marks: document.querySelectorAll(".plot .mark").length,
    names: [...document.querySelectorAll(".plot svg")].filter((svg) => svg.getAttribute("aria-label")).length,
    svgs: document.querySelectorAll(".plot svg").length,
  };
"""


def many(count: int) -> Run:
    """Many rows: cases of six implementations in three modes; one has long names, another a noise that hides all."""
    long = (
        "triton",
        "AuroraIO eager",
        "reference",
        "transformers",
        "torch DataLoader with 8 workers",
        "timm",
    )
    short = ("triton", "sdpa", "reference", "transformers", "FlexAttention", "timm")
    rows = []
    for i in range(count):
        case, place = divmod(i, 6)
        noise = [1 + 0.01 * k if case % 3 < 2 else 1.6 ** (k - 4) for k in range(9)]
        rows.append(
            row(
                (short if case % 3 else long)[place], tuple(1e-5 * (place + 1) * (case + 1) * n for n in noise),
                ours=place < 3, case=f"case-number-{case}-of-a-fairly-long-name", bytes=1e7 * (1 + case // 10),
                shape="16 x 512 queries, 50176 keys, 8 heads of 96", mode=("forward", "training", "step")[case % 3],
            )
        )  # fmt: skip
    return make_run(tuple(rows))


def test_the_page_in_a_browser(tmp_path: Path, chromium_command: list[str]) -> None:
    """Phone and desktop, with 300 rows: no sideways overflow, no cut letters, no errors, no requests, and charts
    that answer to keys and pointer."""
    run = many(300)
    path = write_report(run, tmp_path)
    assert path.stat().st_size < 1_500_000
    phone, desktop = in_browser(chromium_command, path, (390, 1280), ASK)
    assert (phone["width"], desktop["width"]) == (390, 1280)
    for answer in (phone, desktop):
        assert answer["problems"] == []
        assert answer["wanted"] <= answer["width"]
        assert answer["cut"] == []
        assert answer["requests"] == 0
        assert answer["title"] == "NVIDIA A100-SXM4-80GB · benchmark report"
        assert answer["names"] == answer["svgs"] == 10  # at a glance; three modes of three
        assert answer["marks"] == 50 + 3 * 300
        lanes, roofline = answer["lanes"], answer["roofline"]
        first = "case-number-0-of-a-fairly-long-name: triton, case-number-0-of-a-fairly-long-name, bfloat16: 10.4 µs"
        assert lanes["first"].replace("\N{NO-BREAK SPACE}", " ").startswith(first)
        assert lanes["second"] == lanes["hover"] != lanes["first"] and "AuroraIO eager" in lanes["second"]
        assert "timm" in lanes["last"] and "case-number-48" in lanes["last"]
        assert lanes["off"] < 1 and roofline["off"] < 1
        assert lanes["restored"] and roofline["restored"]
        assert "FLOP/byte" in roofline["first"] and "memory roof" in roofline["first"]


def test_the_page_in_the_dark(tmp_path: Path, chromium_command: list[str]) -> None:
    dark = [*chromium_command, "--blink-settings=preferredColorScheme=0"]
    (answer,) = in_browser(dark, write_report(typical(), tmp_path), (390,))
    brightness = [sum(map(int, re.findall(r"\d+", answer[name])[:3])) for name in ("background", "color")]
    assert brightness[0] < 150 and brightness[1] > 500
    assert answer["problems"] == [] and answer["wanted"] <= 390
