"""lm-evaluation-harness's own command line, with the model type `ouro_megatron` known to it."""

from lm_eval.__main__ import cli_evaluate

from ouro_megatron.evaluation import harness

if __name__ == "__main__":
    assert harness.OuroMegatronLM, "importing it registers it"
    cli_evaluate()
