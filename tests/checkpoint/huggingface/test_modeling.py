"""The modelling code of an exported folder, through transformers' own API, against the reference."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ouro_megatron.checkpoint.huggingface.export import ExportSettings, export
from ouro_megatron.checkpoint.huggingface.importer import import_pretrained
from tests.checkpoint.huggingface.published import CONFIG, reference, write_published
from tests.distributed.ranks import run_ranks
from tests.reference.looplm import ReferenceLoopLM, exit_probabilities, reference_generate

PROMPT = [3, 17, 5, 40, 9]
SHORT = [7, 22]


def export_unchecked(source: Path, target: Path) -> None:
    export(source, target, ExportSettings(dtype="fp32", check=False, exit_threshold=0.9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("modeling")
    source = write_published(root / "published", dict(reference().state_dict()))
    import_pretrained(source, root / "imported")
    run_ranks(export_unchecked, 1, root / "imported", root / "exported")
    return root / "exported"


def load(folder: Path, **overrides: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **overrides)
    # Greedy reference generation goes on after the end of a document.
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    yield load(folder)


@pytest.fixture(scope="module")
def oracle() -> ReferenceLoopLM:
    return reference()


def cache_of(output: Any) -> Any:
    """transformers renamed it."""
    return output["cache"] if "cache" in output else output["past_key_values"]


def generate(model: Any, prompt: list[int], new: int = 10, **settings: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **settings)
    return out[0, len(prompt) :].tolist()


def test_logits_and_exits_of_every_loop(model: Any, oracle: ReferenceLoopLM) -> None:
    tokens = torch.randint(CONFIG.vocab, (3, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        outputs = oracle(tokens)
        for loop, output in enumerate(outputs):
            assert (model(tokens, exit_at_step=loop).logits - output.logits_bsv).abs().max() < 2e-5
        wanted_p = torch.stack(exit_probabilities(outputs), dim=-1)
        found = model(tokens, exit_threshold=0.6, output_hidden_states=True)
        assert (found.exit_probabilities - wanted_p).abs().max() < 3e-6
        depth = (wanted_p.cumsum(-1) >= 0.6).int().argmax(-1)
        assert len(depth.unique()) > 1, "the test's gate lets all tokens leave at one loop"
        assert torch.equal(found.exit_loops, depth)
        assert (found.hidden_states[2] - outputs[2].hidden_bsh).abs().max() < 2e-5
        stacked = torch.stack([output.logits_bsv for output in outputs], dim=2)
        chosen = stacked.gather(2, depth[..., None, None].expand(-1, -1, 1, CONFIG.vocab)).squeeze(2)
        assert (found.logits - chosen).abs().max() < 2e-5
        weighted = model(tokens, use_weighted_exit=True).logits
        assert (weighted - (stacked * wanted_p[..., None]).sum(2)).abs().max() < 2e-5
        assert (
            model(tokens, logits_to_keep=2, exit_at_step=1).logits - outputs[1].logits_bsv[:, -2:]
        ).abs().max() < 2e-5


def test_the_eager_attention_agrees(folder: Path, model: Any) -> None:
    eager = load(folder, attn_implementation="eager")
    ids = torch.tensor([[0, 0, *PROMPT], [0, 0, *reversed(PROMPT)]])
    mask = (torch.arange(7) >= 2).long().expand(2, -1)
    with torch.no_grad():
        one, other = (m(ids, attention_mask=mask).logits[:, 2:] for m in (eager, model))
    assert (one - other).abs().max() < 2e-5


@pytest.mark.parametrize(("q", "loops"), [(0.0, 4), (0.3, 4), (0.6, 7), (1.0, 7)])
def test_cached_generation_equals_recomputation(model: Any, oracle: ReferenceLoopLM, q: float, loops: int) -> None:
    wanted, depths = reference_generate(oracle, PROMPT, 10, loops, None if q == 1.0 else q)
    model.config.total_ut_steps = loops
    try:
        assert generate(model, PROMPT, exit_threshold=q) == wanted, depths
        assert generate(model, PROMPT, exit_threshold=q, use_cache=False) == wanted
    finally:
        model.config.total_ut_steps = CONFIG.loops


def test_config_settings_are_honoured(folder: Path, oracle: ReferenceLoopLM) -> None:
    assert generate(load(folder), PROMPT) == reference_generate(oracle, PROMPT, 10, 4, 0.9)[0]  # from config.json
    fewer = load(folder, total_ut_steps=2, early_exit_threshold=1.0)
    assert generate(fewer, PROMPT) == reference_generate(oracle, PROMPT, 10, 2)[0]
    fixed = load(folder, early_exit_step=0)
    assert generate(fixed, PROMPT) == reference_generate(oracle, PROMPT, 10, 1)[0]


def test_left_padded_batches_are_their_sequences(model: Any) -> None:
    for settings in ({"exit_at_step": 1}, {"exit_threshold": 0.6}, {"exit_threshold": 1.0}, {"num_beams": 2}):
        ids = torch.tensor([PROMPT, [0] * 3 + SHORT])
        mask = torch.tensor([[1] * 5, [0] * 3 + [1] * 2])
        batch = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **settings)
        assert batch[0, 5:].tolist() == generate(model, PROMPT, 8, **settings)
        assert batch[1, 5:].tolist() == generate(model, SHORT, 8, **settings)


def test_the_cache_has_an_entry_for_each_loop_and_layer(model: Any) -> None:
    from transformers import DynamicCache, StaticCache

    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        assert len(cache_of(model(ids))) == CONFIG.loops * CONFIG.layers
        assert len(cache_of(model(ids, exit_at_step=1))) == 2 * CONFIG.layers
        given = DynamicCache(config=model.config)
        model(ids, past_key_values=given)
        assert [layer.get_seq_length() for layer in given.layers] == [5] * CONFIG.loops * CONFIG.layers
        short = cache_of(model(ids, exit_at_step=1))
        with pytest.raises(ValueError, match="in loop 3"):
            model(ids[:, :1], past_key_values=short)
        with pytest.raises(ValueError, match="use a DynamicCache"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))


@pytest.mark.parametrize(
    ("settings", "message"), [({"exit_at_step": 4}, "exit_at_step 4"), ({"exit_threshold": 1.5}, "exit_threshold 1.5")]
)
def test_settings_out_of_range(model: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([PROMPT]), **settings)


def test_saved_again_it_is_the_same(model: Any, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(saved)
    again = load(saved)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, saved))
    for key in ("rope_theta", "rope_parameters", "total_ut_steps", "early_exit_threshold", "auto_map", "head_dim"):
        assert before[key] == after[key]
    assert generate(again, PROMPT) == generate(model, PROMPT)
    # And what transformers wrote can be imported.
    import_pretrained(saved, tmp_path / "imported")


def test_it_trains(folder: Path) -> None:
    """Fine-tuning outside this project: a loss, gradients everywhere, with and without gradient checkpointing."""
    model = load(folder, early_exit_threshold=1.0).train()
    ids = torch.randint(CONFIG.vocab, (2, 12), generator=torch.Generator().manual_seed(1))
    losses = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        untouched = [name for name, p in model.named_parameters() if p.grad is None]
        assert all("early_exit_gate" in name for name in untouched)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_folder_needs_only_torch_and_transformers(folder: Path) -> None:
    for file in folder.glob("*.py"):
        for line in file.read_text().splitlines():
            if line.startswith(("import ", "from ")):
                top = line.split()[1].split(".")[0]
                assert top in {"torch", "transformers", "collections", "dataclasses", "typing", ""}, line


def test_chat_template_and_turn_end(tmp_path: Path) -> None:
    """A tokenizer with a chat template: it is carried over, and the end of a turn ends generation."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, GenerationConfig

    source = write_published(tmp_path / "published", dict(reference().state_dict()))
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(source / "tokenizer.json"))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    import_pretrained(source, tmp_path / "imported")
    run_ranks(export_unchecked, 1, tmp_path / "imported", tmp_path / "exported")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    text = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    assert loaded.padding_side == "left"
    ends = GenerationConfig.from_pretrained(tmp_path / "exported").eos_token_id
    assert ends == [0, loaded.convert_tokens_to_ids("<|im_end|>")]
    shutil.rmtree(tmp_path / "exported")
