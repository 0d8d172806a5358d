"""Configuration of Ouro, a looped language model (arXiv 2510.25741), for the transformers library."""

from typing import Any

from transformers import PretrainedConfig


class OuroConfig(PretrainedConfig):
    """`num_hidden_layers` layers that are used `total_ut_steps` times over.

    `early_exit_threshold` q: a token's prediction is read at the first loop where the CDF of its exit distribution
    reaches q; 1.0 reads the last loop. `early_exit_step` (0-based) fixes the loop instead. Both can be set per call.
    """

    model_type = "ouro"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    def __init__(
        self,
        vocab_size: int = 49152,
        hidden_size: int = 2048,
        intermediate_size: int = 5632,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 65536,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        rope_theta: float = 10000.0,
        rope_parameters: dict[str, Any] | None = None,
        attention_dropout: float = 0.0,
        total_ut_steps: int = 4,
        early_exit_threshold: float = 1.0,
        early_exit_step: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta, **(rope_parameters or {})}
        self.attention_dropout = attention_dropout
        self.total_ut_steps = total_ut_steps
        self.early_exit_threshold = early_exit_threshold
        self.early_exit_step = early_exit_step
        if kwargs.get("rope_scaling") is None:
            kwargs.pop("rope_scaling", None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self._check()

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embeddings."""
        return self.rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters["rope_theta"] = value

    def to_dict(self) -> dict[str, Any]:
        """With rope_theta beside rope_parameters: older readers of this layout look for it."""
        return {**super().to_dict(), "rope_theta": self.rope_theta}

    def _check(self) -> None:
        rope_type = self.rope_parameters.get("rope_type", "default")
        if rope_type != "default":
            raise ValueError(f"rope_type {rope_type!r}: Ouro uses plain rotary embeddings (rope_type 'default')")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act {self.hidden_act!r}: Ouro's feed-forward is SwiGLU (hidden_act 'silu')")
        if self.total_ut_steps < 1:
            raise ValueError(f"total_ut_steps {self.total_ut_steps}: at least 1")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings: Ouro's embedding and head are separate tensors")


__all__ = ["OuroConfig"]
