"""What the benchmark's report computes and draws: rows, charts, and figures as people read them."""

from __future__ import annotations

import math
import re

import pytest
from bench_runs import BAD, FINE, row
from browser import Page

from bench.record import Accuracy, Ceilings, Paired
from bench.report import charts
from bench.report.charts import Dot, Lane, Point, Roof, log_ticks
from bench.report.rows import error_share, reason, roof, rounds_interval, speedup, spread, strain, verdict
from bench.report.words import amount, duration, ratio, share, shorten, size, span

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


# --- words ---------------------------------------------------------------------------


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
