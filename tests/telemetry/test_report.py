"""The report of whole, partial and broken runs."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ouro_megatron.errors import MetricsError
from ouro_megatron.telemetry.depth_colors import depth_hex, depth_rgb
from ouro_megatron.telemetry.plots import FIGURES
from ouro_megatron.telemetry.records import EventRecord, Record
from ouro_megatron.telemetry.report import write_report
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


def run(folder: Path, records: list[Record] | None = None) -> Path:
    write(
        folder, records or [*(step(n) for n in range(1, 30)), evaluation(29), EventRecord(29, "checkpoint", "<saved>")]
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
