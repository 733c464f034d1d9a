from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from browser import Page, in_browser

from bench.record import Accuracy, Ceilings, Paired, Row, Run
from bench.report import charts
from bench.report.charts import Dot, Lane, Point, Roof, log_ticks
from bench.report.markdown import safe
from bench.report.page import write_report
from bench.report.rows import error_share, reason, roof, rounds_interval, speedup, spread, strain, verdict
from bench.report.words import amount, duration, ratio, share, shorten, size, span

HOSTILE = (
    '</script><script>document.title="owned"</script><img src=x onerror=alert(1)> | `a` & "b" {{ 7 * 7 }}'
)
FINE = Accuracy("out", error=1e-7, allowed=4e-7, relative=1e-7, allowed_relative=1e-5)
BAD = Accuracy("dqkv", error=3e-6, allowed=1e-6, relative=1e-6, allowed_relative=1e-5)


def row(peer: str = "triton", seconds: tuple[float, ...] = (0.001,) * 9, **changes: Any) -> Row:
    """8,000 tokens in 1 ms, 2 GFLOP over 10 MB: 2 TFLOP/s at 200 FLOP/byte."""
    return dataclasses.replace(
        Row(
            "window_attention", "tiny", "forward", peer, "bfloat16", "16 x 16x16 map", peer == "triton", "ok",
            seconds=seconds, clock="graph", items=8000, unit="tokens", flops=2e9, bytes=1e7, peak_memory=5_000_000,
            accuracy=(FINE,),
        ),
        **changes,
    )  # fmt: skip


def make_run(rows: tuple[Row, ...], **changes: Any) -> Run:
    run = Run(
        "2026-03-14T10:21:07+00:00", "pytest bench/ --profile a100", "1a90658c0ffee", "NVIDIA A100-SXM4-80GB", "cuda",
        "a100", {"torch": "2.13.0", "triton": "3.9.0"}, Ceilings(5e10, {"bfloat16": 2e13}), rows=rows,
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def typical() -> Run:
    """Two subjects and every kind of row: ours 2 x as fast as timm and half as fast as flex, one wrong, one absent,
    one failed."""
    pairs = (Paired("timm", 0.5, 0.49, 0.51), Paired("flex", 2.0, 1.9, 2.1))
    rows = (
        row(paired=pairs),
        row("timm", (0.002,) * 9, note="compiled"),
        row("flex", (0.0005,) * 9),
        row("transformers", (), status="wrong", note="ignores the shift", accuracy=(FINE, BAD)),
        row("flash-attn", (), status="absent", note="flash-attn is not installed", accuracy=()),
        row("cudnn", (), status="failed", note="RuntimeError: no engine", accuracy=()),
        row(case="base", mode="training", seconds=(0.004,) * 9, shape=""),
        row(
            subject="data_loader",
            mode="load",
            unit="images",
            flops=0.0,
            bytes=0.0,
            peak_memory=None,
            accuracy=(),
        ),
    )
    return make_run(rows)


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


# --- rows -----------------------------------------------------------------------------------------


def test_what_counts_as_a_time() -> None:
    assert verdict(row()) == "ok" and reason(row()) == ""
    assert verdict(row(accuracy=(BAD,))) == "wrong"
    assert verdict(row(seconds=(1.0, math.nan))) == "failed"
    assert verdict(row(seconds=(), status="absent", accuracy=(BAD,))) == "absent"
    assert reason(row(seconds=(), status="absent")) == "no reason was recorded"
    assert (
        reason(row(status="wrong", accuracy=(BAD,), note="why")) == "why; dqkv: error 300% of what is allowed"
    )


def test_errors_as_a_share_of_what_is_allowed() -> None:
    assert error_share(FINE) == pytest.approx(0.25)  # 1e-7 / 4e-7 > 1e-7 / 1e-5
    assert error_share(Accuracy("x", 0.0, 0.0, 0.0, 0.0)) == 0
    assert error_share(Accuracy("x", 1e-9, 0.0, 0.0, 1.0)) == math.inf
    assert strain(row(accuracy=(FINE, BAD))) == (pytest.approx(3.0), "dqkv")
    nothing = Accuracy("nan", math.nan, 1.0, 0.0, 1.0)
    worst = strain(row(accuracy=(BAD, nothing, FINE)))
    assert worst is not None and worst[1] == "nan" and strain(row(accuracy=())) is None


def test_the_median_s_interval_is_that_of_the_sign_test() -> None:
    """Ranks from published tables: 10 rounds 2nd and 9th, 20 rounds 6th and 15th, 100 rounds 40th and 61st."""
    for n, low, high in ((2, 1, 2), (5, 1, 5), (6, 1, 6), (9, 2, 8), (10, 2, 9), (20, 6, 15), (100, 40, 61)):
        shuffled = (
            [float((7 * i) % 101) for i in range(1, 101)] if n == 100 else [float(i) for i in range(n, 0, -1)]
        )
        ordered = sorted(shuffled)
        assert rounds_interval(shuffled) == (ordered[low - 1], ordered[high - 1]), n
    assert rounds_interval([1.0]) is None
    assert spread(row(seconds=(5.0, 1.0, 4.0, 2.0, 3.0))) == pytest.approx(2 / 3)  # quartiles 2 and 4


def test_the_share_of_the_roofline() -> None:
    ceilings = Ceilings(5e10, {"bfloat16": 2e13})
    assert roof(row(), ceilings) == (pytest.approx(0.2), "memory")
    assert roof(row(bytes=1e6), ceilings) == (pytest.approx(0.1), "compute")  # 2e9 / 2e13 = 0.1 ms of 1 ms
    assert roof(row(dtype="float32"), ceilings) is None and roof(row(), None) is None


def test_speedup_is_the_paired_one() -> None:
    other = row("timm", (0.002,) * 9)
    assert speedup(row(paired=(Paired("timm", 0.4, 0.25, 0.5),)), other) == pytest.approx((2.5, 2.0, 4.0))
    mine = row(seconds=tuple(0.001 * k for k in range(1, 10)))
    theirs = row(
        "timm", tuple(0.003 * k for k in range(1, 10))
    )  # 3 x in each round, whatever the machine did
    assert speedup(mine, theirs) == pytest.approx((3, 3, 3))
    assert speedup(row(), row("timm", (0.002,))) == pytest.approx((2, 2, 2))


# --- charts ---------------------------------------------------------------------------------------


def places(svg: object, tag: str, css: str = "") -> list[dict[str, float]]:
    """Numbers among the attributes of all elements of a tag."""
    page = Page(str(svg))
    found = [a for name, a in page.tags if name == tag and css in (a.get("class") or "")]
    return [
        {k: float(v.rstrip("%")) for k, v in a.items() if v and re.fullmatch(r"-?[\d.]+%?", v)} for a in found
    ]


def dot(value: float, low: float, high: float, who: str = "x") -> Dot:
    return Dot(who, value, low, high, "", f"reads {value}", "t0", 1)


def test_equal_ratios_are_equal_distances() -> None:
    """Doubling is as far in a lane of thousands as in one of ones, and whiskers end where the interval does."""
    figure = charts.lanes(
        "t", "", [Lane("a", dots=[dot(1, 1, 1), dot(2, 2, 2)]), Lane("b", dots=[dot(1000, 500, 2000)])], str
    )
    one, two, thousand = (mark["x"] for mark in places(figure["svg"], "use"))
    whisker = places(figure["svg"], "line", "whisker")[2]
    assert (
        two - one
        == pytest.approx(whisker["x2"] - thousand, abs=0.02)
        == pytest.approx(thousand - whisker["x1"], abs=0.02)
    )
    assert thousand - one == pytest.approx(math.log(1000, 2) * (two - one), abs=0.2)
    ys = [mark["y"] for mark in places(figure["svg"], "use")]
    assert ys == sorted(set(ys))
    hover = figure["hover"]
    assert isinstance(hover, dict) and [p["text"] for p in hover["points"]] == [
        "a: reads 1", "a: reads 2", "b: reads 1000",
    ]  # fmt: skip


def test_what_has_no_logarithm_is_at_the_edge() -> None:
    figure = charts.lanes("t", "", [Lane("a", dots=[dot(0, 0, 0), dot(10, 10, 10)])], str)
    assert places(figure["svg"], "use")[0]["x"] == 0 and 40 < places(figure["svg"], "use")[1]["x"] < 60


@pytest.mark.parametrize(
    ("low", "high", "who", "expected"),
    [
        (100, 100, "short", [("end", "short 7 k")]),  # beside the mark, on the side with more room
        (1, 1, "short", [("start", "short 7 k")]),
        (40, 40, "x", [("end", "x 7 k")]),  # both have room
        (
            10,
            10,
            "a name of thirty-one characters",
            [(None, "a name of thirty-one characters"), ("start", "7 k")],
        ),
        (1, 100, "short", [(None, "short 7 k")]),  # an interval from edge to edge leaves room above only
    ],
)
def test_every_dot_has_its_name_and_its_figure(
    low: float, high: float, who: str, expected: list[tuple[str | None, str]]
) -> None:
    """One decade either way of 10, so that 10 lies in the middle."""
    frame = Lane(
        "frame", dots=[Dot("", 1, 1, 1, "", "", "frame", 0), Dot("", 100, 100, 100, "", "", "frame", 0)]
    )
    one = Lane("one", dots=[Dot(who, math.sqrt(low * high), low, high, "7 k", "", "t0", 0)])
    svg = str(charts.lanes("t", "", [frame, one], str)["svg"])
    found = re.findall(r'<text class="t0"(.*?)>(.*?)</text>', svg)
    anchors = [re.findall(r'text-anchor="(\w+)"', attributes) for attributes, _ in found]
    assert [
        (a[0] if a else None, Page(text).text) for a, (_, text) in zip(anchors, found, strict=True)
    ] == expected


def test_a_point_on_its_roof_is_drawn_on_it() -> None:
    """100 GB/s and 10 TFLOP/s meet at 100 FLOP/byte; points that reach a roof lie on its line."""
    points = [
        Point(10, 1e12, "slope", "ours", 0),
        Point(1000, 1e13, "flat", "t0", 1),
        Point(100, 1e11, "low", "t0", 1),
    ]
    figure = charts.roofline("t", "", points, [Roof("bfloat16", 1e11, 1e13)])
    slope, flat = places(figure["svg"], "line", "roof")
    assert (slope["x2"], slope["y2"]) == (flat["x1"], flat["y1"]) and flat["y1"] == flat["y2"]
    marks = {m["href"]: m for m in (a for tag, a in Page(str(figure["svg"])).tags if tag == "use")}
    assert set(marks) == {"#m0", "#m1"}
    first, low, second = (p for p in figure["hover"]["points"])  # type: ignore[index]
    share_ = (first["x"] - slope["x1"]) / (slope["x2"] - slope["x1"])
    assert first["y"] == pytest.approx(slope["y1"] + share_ * (slope["y2"] - slope["y1"]), abs=0.2)
    assert second["y"] == flat["y1"] and low["y"] > flat["y1"] and low["x"] == flat["x1"]


def test_ticks_of_a_logarithmic_axis() -> None:
    assert log_ticks(0.9, 11) == [1, 2, 5, 10]
    assert log_ticks(1, 100) == [1, 3, 10, 30, 100]
    assert log_ticks(0.5, 2000) == [1, 10, 100, 1000]
    assert log_ticks(1.9, 4.1) == [2, 3, 4]
    assert 3 <= len(log_ticks(1e-9, 1e15)) <= 9


# --- words and Markdown ---------------------------------------------------------------------------


def test_figures_are_readable() -> None:
    def plain(text: str) -> str:
        return text.replace("\N{NO-BREAK SPACE}", " ")

    seconds = [plain(duration(x)) for x in (1.2344e-3, 9.996e-4, 99.96e-6, 3.1e-8, 12.0)]
    assert seconds == ["1.23 ms", "1.00 ms", "100 µs", "31.0 ns", "12.0 s"]
    rates = [plain(amount(x, "tokens/s")) for x in (12_400_000, 999.9, 16)]
    assert rates == ["12.4 M tokens/s", "1.00 k tokens/s", "16.0 tokens/s"]
    assert plain(amount(1.2e12, "FLOP/s")) == "1.20 TFLOP/s" and plain(amount(2e6, trim=True)) == "2 M"
    assert [plain(size(x)) for x in (0, 12, 1000, 12_400_000)] == ["0 B", "12 B", "1.00 kB", "12.4 MB"]
    assert [ratio(x) for x in (0.4837, 12.34, 1234.0, 0.0321, math.nan)] == [
        "0.48×",
        "12.3×",
        "1,234×",
        "0.032×",
        "–",
    ]
    assert [share(x) for x in (0.614, 0.0345, 0.00123, 12.3, 1e-9, 0)] == [
        "61%",
        "3.5%",
        "0.12%",
        "1,230%",
        "< 0.01%",
        "0%",
    ]
    assert (
        plain(span(duration(1e-3), duration(2e-3))) == "1.00–2.00 ms" and span("1.0×", "2.0×") == "1.0–2.0×"
    )
    assert plain(span(duration(9e-4), duration(1e-3))) == "900 µs – 1.00 ms"
    assert shorten("abcdef", 4) == "abc…" and shorten("abcd", 4) == "abcd"


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
