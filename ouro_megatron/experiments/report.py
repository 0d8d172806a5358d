"""The summary of an experiment: tables beside the talk's numbers, verdicts, pictures; Markdown, HTML and JSON."""

import html
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ouro_megatron.checkpoint.folder import write_json
from ouro_megatron.experiments.cells import Cell
from ouro_megatron.experiments.claims import Judged, judge, spread
from ouro_megatron.experiments.figures import draw, label_of
from ouro_megatron.experiments.plan import Sweep, all_cells
from ouro_megatron.experiments.talk import SENTENCES, TABLES, beside
from ouro_megatron.telemetry.text import big

SUMMARY = "summary"
_TABLE_METRICS = {
    "bits": ("parameters", "attribute bits per parameter", "bits per parameter", "attributes known"),
    "depth": ("loss last loop", "expected loss", "expected depth", "exits at last loop"),
}


@dataclass(frozen=True)
class Summary:
    """What a sweep has shown so far."""

    sweep: Sweep
    results: dict[str, list[dict[str, Any]]]
    """Results of the cells that are done, by group."""
    judged: list[Judged]
    missing: int
    """Cells that are not done."""


def summarise(sweep: Sweep) -> Summary:
    """Reads the results of all cells and judges the claims."""
    results: dict[str, list[dict[str, Any]]] = {group: [] for group in sweep.settings.groups}
    missing = 0
    for cell in all_cells(sweep):
        result = sweep.result(cell)
        if result is None:
            missing += 1
        else:
            results[cell.group].append(result)
    results = {group: found for group, found in results.items() if found}
    judged = [judge(claim, sweep.settings, results) for claim in sweep.settings.claims]
    return Summary(sweep, results, judged, missing)


def write_summary(summary: Summary) -> Path:
    """Writes summary.json, summary.md, summary.html and the pictures; returns the page in Markdown."""
    out = summary.sweep.out
    pictures = draw(summary.sweep.settings, summary.results, summary.sweep.cells_folder, out) if summary.results else []
    write_json(
        out / f"{SUMMARY}.json",
        {
            "experiment": summary.sweep.name,
            "scale": summary.sweep.scale,
            "written": time.strftime("%Y-%m-%d %H:%M:%S"),
            "missing_cells": summary.missing,
            "claims": [judged.as_json() for judged in summary.judged],
            "data": list(_facts(summary)),
            "results": summary.results,
        },
    )
    blocks = _blocks(summary, [picture.name for picture in pictures])
    page = out / f"{SUMMARY}.md"
    page.write_text("\n\n".join(_markdown(block) for block in blocks) + "\n", encoding="utf-8")
    (out / f"{SUMMARY}.html").write_text(_html(summary.sweep.settings.title, blocks), encoding="utf-8")
    return page


def result_table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a group's parameters, its numbers as mean ± standard deviation, the talk's beside them."""
    settings = summary.sweep.settings
    metrics = list(_TABLE_METRICS.get(settings.measure, ()))
    if settings.measure == "accuracy":
        first = next(iter(summary.results.values()), [])
        metrics = [name for name in (first[0]["metrics"] if first else {}) if name.startswith("accuracy ")]
    with_talk = summary.sweep.name in TABLES
    heads = ["k⊗L", "seeds", "layer parameters", *(name.removeprefix("accuracy ") for name in metrics)]
    if with_talk:
        heads.append(f"the talk ({' / '.join(TABLES[summary.sweep.name].columns)})")
    rows = []
    for group, cells in summary.results.items():
        row = [label_of(group, settings), str(len(cells)), big(cells[0]["layer_parameters"])]
        for metric in metrics:
            values = [float(cell["metrics"][metric]) for cell in cells]
            row.append(big(values[0]) if metric == "parameters" else mean_and_spread(values))
        if with_talk:
            shape = group.partition("/")[0]
            twin = settings.beside.get(shape, shape)
            numbers = beside(summary.sweep.name, twin)
            row.append(f"{twin.replace('x', '⊗')}: {numbers}" if numbers else "")
        rows.append(row)
    return heads, rows


def mean_and_spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    digits = 1 if abs(mean) >= 10 else 3
    return f"{mean:.{digits}f} ± {spread(values):.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


Block = tuple[str, Any]
"""("h1" | "h2" | "p", text), ("list", lines), ("table", (heads, rows)), ("picture", file name)."""


def _blocks(summary: Summary, pictures: Sequence[str]) -> list[Block]:
    sweep, settings = summary.sweep, summary.sweep.settings
    blocks: list[Block] = [("h1", f"{settings.title} ({sweep.scale})")]
    done = sum(len(found) for found in summary.results.values())
    state = f"{done} runs" + (f", {summary.missing} more are not done" if summary.missing else "")
    blocks.append(("p", f"{state}. Written {time.strftime('%Y-%m-%d %H:%M')}."))
    if settings.note:
        blocks.append(("p", settings.note))
    blocks.append(("h2", "Claims"))
    blocks.append(("list", [judged.sentence for judged in summary.judged]))
    blocks.append(("h2", "Numbers"))
    blocks.append(("p", "Mean ± standard deviation over seeds."))
    if summary.results:
        blocks.append(("table", result_table(summary)))
    if sweep.name in TABLES:
        table = TABLES[sweep.name]
        blocks.append(("p", f"The talk's numbers: {table.caption}"))
        rows = [[shape.replace("x", "⊗"), *(f"{value:g}" for value in values)] for shape, values in table.rows.items()]
        blocks.append(("table", (["k⊗L", *table.columns], rows)))
    if sweep.name in SENTENCES:
        blocks.append(("p", f"The talk: {SENTENCES[sweep.name]}"))
    blocks += [("picture", name) for name in pictures]
    blocks.append(("h2", "Data"))
    for facts in _facts(summary):
        blocks.append(("p", facts["source"] + "."))
        blocks.append(("list", _fact_lines(facts)))
    return blocks


def _facts(summary: Summary) -> list[dict[str, Any]]:
    """Facts of every corpus in use, each once."""
    found = {}
    for group in summary.results:
        shape, _, name = group.partition("/")
        corpus = summary.sweep.corpus(Cell(shape, summary.sweep.settings.variant(name), 1))
        if corpus is not None and corpus.folder.is_dir():
            found[corpus.folder] = corpus.facts
    return list(found.values())


def _fact_lines(facts: dict[str, Any]) -> list[str]:
    settings = ", ".join(f"{key} {value}" for key, value in facts["task"].items())
    lines = [
        settings,
        f"{facts['train_examples']:,} training examples, {facts['train_distinct']:,} of them different; "
        f"{facts['train_tokens']:,} tokens, {facts['vocabulary']} words",
    ]
    for name, count in facts["test_examples"].items():
        lines.append(
            f"test set {name}: {count:,} of {facts['possible_examples'][name]:,} possible examples".replace("'", "")
        )
    if facts["test_examples"]:
        lines.append(
            f"{facts['overlap']} examples are in both; {facts['left_out_because_tested']:,} draws were left out of "
            "training because they are tested"
        )
    return lines


def _markdown(block: Block) -> str:
    kind, content = block
    if kind in ("h1", "h2"):
        return f"{'#' * int(kind[1])} {content}"
    if kind == "list":
        return "\n".join(f"- {line}" for line in content)
    if kind == "picture":
        return f"![{content}]({content})"
    if kind == "table":
        heads, rows = content
        lines = [heads, ["---"] * len(heads), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return str(content)


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2rem auto;padding:0 1rem;color:#1f2933}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{border-bottom:1px solid #e3e8ee;padding:.3rem .8rem;text-align:left}"
    "img{max-width:100%}"
)


def _html(title: str, blocks: Sequence[Block]) -> str:
    body = []
    for kind, content in blocks:
        if kind in ("h1", "h2", "p"):
            body.append(f"<{kind}>{html.escape(content)}</{kind}>")
        elif kind == "list":
            body.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in content) + "</ul>")
        elif kind == "picture":
            body.append(f'<img src="{html.escape(content)}" alt="{html.escape(content)}">')
        else:
            heads, rows = content
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
            lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
            body.append(f"<table><tr>{head}</tr>{lines}</table>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"
    )
