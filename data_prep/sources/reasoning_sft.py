"""The sets for reasoning fine-tuning, each in its own layout; <think> ... </think> is kept."""

import re
from typing import Any, ClassVar, Literal

from pydantic import Field

from data_prep.formats.files import File
from data_prep.sources.chat import ChatSource
from data_prep.sources.chat_rows import Messages, checked, messages_of, turn_of
from ouro_megatron.errors import DataError

_LLAMA_TURN = re.compile(
    r"<\|start_header_id\|>(.*?)<\|end_header_id\|>\n*(.*?)(?=<\|eot_id\|>|<\|start_header_id\|>|\Z)", re.S
)
_LLAMA_MARKS = re.compile(r"<\|(?:begin_of_text|end_of_text|eot_id)\|>")


class OpenThoughts3(ChatSource):
    """open-thoughts/OpenThoughts3-1.2M: parquet, `conversations` of human and gpt; `where: {domain: [math]}`."""

    kind: Literal["openthoughts3"]
    pattern: str = "**/*.parquet"


class AceReasonSft(ChatSource):
    """nvidia/AceReason-1.1-SFT: Arrow files inside a folder called sft_data.parquet; `input` and `output`."""

    kind: Literal["acereason_sft"]
    pattern: str = "{,sft_data.parquet/}*.arrow"
    question: str | None = "input"
    answer: str | None = "output"


class OpenCodeReasoning(ChatSource):
    """nvidia/OpenCodeReasoning: parquet, `input` and `output`. The questions of split_1 are not in the set."""

    kind: Literal["opencodereasoning"]
    pattern: str = "**/*.parquet"
    question: str | None = "input"
    answer: str | None = "output"

    def files(self) -> list[File]:
        found = super().files()
        kept = [file for file in found if "split_1" not in file.path]
        if not kept:
            raise DataError(
                f"source {self.name}: {self.path} holds split_1 only, whose `input` is a placeholder: the questions "
                "must be looked up in the sets it names. Use split_0"
            )
        return kept

    def messages(self, row: dict[str, Any]) -> Messages:
        if str(row.get("input", "")).strip() in ("", "-"):
            raise ValueError("`input` is a placeholder: the question is in another set")
        return super().messages(row)


class LlamaNemotronPostTraining(ChatSource):
    """nvidia/Llama-Nemotron-Post-Training-Dataset: JSON lines; `input` is text with Llama-3 marks or turns."""

    kind: Literal["llama_nemotron"]
    pattern: str = "**/*.jsonl"
    subsets: tuple[Literal["code", "math", "science", "chat", "safety"], ...] = Field(
        default=("code", "math", "science", "chat", "safety"), min_length=1
    )
    """Folders below SFT."""
    reasoning: Literal["on", "off", "any"] = "any"
    """Keep answers with reasoning only, or without only."""

    def files(self) -> list[File]:
        found = [file for file in super().files() if "/RL/" not in file.path]
        chosen = [file for file in found if any(self._is_of(file, subset) for subset in self.subsets)]
        for subset in self.subsets if "subsets" in self.model_fields_set else ():
            if not any(self._is_of(file, subset) for file in chosen):
                raise DataError(f"source {self.name}: no .jsonl of {subset} below {self.path}; download it")
        if not chosen:
            raise DataError(f"source {self.name}: no .jsonl of {', '.join(self.subsets)} below {self.path}")
        return chosen

    @staticmethod
    def _is_of(file: File, subset: str) -> bool:
        return f"/{subset}/" in file.path or file.name.startswith(subset)

    def is_kept(self, row: Any) -> bool:
        return (self.reasoning == "any" or row.get("reasoning") == self.reasoning) and super().is_kept(row)

    def messages(self, row: dict[str, Any]) -> Messages:
        # `reasoning` is "on" or "off" here, not the reasoning itself.
        plain = {name: value for name, value in row.items() if name != "reasoning"}
        source = plain.get("input")
        if isinstance(source, str) and "<|start_header_id|>" in source:
            plain["input"] = [{"role": role, "content": text.strip()} for role, text in _llama_turns(source)]
        if isinstance(plain.get("output"), str):
            plain["output"] = _LLAMA_MARKS.sub("", plain["output"]).strip()
        return messages_of(plain, "auto", ("input", "output") if "input" in plain else None)


def _llama_turns(text: str) -> list[tuple[str, str]]:
    """Turns of a prompt with Llama-3 marks; the empty turn at its end, where the answer begins, is left out."""
    turns = [(role, content) for role, content in _LLAMA_TURN.findall(text)]
    if turns and turns[-1][0].strip() == "assistant" and not turns[-1][1].strip():
        turns.pop()
    if not turns:
        raise ValueError("`input` has Llama-3 marks but no turn")
    return [(role, content) for role, content in turns if content.strip()]


class NemotronPostTraining(ChatSource):
    """nvidia/Nemotron-Post-Training-Dataset-v1: parquet, `messages` with tool calls, split by subject."""

    kind: Literal["nemotron_post_training"]
    pattern: str = "**/*.parquet"
    subsets: tuple[Literal["chat", "code", "math", "stem", "tool_calling"], ...] = ()
    """Splits to use (by the names of the files); all when left out."""

    def files(self) -> list[File]:
        found = super().files()
        if not self.subsets:
            return found
        chosen = [file for file in found if any(file.name.startswith(f"{subset}-") for subset in self.subsets)]
        for subset in self.subsets:
            if not any(file.name.startswith(f"{subset}-") for file in chosen):
                raise DataError(f"source {self.name}: no file {subset}-*.parquet below {self.path}")
        return chosen

    def messages(self, row: dict[str, Any]) -> Messages:
        turns = row.get("messages")
        if not isinstance(turns, list):
            raise ValueError("no list in `messages`")
        return checked([turn_of(turn) for turn in turns])


class OO1Chat(ChatSource):
    """m-a-p/OO1-Chat-747K: conversations; its layout is found from the columns."""

    kind: Literal["oo1_chat"]
    about: ClassVar[str] = "Look at one row of the set and name its columns."


class DeepWriting(ChatSource):
    """m-a-p/DeepWriting-20K: writing tasks with their reasoning; its layout is found from the columns."""

    kind: Literal["deepwriting"]
    about: ClassVar[str] = "Look at one row of the set and name its columns."
