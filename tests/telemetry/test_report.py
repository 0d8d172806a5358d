"""The report of whole, partial and broken runs."""

import json
import math
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from ouro_megatron.errors import MetricsError
from ouro_megatron.telemetry.depth_colors import depth_hex, depth_rgb
from ouro_megatron.telemetry.plots import FIGURES, draw_sources, in_short
from ouro_megatron.telemetry.records import EventRecord, Record
from ouro_megatron.telemetry.report import write_report
from ouro_megatron.telemetry.run_reader import read_stages
from ouro_megatron.telemetry.timeline import Timeline
from tests.telemetry.test_metrics_file import evaluation, step, write

PNG = b"\x89PNG\r\n"


class Page(HTMLParser):
    """Text, images and unclosed tags of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text: list[str] = []
        self.images = 0
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images += 1
            assert (dict(attributes)["src"] or "").startswith("data:image/png;base64,")
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def run(folder: Path, records: Sequence[Record] | None = None) -> Path:
    write(
        folder,
        list(records or ())
        or [*(step(n) for n in range(1, 30)), evaluation(29), EventRecord(29, "checkpoint", "<saved>")],
    )
    return folder


def check(folder: Path) -> str:
    path = write_report(folder)
    assert path == folder / "report" / "index.html"
    page = Page(path)
    assert not page.open
    assert page.images == len(FIGURES)
    for name in [*FIGURES, "summary"]:
        assert (folder / "report" / f"{name}.png").read_bytes().startswith(PNG)
    return " ".join(page.text)


def test_one_run_with_samples(tmp_path: Path) -> None:
    run(tmp_path)
    tokens = [{"text": "a < b", "depth": 0, "prompt": True}, {"text": " & c", "depth": 2, "prompt": False}]
    sample = {"prompt": "a < b", "exit": "q=0.5", "checkpoint": "c", "tokens": tokens}
    (tmp_path / "samples.json").write_text(json.dumps([sample]))
    (tmp_path / "data.json").write_text(json.dumps({"unigram_entropy": 6.5}))
    text = check(tmp_path)
    for words in ("a < b", "& c", "q=0.5", "mean depth 2.00", "6.500", "<saved>", "4.250"):
        assert words in text


def test_several_stages_in_the_order_of_their_start(tmp_path: Path) -> None:
    for name in ("z-first", "a-second"):
        run(tmp_path / name)
    text = check(tmp_path)
    assert text.index("z-first") < text.index("a-second")
    assert "2 stages" in text


@pytest.mark.parametrize(
    "records",
    [
        [step(1)],
        [EventRecord(0, "start", "nothing yet")],
        [step(1, loss=math.nan, grad_norm=math.inf, skipped=True, skipped_steps=1), step(2)],
        [evaluation(1)],
    ],
    ids=["one step", "no step", "not finite", "evaluation only"],
)
def test_partial_runs(tmp_path: Path, records: list[Record]) -> None:
    run(tmp_path, records)
    check(tmp_path)


def test_unreadable_extras_are_left_out(tmp_path: Path) -> None:
    run(tmp_path)
    for name in ("samples.json", "data.json", "recipe.yaml"):
        (tmp_path / name).write_text("{")
    check(tmp_path)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(MetricsError, match=r"metrics\.jsonl"):
        write_report(tmp_path)


def test_colours_darken_with_depth() -> None:
    brightness = [sum(depth_rgb(depth, 8)) for depth in range(1, 9)]
    assert brightness == sorted(brightness, reverse=True)
    assert depth_hex(1, 1) == depth_hex(1, 8) == "#fde725"
    assert depth_hex(9, 4) == depth_hex(4, 4)


def lineage(folder: Path, *before: tuple[str, int]) -> None:
    records = [{"name": name, "kind": "training", "tokens": tokens} for name, tokens in before]
    (folder / "lineage.json").write_text(json.dumps(records))


def test_branches_begin_where_their_parent_ends(tmp_path: Path) -> None:
    for name in ("first", "small", "large", "small-anneal"):
        run(tmp_path / name)
    lineage(tmp_path / "first")
    lineage(tmp_path / "small", ("first", 29_000))
    lineage(tmp_path / "large", ("first", 29_000))
    lineage(tmp_path / "small-anneal", ("first", 29_000), ("small", 29_000))
    timeline = Timeline.of(read_stages(tmp_path))
    places = {span.stage.name: (span.start, span.branch) for span in timeline.spans}
    assert places == {"first": (0, 0), "small": (29_000, 0), "large": (29_000, 1), "small-anneal": (58_000, 0)}
    assert timeline.end == 87_000 and timeline.starts == [0, 29_000, 58_000]
    assert [x for x, _ in timeline.steps(1)][:2] == [30_000, 31_000]
    assert "87k" in check(tmp_path)


def test_names_of_branches_in_short() -> None:
    assert in_short(["1.4b-4-stable-2", "2.6b-4-stable-2"]) == "1.4b | 2.6b: 4-stable-2"
    assert in_short(["small", "large"]) == "small | large"
    assert in_short(["a-x", "b-y"]) == "a-x | b-y"
    assert in_short(["one-stage"]) == "one-stage"


def test_the_data_of_a_stage_is_drawn_over_that_stage_alone(tmp_path: Path) -> None:
    first = [step(n, source_share={"web-00000-of-00002": 0.25, "web-00001-of-00002": 0.75}) for n in (1, 2)]
    second = [step(1, source_share={"chat": 0.5, "replay/web": 0.5})]
    for name, steps in (("first", first), ("second", second)):
        run(tmp_path / name, [*steps])
    figure, axes = plt.subplots()
    draw_sources(axes, Timeline.of(read_stages(tmp_path)))
    spans = [(area.get_paths()[0].get_extents().x0, area.get_paths()[0].get_extents().x1) for area in axes.collections]
    assert spans == [(0, 2000), (2000, 3000), (2000, 3000)]
    assert [area.get_hatch() for area in axes.collections] == [None, None, "////"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["web", "chat", "hatched: read again"]
    web, chat, replay = (area.get_facecolor().tolist() for area in axes.collections)
    assert web == replay != chat
    plt.close(figure)


def test_a_stage_whose_parents_are_elsewhere_begins_at_their_tokens(tmp_path: Path) -> None:
    for name, before in (("a", 5_000), ("b", 34_000)):
        run(tmp_path / name)
        lineage(tmp_path / name, ("gone", 5_000), *([("a", 29_000)] if before > 5_000 else []))
    assert [span.start for span in Timeline.of(read_stages(tmp_path)).spans] == [5_000, 34_000]


def test_steps_that_were_rolled_back_are_not_drawn(tmp_path: Path) -> None:
    undone: list[Record] = [*(step(n, loss=99.0) for n in range(5, 9)), EventRecord(4, "rollback", "back at step 4")]
    write(tmp_path, [*(step(n) for n in range(1, 5)), *undone, *(step(n, rollbacks=1) for n in range(5, 7))])
    (stage,) = read_stages(tmp_path)
    assert [record.step for record in stage.steps] == [1, 2, 3, 4, 5, 6]
    assert all(record.loss < 99 for record in stage.steps)
    assert Timeline.of([stage]).rollbacks() == [4_000]
    check(tmp_path)
