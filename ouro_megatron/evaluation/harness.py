"""Looped models in lm-evaluation-harness, at any exit: the model type `ouro_megatron`.

    ouro lm_eval --model ouro_megatron \\
        --model_args pretrained=runs/demo/4-gate,exit=step=2 --tasks my_task --include_path tasks/

is the harness's own command with the model type known. `ouro benchmark` runs tasks at several exits at once.
"""

from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from ouro_megatron.errors import RecipeError
from ouro_megatron.evaluation.likelihood import Continuation
from ouro_megatron.evaluation.session import ModelSession, Prompt
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.inference.request import Sampling

_MAX_ANSWER = 256
"""Tokens of an answer where a task does not say."""


@register_model("ouro_megatron")
class OuroMegatronLM(TemplateLM):
    """`pretrained`: a checkpoint, run folder or published folder. `exit`: all, step=2, q=0.8, change=0.1 or expected.
    `loops`: at most; the training's when left out. `max_length`: tokens of context and answer together."""

    def __init__(
        self,
        pretrained: str,
        exit: str = "all",
        loops: int | None = None,
        batch_size: int | str | None = 8,
        device: str | None = "cpu",
        max_length: int | None = None,
        dtype: str = "fp32",
        session: ModelSession | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)
        if unknown:
            raise RecipeError(f"model_args: {', '.join(sorted(unknown))}: not known to ouro_megatron")
        if dtype not in ("fp32", "bf16"):
            raise RecipeError(f"model_args: dtype {dtype!r}: fp32 or bf16")
        batch = int(str(batch_size)) if str(batch_size).isdigit() else 8
        self.session = session or ModelSession(
            Path(pretrained),
            device=device or "cpu",
            batch=batch,
            dtype=dtype,  # type: ignore[arg-type]
        )
        self.loops = int(loops) if loops else self.session.trained_loops
        self.max_length = int(max_length) if max_length else self.session.max_length
        self.policy = ExitPolicy.parse(str(exit))
        self.policy.check(self.loops)
        self.depths: list[float] = []
        """Mean exit loop of every request since the last `set_exit`."""

    def set_exit(self, policy: ExitPolicy, loops: int) -> None:
        """Reads the model at another depth from now on. Raises RequestError for a step beyond `loops`."""
        policy.check(loops)
        self.policy, self.loops, self.depths = policy, loops, []

    @property
    def eot_token_id(self) -> int:
        return self.session.tokenizer.eod

    @property
    def tokenizer_name(self) -> str:
        return str(self.session.folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.session.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        wanted = [Continuation(context or [self.prefix_token_id], tokens) for _, context, tokens in requests]
        with tqdm(total=len(wanted), desc=f"log-likelihoods, {self.policy}", disable=disable_tqdm) as bar:
            scored = self.session.score(wanted, self.policy, self.loops, self.max_length, bar.update)
        self.depths += [item.depth for item in scored]
        answers = [(item.logprob, item.greedy) for item in scored]
        for (pair, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in windows of `max_length`, each token once."""
        windows: list[Continuation] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for pair in utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                context, tokens = utils.make_disjoint_window(pair)
                windows.append(Continuation(context, tokens))
                owners.append(number)
        with tqdm(total=len(windows), desc=f"texts, {self.policy}", disable=disable_tqdm) as bar:
            scored = self.session.score(windows, self.policy, self.loops, self.max_length, bar.update)
        self.depths += [item.depth for item in scored]
        totals = [0.0] * len(requests)
        for owner, item in zip(owners, scored, strict=True):
            totals[owner] += item.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, greedy unless the task asks for sampling; contexts are cut from the left to leave them room."""
        prompts = [self._prompt(*request.args) for request in requests]
        with tqdm(total=len(prompts), desc=f"answers, {self.policy}", disable=disable_tqdm) as bar:
            answers = self.session.generate(prompts, self.policy, self.loops, self.max_length, bar.update)
        self.depths += [answer.depth for answer in answers if answer.tokens]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer.text)
        return [answer.text for answer in answers]

    def _prompt(self, context: str, settings: dict[str, Any]) -> Prompt:
        stop = settings.get("until") or []
        answer = int(settings.get("max_gen_toks") or settings.get("max_tokens") or _MAX_ANSWER)
        answer = max(1, min(answer, self.max_length - 1))
        tokens = self.tok_encode(context)[-(self.max_length - answer) :] or [self.prefix_token_id]
        sampling = Sampling()
        if settings.get("do_sample") or float(settings.get("temperature") or 0.0) > 0:
            top_k = settings.get("top_k")
            sampling = Sampling(
                temperature=float(settings.get("temperature") or 1.0),
                top_k=int(top_k) if top_k else None,
                top_p=float(settings["top_p"]) if settings.get("top_p") else None,
                seed=int(settings.get("seed") or 0),
            )
        return Prompt(tuple(tokens), answer, tuple([stop] if isinstance(stop, str) else stop), sampling)
