"""Peak memory of `ouro data prepare` for long documents in every form they come in: is it flat in their length?

    python -m benchmarks.long_documents --tokenizer DIR [--forms parquet chat] [--millions 1 6 30]

One process (`--workers 1`) and one file of two documents for each form and length, real text unless the form says
otherwise. Prints VmHWM, the most that was resident, pages of mapped files included.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.tokenise_text import documents, train_tokenizer
from data_prep.fixtures.llama import pack, write_llama_tokenizer, write_packs

_MAIN_AND_PEAK = """
from ouro_megatron.cli import main
try:
    main()
finally:
    with open("/proc/self/status") as status:
        print(next(line for line in status if line.startswith("VmHWM")))
"""
Texts = Sequence[str]
Settings = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths = sysconfig.get_paths()
    parser.add_argument("--text", type=Path, nargs="+", default=[Path(paths["stdlib"]), Path(paths["purelib"])])
    parser.add_argument("--tokenizer", type=Path, help="folder; one like SmolLM2's is trained when left out")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 6, 30], help="characters a document")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        tokenizer = given.tokenizer or train_tokenizer(work / "tokenizer", given.text)
        for form in given.forms:
            peaks = []
            for millions in given.millions:
                characters = int(millions * 1e6)
                if form == "one word":
                    texts = ["".join(random.Random(seed).choices("acgt", k=characters)) for seed in range(2)]
                else:
                    texts = list(islice(documents(given.text, 1e9, characters), 2))
                peaks.append(peak(form, texts, tokenizer, work / "run"))
            growth = (peaks[-1] - peaks[0]) / (given.millions[-1] - given.millions[0])
            print(
                f"{form:20} {' '.join(f'{peak:6.0f}' for peak in peaks)} MB  {growth:5.2f} bytes a character",
                flush=True,
            )


def peak(form: str, texts: Texts, tokenizer: Path, work: Path) -> float:
    """Megabytes resident at most in a process that prepares the texts in one of FORMS; `work`: a folder to be made."""
    raw = work / "raw"
    raw.mkdir(parents=True)
    source = FORMS[form](texts, raw)
    folder = _other_tokenizer(tokenizer, work / "tokenizer", normalized=form == "slow path")
    recipe = {
        "output": str(work / "out"),
        "tokenizer": {"kind": "existing", "path": str(folder)},
        "validation_fraction": 0,
        "sources": [{"name": "text", "path": str(raw), **source}],
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    number = len(texts)
    del texts
    command = [sys.executable, "-c", _MAIN_AND_PEAK, "data", "prepare", str(work / "recipe.yaml"), "--workers", "1"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stdout + run.stderr)
    counts = json.loads((work / "out" / "text.manifest.json").read_text())["source_counts"]
    if counts["read"] != number:
        raise RuntimeError(f"{form}: {counts} instead of {number} documents")
    shutil.rmtree(work)
    return int(run.stdout.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def _other_tokenizer(tokenizer: Path, folder: Path, *, normalized: bool) -> Path:
    """One with the special tokens of ChatML; `normalized`: that takes the slow path."""
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    if normalized:
        content["normalizer"] = {"type": "NFC"}
    first = 1 + max(content["model"]["vocab"].values())
    for number, token in enumerate(("<|im_start|>", "<|im_end|>")):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        content["added_tokens"].append({"id": first + number, "content": token, **flags})
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(tokenizer / "tokenizer_config.json", folder)
    return folder


# Each writes texts into a folder and returns what a recipe says of such a source.


def _lines(texts: Texts, raw: Path) -> Settings:
    with (raw / "a.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return {"kind": "jsonl"}


def _text_files(texts: Texts, raw: Path) -> Settings:
    for number, text in enumerate(texts):
        (raw / f"{number}.txt").write_text(text, encoding="utf-8")
    return {"kind": "text_folder"}


def _parquet(texts: Texts, raw: Path) -> Settings:
    pq.write_table(pa.table({"text": texts}), raw / "a.parquet", row_group_size=1)
    return {"kind": "parquet"}


def _plain_parquet(texts: Texts, raw: Path) -> Settings:
    pq.write_table(
        pa.table({"text": texts}), raw / "a.parquet", row_group_size=1, use_dictionary=False, compression="zstd"
    )
    return {"kind": "parquet"}


def _remote_parquet(texts: Texts, raw: Path) -> Settings:
    """Behind a URL, of which the pages are read one after the other."""
    return {**_parquet(texts, raw), "path": f"local://{raw}"}


def _dataset(texts: Texts, raw: Path) -> Settings:
    """A folder of data files, as the Hub's datasets are."""
    return {**_parquet(texts, raw), "kind": "datasets"}


def _saved(texts: Texts, raw: Path) -> Settings:
    datasets.Dataset.from_dict({"text": list(texts)}).save_to_disk(raw)
    return {"kind": "datasets"}


def _prolong(texts: Texts, raw: Path) -> Settings:
    write_packs(raw / "book" / "proc00-64", pack(list(texts), 65_536), rows_a_shard=8)
    return {"kind": "prolong", "tokenizer": str(write_llama_tokenizer(raw.parent / "llama")), "join": True}


def _chat(texts: Texts, raw: Path) -> Settings:
    """A long question with a short answer, as for a book."""
    with (raw / "a.jsonl").open("w", encoding="utf-8") as file:
        for text in texts:
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "It is a long text."}]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return {"kind": "chat"}


def _ascii_chat(texts: Texts, raw: Path) -> Settings:
    """Where Python takes one byte a character instead of the four that an emoji asks for."""
    return _chat([text.encode("ascii", "ignore").decode() for text in texts], raw)


FORMS: dict[str, Callable[[Texts, Path], Settings]] = {
    "lines": _lines,
    "text files": _text_files,
    "parquet": _parquet,
    "parquet, plain": _plain_parquet,
    "parquet, URL": _remote_parquet,
    "dataset's parquet": _dataset,
    "saved dataset": _saved,
    "ProLong, joined": _prolong,
    "one word": _lines,
    "slow path": _lines,
    "chat": _chat,
    "chat, ASCII": _ascii_chat,
}


if __name__ == "__main__":
    main()
