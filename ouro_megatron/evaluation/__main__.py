"""lm-evaluation-harness's own command line, with the model type `ouro_megatron` known to it."""

from lm_eval.__main__ import cli_evaluate

import ouro_megatron.evaluation.harness  # noqa: F401  (importing it registers the model type)

if __name__ == "__main__":
    cli_evaluate()
