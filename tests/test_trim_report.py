"""The report of a trim: every form of it tells the same, holds what is hostile as text, and is readable."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import torchtrim as tt
from torchtrim.bench.machine import machine
from torchtrim.errors import InputError
from torchtrim.report.trim_charts import Scale, curve_charts, front_chart
from torchtrim.report.trim_page import parts
from torchtrim.report.trim_report import CandidateRow, EditRow, LayerRow, Limit, Stage, TrimReport
from torchtrim.search.sensitivity import Point, Sensitivity

ROOT = Path(__file__).parent.parent
HOSTILE = "<script>alert(1)</script><img src=x onerror=y> \"q\" 'a' | `code` *b* __c__ &amp; \x00\udcff😀\nnext"
X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
VOID = {"meta", "input", "br", "img", "link", "hr"}


class Unit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.act(self.conv1(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.units = nn.Sequential(Unit(16), Unit(16), Unit(16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.units(self.stem(x)).relu().mean((2, 3)))


def leaves(found: tt.Summary) -> dict[str, Any]:
    paths = [row.path for row in found.rows]
    return {
        row.path: row for row in found.rows if not any(path.startswith(f"{row.path}.") for path in paths) and row.path
    }


def layer_rows(before: tt.Summary, after: tt.Summary) -> tuple[LayerRow, ...]:
    """What became of each layer of a real edit."""
    olds, news = leaves(before), leaves(after)
    rows = []
    for path in dict.fromkeys([*olds, *news]):
        old, new = olds.get(path), news.get(path)
        state = "removed" if new is None else "added" if old is None else "kept" if old == new else "thinned"
        numbers = [0 if row is None else getattr(row, name) for name in ("params", "macs") for row in (old, new)]
        shapes = ["" if row is None else "x".join(map(str, row.shapes[0])) for row in (old, new)]
        rows.append(LayerRow(path, (old or new).type, state, *numbers, *shapes))
    return tuple(rows)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> TrimReport:
    """The report of a small real run: a block is taken out, channels are pruned, a file is written."""
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        truth = net(X).argmax(1)

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model.eval()(X).argmax(1) == truth).float().mean())

    removed = tt.remove(net, X, ["units.1"])
    pruned = tt.prune_channels(removed, X, {"units.0.conv1": 0.5, "units.2.conv1": 0.25})
    whole, middle, small = (tt.summary(model, X) for model in (net, removed, pruned))
    file = tmp_path_factory.mktemp("export") / "net.onnx"
    export = tt.export_onnx(pruned, X, file)

    def stage(name: str, model: nn.Module, found: tt.Summary, **more: Any) -> Stage:
        return Stage(
            name, evaluate(model), found.macs, found.params, found.size_mb, seconds=1.0, **{"latency_ms": None, **more}
        )

    def plan(number: int, found: tt.Summary, model: nn.Module, front: bool, kept: bool = False) -> CandidateRow:
        sizes = (found.macs, found.params, found.size_mb, None)
        return CandidateRow(number, f"plan {number}", 0.5, evaluate(model), *sizes, "measured", front, kept)

    edits = (
        EditRow("remove", "take out units.1", whole.macs, middle.macs, whole.params, middle.params),
        EditRow("prune_channels", "units.0.conv1, units.2.conv1", middle.macs, small.macs, middle.params, small.params),
    )
    failed = CandidateRow(3, "plan 3", None, None, 10, 5, 0.1, None, "failed", False, False, "the widths do not agree")
    return TrimReport(
        model="Net",
        score="agreement",
        baseline=evaluate(net),
        noise=0.0,
        command="torchtrim trim net:Net --macs 0.5",
        machine=machine(),
        limits=(
            Limit("macs", whole.macs * 0.9, small.macs, True),
            Limit("latency_ms", 0.01, 0.02, False),
            Limit("max_drop", 0.01, 1.0 - evaluate(pruned), evaluate(pruned) >= 0.99),
        ),
        stages=(
            stage("untouched", net, whole, latency_ms=2.0),
            stage("remove", removed, middle),
            stage("prune", pruned, small, latency_ms=1.0, note="two layers"),
        ),
        edits=edits,
        layers=layer_rows(whole, small),
        candidates=(
            plan(0, middle, removed, True),
            plan(1, small, pruned, True, kept=True),
            plan(2, whole, net, False),
            failed,
        ),
        front="macs",
        seconds=3.0,
        notes=("a note",),
        inputs="float32[8, 3, 16, 16]",
        data="8 rows",
        ranking=tt.rank_blocks(net, [X]),
        sensitivity=tt.sensitivity(net, [X], evaluate, X, kinds=("prune", "remove", "int8"), ratios=(0.25, 0.5)),
        export=export,
    )


class Page(HTMLParser):
    """A page as it is read: its text, its tags and their attributes; a tag that is not closed is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.open, self.getpos())

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def sound(text: str) -> Page:
    """Read a page, and hold it to what every page of ours is."""
    page = Page(text)
    assert page.named("html")[0]["lang"] == "en"
    assert page.tags[[tag for tag, _ in page.tags].index("title") - 1][0] == "meta"
    assert len(page.named("h1")) == 1 and page.named("script") == [{}]
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert not {"src", "onclick", "onerror", "onload"} & set(attributes), (tag, attributes)
        if "href" in attributes:
            assert (attributes["href"] or "")[1:] in ids, attributes
        if attributes.get("role") == "img" and tag == "svg":
            named = (attributes["aria-labelledby"] or "").split()
            assert len(named) == 2 and set(named) <= set(ids)
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
    outline = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert outline[0] == 1 and all(later <= earlier + 1 for earlier, later in pairwise(outline))
    style = text[text.index("<style>") : text.index("</style>")]
    script = text[text.index("<script>") : text.index("</script>")]
    for never in ("http:", "https:", "@import", "url(", "//cdn", "fetch(", "XMLHttp", "innerHTML", "eval("):
        assert never not in style + script, never
    return page


def tables_of(markdown: str) -> Iterator[list[int]]:
    """The number of cells in each line of each table, as GitHub counts them."""
    lines: list[int] = []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            lines.append(len(re.findall(r"(?<!\\)\|", line)) - 1)
        elif lines:
            yield lines
            lines = []


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def test_the_page_holds_all_of_a_real_run(report: TrimReport) -> None:
    page = sound(report.html())
    before, after = report.before, report.after
    assert before is not None and after is not None and after.macs < before.macs
    for said in (
        "Net",
        "1 of 3 limits met",
        "missed by 100 %",
        "take out units.1",
        "plan 1",
        "the widths do not agree",
    ):
        assert said in page.text or report.limits[2].met, said
    assert {row.state for row in report.layers} == {"kept", "thinned", "removed"}
    for row in report.layers:
        assert page.text.count(row.path) >= 1
    for title in ("Stages", "Layers", "Edits", "Candidates", "Ranking", "Sensitivity", "Export", "Machine and command"):
        assert title in page.texts, title
    assert report.command in page.texts and "every output is within the tolerance" in page.text
    assert str(report.machine).splitlines()[0] in page.text
    charts = [each for each in page.named("svg") if each.get("role") == "img"]
    assert len(charts) == 2  # the front, and the curves of pruning


def test_everything_is_in_the_page_without_its_script(report: TrimReport) -> None:
    text = report.html()
    bare = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert Page(bare).text == Page(text).text
    assert "hidden" not in {name for _, attributes in Page(text).tags for name in attributes}


def test_the_policy_lets_the_own_script_run_and_nothing_else(report: TrimReport) -> None:
    import base64
    import hashlib

    text = report.html()
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = next(each["content"] for each in Page(text).named("meta") if "http-equiv" in each)
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_what_is_hostile_stays_text(report: TrimReport) -> None:
    long = "encoder." + ".".join(["block"] * 50)
    layer = replace(report.layers[0], path=HOSTILE, type=HOSTILE, state=HOSTILE, shape_after=HOSTILE)
    hostile = replace(
        report,
        model=HOSTILE,
        score=HOSTILE,
        command=HOSTILE,
        notes=(HOSTILE,),
        inputs=HOSTILE,
        data=HOSTILE,
        limits=(Limit(HOSTILE, 1.0, None, False),),
        stages=tuple(replace(each, name=HOSTILE, note=HOSTILE) for each in report.stages),
        edits=tuple(replace(each, kind=HOSTILE, text=HOSTILE, note=HOSTILE) for each in report.edits),
        layers=(layer, replace(layer, path=long, state="thinned"), *report.layers),
        candidates=tuple(replace(each, text=HOSTILE, why=HOSTILE, state=HOSTILE) for each in report.candidates),
    )
    page = sound(hostile.html())
    assert "<script>alert(1)</script>" in page.text and long in page.text
    assert "\x00" not in hostile.html() and "\udcff" not in hostile.html()
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in sound(report.html()).tags}
    for lines in tables_of(hostile.markdown()):
        assert len(set(lines)) == 1, lines
    text = hostile.markdown()
    prose = re.sub(r"^(`{3,})sh$.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in prose and "<img" not in prose
    assert re.sub(r"</?(details|summary)>", "", prose).count("<") == 0
    assert json.loads(hostile.json())["model"] == HOSTILE


def test_markdown_has_tables_of_equal_width_and_the_headline_first(report: TrimReport) -> None:
    text = report.markdown()
    assert text.splitlines()[0] == "## torchtrim: Net"
    assert report.headline.replace("|", "\\|") in text
    counted = list(tables_of(text))
    assert len(counted) >= 6 and all(len(set(lines)) == 1 for lines in counted)
    assert text.count("<details>") == text.count("</details>") == 2
    assert "net.onnx, " in text and "every output is within the tolerance" in text
    assert "❌ missed by 100 %: latency at most 0.010 ms" in text
    fenced = replace(report, command="echo '```'").markdown()
    assert "\n````sh\necho '```'\n````\n" in fenced


def test_json_goes_round_and_holds_no_number_that_is_none(report: TrimReport) -> None:
    broken = replace(
        report,
        baseline=math.nan,
        noise=math.inf,
        stages=(replace(report.stages[0], score=math.nan, latency_ms=math.inf), *report.stages[1:]),
        candidates=tuple(replace(each, score=math.nan, proxy=-math.inf) for each in report.candidates),
        limits=(Limit("max_drop", 0.01, math.nan, False),),
    )
    for each in (report, broken):
        whole = each.to_dict()
        assert finite(whole) and json.loads(json.dumps(whole, allow_nan=False)) == whole
        assert json.loads(each.json()) == whole
        assert {"ranking", "sensitivity", "export", "machine", "layers", "headline"} <= set(whole)
        sound(each.html())
        assert "nan" not in Page(each.html()).text.replace("provenance", "").lower().split()
        assert str(each) and each._repr_html_() and each.markdown()
    assert broken.to_dict()["candidates"][0]["score"] is None
    assert front_chart(broken) is None


def test_a_report_of_nothing_is_still_a_report(report: TrimReport) -> None:
    bare = TrimReport("Net", "accuracy", 0.5, 0.0, "", machine(), (), (), (), (), (), "latency_ms", 0.0)
    assert bare.before is None and bare.headline == "No limit was set."
    assert "No limit was set." in sound(bare.html()).text and "No limit was set." in bare.markdown()
    assert "Candidates" not in Page(bare.html()).texts and str(bare) and bare.to_dict()["export"] is None
    one = replace(bare, layers=(LayerRow("0", "Linear", "kept", 4, 4, 4, 4, "4", "4"),), stages=report.stages[:1])
    assert "1 kept" in sound(one.html()).text
    assert Page(one.html()).text.count("Export") == 0
    silent = replace(report, export=None, ranking=None, sensitivity=None, candidates=())
    assert "The front" not in sound(silent.html()).text


def test_limits_say_by_how_much_they_are_missed(report: TrimReport) -> None:
    page = sound(report.html())
    assert "missed by 100 % latency at most 0.010 ms; found 0.020 ms" in page.text
    unknown = replace(report, limits=(Limit("size_mb", 1.0, None, False),))
    assert "not measured" in sound(unknown.html()).text and unknown.headline.endswith("missed: size (not measured).")
    assert replace(report, limits=report.limits[:1]).headline.endswith("The limit is met.")
    with pytest.raises(InputError, match="front"):
        replace(report, front="flops")


def test_the_map_of_400_layers_is_in_parts_that_hold_each_layer_once(report: TrimReport) -> None:
    states = ("kept", "thinned", "removed", "added")
    many = tuple(
        LayerRow(
            f"model.layers.{n // 10}.{'ab'[n % 2]}.{n % 10}", "Linear", states[n % 4], 8, n % 8, 8, n % 8, "2", "2"
        )
        for n in range(400)
    )
    found = parts(many)
    assert [cell.row for part in found for cell in part.cells] == list(many)
    assert 20 <= len(found) <= 48 and max(len(part.cells) for part in found) <= 24
    assert [part.name for part in found[:2]] == ["model.layers.0", "model.layers.1"]
    assert sum(part.macs_before for part in found) == 3200
    text = replace(report, layers=many).html()
    page = sound(text)
    assert "100 kept, 100 thinned, 100 removed, 100 added" in page.text.replace(" ,", ",")
    assert len([1 for each in page.named("span") if (each.get("class") or "").startswith("cell")]) == 404
    assert len(text) < 400_000
    flat = tuple(replace(row, path=f"l{n}") for n, row in enumerate(many))
    assert [cell.row for part in parts(flat) for cell in part.cells] == list(flat)
    assert parts(()) == []


def test_a_thinned_layer_without_weights_is_filled_by_its_shape() -> None:
    (part,) = parts([LayerRow("act", "ReLU", "thinned", 0, 0, 0, 0, "1x8x4x4", "1x6x4x4")])
    assert part.cells[0].left == 0.75
    assert part.cells[0].text == "act (ReLU): thinned, 75% left, 1x8x4x4 → 1x6x4x4"


def test_the_front_is_drawn_where_its_numbers_are(report: TrimReport) -> None:
    chart = front_chart(report)
    assert chart is not None
    dots = {dot.number: dot for dot in chart.dots}
    assert set(dots) == {None, 0, 1, 2}
    assert dots[1].kind == "kept" and dots[1].label == "kept (1)"
    assert dots[1].x < dots[0].x < dots[2].x == dots[None].x  # cheaper is further on the left
    assert all(0 <= dot.x <= 100 and 0 <= dot.y <= 100 for dot in chart.dots)
    (limit,) = [rule for rule in chart.rules if rule.x is not None]
    assert limit.x is not None and dots[1].x < limit.x < dots[2].x
    better = replace(
        report, candidates=tuple(replace(each, score=n / 10) for n, each in enumerate(report.candidates[:3]))
    )
    drawn = front_chart(better)
    assert drawn is not None
    heights = {dot.number: dot.y for dot in drawn.dots}
    assert heights[0] > heights[1] > heights[2]  # a higher score is further up


def test_labels_of_the_front_do_not_cover_each_other(report: TrimReport) -> None:
    crowd = tuple(
        replace(report.candidates[0], number=n, macs=1000 + n % 5, score=0.5, on_front=True) for n in range(60)
    )
    chart = front_chart(replace(report, candidates=crowd))
    assert chart is not None
    assert 1 <= sum(bool(dot.label) for dot in chart.dots) <= 12


def test_curves_show_what_was_measured_and_mark_the_worst(report: TrimReport) -> None:
    points = [
        Point("prune", f"l{n}", ratio, 0.9 - n * ratio / 20, n * ratio / 20) for n in range(9) for ratio in (0.5, 0.75)
    ]
    points.append(Point("prune", "bad", 0.5, None, None, "no"))
    (chart,) = curve_charts(Sensitivity(0.9, 0.0, tuple(points), 18, 1.0), "accuracy")
    assert [tick.text for tick in chart.x] == ["0 %", "50 %", "75 %"]
    marked = {curve.kind: curve.text for curve in chart.curves if curve.kind}
    assert marked[1] == "l8: \N{MINUS SIGN}0.3000 at 75 %" and set(marked) == {1, 2, 3, 4}
    assert len(chart.curves) == 9
    assert curve_charts(Sensitivity(0.9, 0.0, (), 0, 0.0), "accuracy") == []


@pytest.mark.parametrize("span", [(0.0, 1.0), (-3.0, 2e9), (0.90001, 0.90002), (5.0, 5.0), (-1e-12, 0.0)])
def test_ticks_are_few_and_inside(span: tuple[float, float]) -> None:
    scale = Scale.around(span, 0.05, 0.05)
    ticks = scale.ticks(5)
    assert 1 <= len(ticks) <= 5 and all(-0.01 <= scale.place(tick) <= 100.01 for tick in ticks)


def test_write_replaces_all_three_or_none(report: TrimReport, tmp_path: Path) -> None:
    made = report.write(tmp_path / "a" / "b")
    assert {name: path.name for name, path in made.items()} == {
        "html": "report.html",
        "md": "report.md",
        "json": "report.json",
    }
    assert made["html"].read_text(encoding="utf-8") == report.html()
    assert made["md"].read_text(encoding="utf-8") == report.markdown()
    assert json.loads(made["json"].read_text(encoding="utf-8")) == report.to_dict()
    assert len(list(made["html"].parent.iterdir())) == 3
    replace(report, model="Other").write(tmp_path / "a" / "b")
    assert "Other" in made["md"].read_text(encoding="utf-8") and len(list(made["html"].parent.iterdir())) == 3


def test_write_leaves_nothing_where_it_cannot(report: TrimReport, tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("mine", encoding="utf-8")
    for place in (taken, taken / "below"):
        with pytest.raises(InputError):
            report.write(place)
    assert taken.read_text(encoding="utf-8") == "mine" and list(tmp_path.iterdir()) == [taken]
    folder = tmp_path / "folder"
    (folder / "report.json").mkdir(parents=True)
    with pytest.raises(InputError, match=r"report\.json"):
        report.write(folder)
    assert [path.name for path in folder.iterdir()] == ["report.json"]


def test_a_disk_that_is_full_leaves_the_report_of_before(
    report: TrimReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    link = tmp_path / "report.json"
    link.unlink()
    link.symlink_to("/dev/full/no")  # the last of the three cannot be opened; the other two are written by then
    with pytest.raises(InputError, match="cannot be written"):
        replace(report, model="Other").write(tmp_path)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "report.json"}
    assert left == {name: data for name, data in before.items() if name != "report.json"}


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, two: str) -> float:
    """As WCAG 2 has it: 1 to 21."""
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_told_apart_in_light_dark_and_print() -> None:
    style = (ROOT / "torchtrim" / "report" / "trim.css").read_text(encoding="utf-8")
    schemes = [
        dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{3,6})\b", block))
        for block in re.findall(r":root {(.*?)}", style, re.DOTALL)
    ]
    assert len(schemes) == 3
    for given in schemes:
        colours = {
            name: value if len(value) == 7 else "#" + "".join(2 * each for each in value[1:])
            for name, value in given.items()
        }
        for text in ("ink", "soft", "link", "good", "bad", "thin", "gone", "new"):
            assert contrast(colours[text], colours["paper"]) >= 4.5, text
        for text in ("ink", "soft", "good"):
            assert contrast(colours[text], colours["wash"]) >= 4.5, text
        for mark in ("edge", "k1", "k2", "k3", "k4"):
            assert contrast(colours[mark], colours["paper"]) >= 3, mark


def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_pictures", ROOT / "benchmarks" / "report_pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


browsed = pytest.mark.skipif(pictures().browser() is None, reason="no Chromium on the PATH")


@browsed
@pytest.mark.parametrize(("long", "script"), [(False, True), (True, True), (True, False)])
def test_the_page_is_no_wider_than_a_phone(report: TrimReport, tmp_path: Path, long: bool, script: bool) -> None:
    if long:
        name = "x" * 300
        report = replace(
            report,
            model=name,
            command=name,
            notes=(name,),
            layers=(*report.layers, replace(report.layers[0], path=name, type=name)),
            candidates=tuple(replace(each, text=name) for each in report.candidates),
        )
    page = tmp_path / "page.html"
    page.write_text(report.html().replace("<details>", "<details open>"), encoding="utf-8")
    window, content, tall = pictures().size(page, 360, script=script)
    assert window == 360 and content == 360 and tall > 1000


@browsed
def test_a_browser_sorts_the_candidates_and_lights_the_dots(report: TrimReport, tmp_path: Path) -> None:
    scores = (0.5, None, 0.75, -1.0)
    changed = tuple(replace(each, score=score) for each, score in zip(report.candidates, scores, strict=True))
    act = """onload = () => { const page = document.querySelector("iframe").contentDocument;
    const table = [...page.querySelectorAll("#candidates ~ details table.sortable")][0];
    const order = () => [...table.tBodies[0].rows].map((row) => row.dataset.number).join("");
    const button = table.tHead.rows[0].cells[4].querySelector("button");
    const seen = [order()]; button.click(); seen.push(order()); button.click(); seen.push(order());
    seen.push(table.tHead.rows[0].cells[4].getAttribute("aria-sort"));
    table.tBodies[0].rows[0].dispatchEvent(new Event("pointerenter"));
    seen.push(page.querySelector(".dot.lit").dataset.number, page.querySelectorAll("svg.dot title").length);
    const boxes = () => [...page.querySelectorAll(".map .cell")].filter((cell) => cell.offsetWidth).length;
    seen.push(boxes()); page.querySelector("#changed").click(); seen.push(boxes());
    document.title = "seen " + seen.join(" "); };"""
    page = tmp_path / "page.html"
    page.write_text(replace(report, candidates=changed).html(), encoding="utf-8")
    frame = Path(pictures().framed(page, tmp_path, 800, 800, True).removeprefix("file://"))
    frame.write_text(
        re.sub(
            r"<script>.*</script>$",
            lambda _: f"<script>{act}</script>",
            frame.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        ),
        encoding="utf-8",
    )
    found = re.search(r"<title>seen (.*?)</title>", pictures().run("--dump-dom", frame.as_uri()))
    assert found is not None
    boxes = str(len(report.layers)), str(sum(layer.state != "kept" for layer in report.layers))
    assert found[1].split() == ["0123", "3021", "2031", "descending", "2", "0", *boxes]
