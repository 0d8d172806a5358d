"""Chat templates: finding a tokenizer's own Jinja template and rendering conversations with it.

A template sees what `transformers` gives it: `messages`, `tools`, `documents`, `add_generation_prompt`, the names of
the special tokens, `raise_exception`, a `tojson` that keeps Unicode, loop controls and the `generation` block. There is
no `strftime_now`: templates that ask for it have a fixed date to fall back on, and the same conversation must give the
same text on any day.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from ouro_megatron.data.tokenizer import CONFIG_FILE
from ouro_megatron.errors import DataError

TEMPLATE_FILE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

CHATML = """\
{%- for message in messages %}
{%- if message.tool_calls %}
{{- raise_exception('ChatML has no form for tool calls; give the template of a model that calls tools') }}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}
{%- if message.reasoning_content %}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content + '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- else %}
{{- message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""For tokenizers without a template of their own."""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Unicode noncharacters around what a `generation` block rendered; texts that hold one are refused."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %} .. {% endgeneration %}`: marks what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance's

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return OPEN + str(caller()) + CLOSE


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template with the special tokens it may name."""

    def __init__(self, source: str, special: Mapping[str, str], where: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        self.where = where
        self.source = source
        self.special = dict(special)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{where}: line {error.lineno}: not a Jinja chat template ({error.message})") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> str:
        """The conversation as text, `generation` blocks between OPEN and CLOSE.

        `prompt` asks the template for the start of the assistant's next turn. Raises jinja2.TemplateError when the
        template refuses the messages, and whatever its expressions raise (TypeError, KeyError, ...).
        """
        return self._template.render(
            messages=[dict(message) for message in messages],
            tools=None if tools is None else list(tools),
            documents=None,
            add_generation_prompt=prompt,
            **self.special,
        )


def load_template(folder: Path, template: str | None = None) -> ChatTemplate:
    """The chat template of the tokenizer in `folder`.

    `template`: Jinja text to use instead, or the name of a template that comes with the tokenizer, or "chatml".
    Otherwise chat_template.jinja, then tokenizer_config.json's `chat_template` (its "default" where it names several),
    then ChatML. Raises DataError when it is not valid or not there.
    """
    config_path = folder / CONFIG_FILE
    config = _read_config(config_path)
    special = {name: text for name in SPECIAL_NAMES if (text := _content(config.get(name))) is not None}
    named = _named(folder, config)
    if template is not None and "{" in template:
        return ChatTemplate(template, special, "the chat template given")
    if template is not None and template != "chatml" and template not in named:
        known = ", ".join(sorted({*named, "chatml"}))
        raise DataError(f"{folder}: no chat template is called {template!r}; there are {known}. Or give Jinja text.")
    if template != "chatml" and (chosen := template or "default") in named:
        source, where = named[chosen]
        return ChatTemplate(source, special, where)
    return ChatTemplate(CHATML, special, "the built-in ChatML template")


def _named(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Name -> (text, where it is from); a file beside the config wins over the config."""
    found: dict[str, tuple[str, str]] = {}
    value, where = config.get("chat_template"), str(folder / CONFIG_FILE)
    if isinstance(value, str):
        found["default"] = (value, where)
    elif isinstance(value, list):
        for entry in value:
            if not (isinstance(entry, dict) and isinstance(entry.get("template"), str)):
                raise DataError(f"{where}: `chat_template` is a list, but not of objects with name and template")
            found[str(entry.get("name"))] = (entry["template"], where)
    elif value is not None:
        raise DataError(f"{where}: `chat_template` is neither text nor a list of named templates")
    files = [("default", folder / TEMPLATE_FILE)]
    files += [(path.stem, path) for path in sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))]
    for name, path in files:
        if path.is_file():
            found[name] = (path.read_text(encoding="utf-8"), str(path))
    return found


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: must be JSON that describes the tokenizer ({error})") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: must be a JSON object")
    return config


def _content(token: Any) -> str | None:
    """Hugging Face writes a special token as its text or as {"content": text, ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
