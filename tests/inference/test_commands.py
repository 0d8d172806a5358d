"""`ouro generate` and `ouro chat` as a user starts them: an exported folder, two ranks, files, wrong input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from ouro_megatron.inference.exit_policy import ExitPolicy
from tests.inference.engines import recompute
from tests.inference.pretrained import CONTEXT, reference_model, write_pretrained

OURO = Path(sys.executable).with_name("ouro")
PROMPTS = ["ab", "the list", "x"]


def run(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    # From another folder: ranks must find the installed package wherever the user stands.
    return subprocess.run([str(OURO), *words], capture_output=True, text=True, input=text, timeout=200, cwd="/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("safetensors")
    return write_pretrained(tmp_path_factory.mktemp("a model"))


@pytest.mark.distributed
@pytest.mark.parametrize("tensor", [1, 2])
def test_prompts_from_a_file_as_json(folder: Path, tmp_path: Path, tensor: int) -> None:
    """From an exported folder, on one rank and on two: what the reference says by full recomputation."""
    lines = [json.dumps({"prompt": text, "exit": f"q=0.{5 + number}"}) for number, text in enumerate(PROMPTS)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines))
    options = ["--json", "--max-tokens", "8", "--tensor", str(tensor), "--batch", "2"]
    result = run("generate", str(folder), "--prompts-file", str(file), *options)
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    for number, (answer, text) in enumerate(zip(answers, PROMPTS, strict=True)):
        prompt = [vocabulary["Ġ" if letter == " " else letter] for letter in text]
        policy = ExitPolicy(q=0.5 + number / 10)
        tokens, depths, _ = recompute(reference_model(), prompt, 8, policy, 4)
        assert (answer["tokens"], answer["depths"]) == (tokens, depths)
        assert answer["finish_reason"] == "length"


def test_one_prompt_is_shown_with_its_depths(folder: Path, tmp_path: Path) -> None:
    samples = tmp_path / "samples.json"
    options = ["--max-tokens", "5", "--exit", "q=0.5", "--max-loops", "6", "--cache", "average", "--dtype", "bf16"]
    result = run("generate", str(folder), "--prompt", "ab", *options, "--depths", "--save", str(samples))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ab")
    assert re.search(r"5 tokens, mean depth \d\.\d\d of 6", result.stdout)
    assert len([t for t in json.loads(samples.read_text())[0]["tokens"] if not t["prompt"]]) == 5


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--prompt", "x" * CONTEXT], 2, f"the prompt has {CONTEXT} tokens and the context holds {CONTEXT}"),
        (["--prompt", "x", "--max-tokens", "1000"], 2, "ask for at most 255"),
        (["--prompt", "x", "--exit", "q=1.2"], 2, "a number from 0 to 1"),
        (["--prompt", "x", "--exit", "step=9"], 2, "step=9 lies beyond 4 loops"),
        (["--prompt", "x", "--temperature", "-1"], 2, "temperature -1"),
        (["--prompt", "x", "--cache", "last", "--skipped", "later"], 2, "use cache=all, or skipped=copy"),
        (["--prompt", "x", "--tensor", "3"], 2, "--tensor 3 must divide 4 heads"),
        (["--prompts-file", "/dev/null"], 3, "holds no prompt"),
    ],
)
def test_wrong_input_is_one_message(folder: Path, words: list[str], code: int, message: str) -> None:
    result = run("generate", str(folder), *words)
    assert result.returncode == code, result.stderr
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_ranks_of_a_pipeline_are_refused(folder: Path) -> None:
    """Two ranks of a launcher, without --tensor 2: the message says why and what to start instead."""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [str(OURO), "generate", str(folder), "--prompt", "x"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd="/", env=environment)
    assert result.returncode == 2, result.stderr
    message = " ".join(result.stderr.split())
    assert "2 ranks were started for --tensor 1" in message and "a pipeline would idle" in message


def test_a_chat_over_a_pipe(folder: Path) -> None:
    lines = [
        "hi",
        "/loops 9",
        "/exit step=2",
        "/exit often",
        "you",
        "/undo",
        "/reset",
        "/what",
        "again",
        "/quit",
        "never",
    ]
    result = run("chat", str(folder), "--max-tokens", "4", "--temperature", "0", text="\n".join(lines))
    assert result.returncode == 0, result.stderr
    shown = result.stdout
    assert shown.count("4 tokens, mean depth") == 3
    assert "max_loops 9: 1 to 4" in shown and "exit policy 'often'" in shown and "/temperature X" in shown
    assert "exit step=2, 4 loops, temperature 0" in shown and "(not a command: /what)" in shown
    assert "the last question and its answer are forgotten" in shown and "a new conversation" in shown
    # Greedy and forgotten: the third answer is a first one again, at the depth chosen since.
    assert shown.count("mean depth 4.00") == 1 and shown.count("mean depth 2.00") == 2


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    folder = write_pretrained(tmp_path / "base", chat=False)
    refused = run("chat", str(folder), text="hi")
    assert refused.returncode == 2 and "--plain" in refused.stderr
    plain = run("chat", str(folder), "--plain", "--max-tokens", "4", text="hi\nmore\n")
    assert plain.returncode == 0 and plain.stdout.count("4 tokens") == 2


@pytest.mark.distributed
def test_a_tensor_parallel_rank_that_dies(folder: Path) -> None:
    """The server names the rank, answers 503 or closes, and ends with its own exit code; no process stays behind."""
    command = [str(OURO), "serve", str(folder), "--port", "0", "--tensor", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/") as server:
        assert server.stdout is not None and server.stderr is not None
        found = re.search(r"http://\S+(?=/v1)", server.stdout.readline())
        assert found is not None
        body = {"prompt": "ab", "max_tokens": 3, "temperature": 0}
        assert httpx.post(f"{found.group()}/v1/completions", json=body, timeout=60).status_code == 200
        (rank,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        os.kill(int(rank), signal.SIGKILL)
        refused = httpx.post(f"{found.group()}/v1/completions", json=body, timeout=60)
        assert refused.status_code == 503 and "rank 1 was ended by SIGKILL" in refused.json()["error"]["message"]
        assert server.wait(60) == 7
        assert "rank 1 was ended by SIGKILL" in " ".join(server.stderr.read().split())


@pytest.mark.distributed
def test_ranks_go_with_the_leader(folder: Path) -> None:
    command = [str(OURO), "serve", str(folder), "--port", "0", "--tensor", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as server:
        assert server.stdout is not None and "serving" in server.stdout.readline()
        (rank,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        server.kill()
        server.wait(30)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{rank}").exists() and "State:\tZ" not in Path(f"/proc/{rank}/status").read_text():
        assert time.monotonic() < deadline, f"rank 1 ({rank}) outlived its leader"
        time.sleep(0.1)
