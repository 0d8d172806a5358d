"""`ouro serve` as clients meet it: real processes, real HTTP, the `openai` client, signals and hang-ups."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.inference.pretrained import CONTEXT, write_pretrained

OURO = Path(sys.executable).with_name("ouro")
ENDLESS = {"prompt": "abc", "max_tokens": 240, "temperature": 0}


class Served:
    """A server process."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [str(OURO), "serve", str(folder), "--port", "0", "--name", "tiny", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self.url = self._url()
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def _url(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            found = re.search(r"http://\S+(?=/v1)", line)
            if found:
                threading.Thread(target=self._drain, daemon=True).start()
                return found.group()
        raise AssertionError("".join(self.lines))

    def _drain(self) -> None:
        assert self.process.stdout is not None
        self.lines += self.process.stdout

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def health(self) -> dict[str, Any]:
        return dict(self.client.get("/health").json())

    def wait(self, until: Callable[[dict[str, Any]], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not until(self.health()):
            assert time.monotonic() < deadline, self.health()
            time.sleep(0.02)

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("safetensors")
    return write_pretrained(tmp_path_factory.mktemp("with space") / "model")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    made = Served(folder, "--max-requests", "6", "--slots", "2", "--max-body", "20000", "--timeout", "60")
    yield made
    made.close()


def test_models_and_health(served: Served) -> None:
    assert served.health()["status"] == "ok"
    (model,) = served.client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", CONTEXT)
    assert served.client.get("/v1/models/tiny").json()["id"] == "tiny"


def test_completion_with_its_depths(served: Served) -> None:
    body = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "ouro": {"exit": "q=0.5"}}
    answer = served.post("/v1/completions", **body).json()
    (choice,) = answer["choices"]
    usage = answer["usage"]
    depths = choice["ouro"]["depths"]
    assert usage["prompt_tokens"] == 3 and usage["completion_tokens"] == len(depths) == 12
    assert choice["finish_reason"] == "length"
    assert usage["ouro"]["mean_depth"] == pytest.approx(sum(depths) / 12)
    assert sum(usage["ouro"]["tokens_by_depth"].values()) == 12 and len(usage["ouro"]["tokens_by_depth"]) > 1
    shallow = served.post("/v1/completions", **{**body, "ouro": {"exit": "step=1", "max_loops": 2}}).json()
    assert shallow["choices"][0]["ouro"]["depths"] == [1] * 12
    assert shallow["usage"]["ouro"]["layer_visits"] < usage["ouro"]["layer_visits"]


def test_streamed_text_is_the_whole_text(served: Served) -> None:
    body = {"prompt": "abc", "max_tokens": 20, "temperature": 0.9, "seed": 5, "stop": ["zz", "Q"]}
    whole = served.post("/v1/completions", **body).json()["choices"][0]
    with served.client.stream(
        "POST", "/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}
    ) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] == len(whole["ouro"]["depths"])
    parts = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert parts[-1]["finish_reason"] == whole["finish_reason"]
    assert [part["ouro"]["depth"] for part in parts if "ouro" in part] == whole["ouro"]["depths"]


def test_the_openai_client(served: Served) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    several = client.completions.create(
        model="tiny",
        prompt=["ab", "cd"],
        n=2,
        max_tokens=4,
        seed=1,
        logprobs=2,
        extra_body={"ouro": {"exit": "step=2"}},
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert len(several.choices[0].logprobs.top_logprobs[0]) == 2
    assert several.usage.prompt_tokens == 4 and several.usage.completion_tokens == 16
    pieces = list(client.completions.create(model="tiny", prompt="ab", max_tokens=4, logprobs=1, stream=True, seed=1))
    shown = [piece.choices[0].logprobs for piece in pieces if piece.choices[0].logprobs.tokens]
    lengths = [len(piece.tokens[0]) for piece in shown]
    assert [piece.text_offset[0] for piece in shown] == [sum(lengths[:index]) for index in range(4)]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    assert chat.choices[0].message.role == "assistant"
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 3
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=5, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == chat.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="max_tokens 1000 does not fit"):
        client.completions.create(model="tiny", prompt="ab", max_tokens=1000)
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here; this is 'tiny'"):
        client.completions.create(model="gpt", prompt="ab")


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ("{", 400, None, "not JSON"),
        ("[]", 400, None, "must be a JSON object"),
        ("[" * 100_000, 413, None, "larger than 20000 bytes"),
        ("[" * 19_000, 400, None, "not JSON"),
        ("{}", 400, "prompt", "'prompt' is missing"),
        ('{"prompt": 3}', 400, "prompt", "prompt: "),
        ('{"prompt": []}', 400, "prompt", "empty list"),
        ('{"prompt": [128]}', 400, "prompt", "outside 0..127"),
        (json.dumps({"prompt": "x" * CONTEXT}), 400, "prompt", f"has {CONTEXT} tokens"),
        ('{"prompt": "x", "max_tokens": 0}', 400, "max_tokens", "max_tokens 0"),
        ('{"prompt": "x", "temperature": "hot"}', 400, "temperature", "temperature: "),
        ('{"prompt": "x", "temperature": NaN}', 400, "temperature", "temperature: "),
        ('{"prompt": "x", "top_p": 1.5}', 400, "top_p", "top_p: "),
        ('{"prompt": "x", "n": 7}', 400, "n", "at most 6 fit"),
        ('{"prompt": "x", "stop": [""]}', 400, "stop", "none empty"),
        ('{"prompt": "x", "presence_penalty": 1.0}', 400, "presence_penalty", "presence_penalty: "),
        ('{"prompt": "x", "temprature": 1}', 400, "temprature", "did you mean 'temperature'"),
        ('{"prompt": "x", "ouro": {"exit": "q=1.5"}}', 400, "exit", "a number from 0 to 1"),
        ('{"prompt": "x", "ouro": {"exit": "step=4", "max_loops": 3}}', 400, "exit", "beyond 3 loops"),
        ('{"prompt": "x", "ouro": {"max_loops": 5}}', 400, "max_loops", "1 to 4"),
        ('{"prompt": "x", "ouro": {"exits": "all"}}', 400, "ouro.exits", "did you mean 'exit'"),
        ('{"prompt": "x", "model": "other"}', 404, "model", "'other' is not served here"),
    ],
)
def test_bad_requests_get_one_clear_error(
    served: Served, body: str, status: int, param: str | None, message: str
) -> None:
    answer = served.client.post("/v1/completions", content=body)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert error["param"] == param
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages"),
        ([{"role": "robot", "content": "x"}], "unknown role 'robot'"),
        ([{"role": "user", "content": 4}], "turn 1"),
    ],
)
def test_bad_conversations(served: Served, messages: list[Any], message: str) -> None:
    answer = served.post("/v1/chat/completions", messages=messages)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_unknown_paths_and_methods(served: Served) -> None:
    assert "/v1/embeddings" in served.post("/v1/embeddings").json()["error"]["message"]
    assert served.client.get("/v1/completions").status_code == 405


def test_too_many_requests_and_hang_ups(served: Served) -> None:
    """Six endless streams fill the limit, the seventh gets a 429; hanging up ends them and frees their slots."""
    streams = [httpx.Client(base_url=served.url, timeout=60) for _ in range(6)]
    opened = [
        client.send(client.build_request("POST", "/v1/completions", json={**ENDLESS, "stream": True}), stream=True)
        for client in streams
    ]
    served.wait(lambda health: health["open_requests"] == 6 and health["running"] == 2)
    refused = served.post("/v1/completions", prompt="x")
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    for response, client in zip(opened, streams, strict=True):
        response.close()
        client.close()
    served.wait(lambda health: health["open_requests"] == 0)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(served.url + "/v1/completions", json=ENDLESS, timeout=0.2)
    served.wait(lambda health: health["open_requests"] == 0)
    assert served.post("/v1/completions", prompt="x", max_tokens=2).status_code == 200


def test_timeouts_term_and_what_is_cut_off(folder: Path) -> None:
    """One server with a short timeout and no grace: a late request gets a 504, TERM ends the rest, exit code 0."""
    served = Served(folder, "--timeout", "0.05", "--slots", "1")
    late = served.post("/v1/completions", **ENDLESS)
    assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
    with served.client.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and "timeout" in lines[-2]
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 0
    assert "Traceback" not in "".join(served.lines)
    served.close()


@pytest.mark.parametrize(("grace", "finishes"), [("60", True), ("0", False)])
def test_requests_under_way_at_term(folder: Path, grace: str, finishes: bool) -> None:
    served = Served(folder, "--grace", grace, "--slots", "1")
    with served.client.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        rest = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    if finishes:
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
    else:
        assert rest[-1]["error"]["code"] == "shutting_down"
    assert served.process.wait(60) == 0
    served.close()


def test_a_taken_port(served: Served, folder: Path) -> None:
    port = served.url.rpartition(":")[2]
    started = time.monotonic()
    refused = subprocess.run(
        [str(OURO), "serve", str(folder), "--port", port], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 7 and f":{port}" in refused.stderr and "Traceback" not in refused.stderr
    assert time.monotonic() - started < 60
