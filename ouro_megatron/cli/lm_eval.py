"""`ouro lm_eval`: lm-evaluation-harness' own command line with the model type `ouro_megatron` known to it."""

import sys
import warnings

import typer


def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness' own command line; it knows --model ouro_megatron then.

    The harness finds no models of other packages by itself, so put `ouro` in front of its command. All options are its
    own (`ouro lm_eval run --help`). `ouro benchmark` runs tasks at several exits at once.

    Example:

        ouro lm_eval --model ouro_megatron --model_args pretrained=runs/demo/4-gate,exit=q=0.7 --tasks arc_easy
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from ouro_megatron.evaluation.benchmark import require_harness

    require_harness()
    from ouro_megatron.evaluation.__main__ import main

    sys.argv = ["lm_eval", *context.args]
    main()
