"""lm-evaluation-harness's own command line, with the model type `ouro_megatron` known to it."""

from lm_eval.__main__ import cli_evaluate

import ouro_megatron.evaluation.harness  # noqa: F401  (importing it registers the model type)


def main() -> None:
    """Reads sys.argv."""
    cli_evaluate()


if __name__ == "__main__":
    main()
