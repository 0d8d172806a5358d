"""The `ouro` command. Each module here parses one group of subcommands and calls one function elsewhere."""

from ouro_megatron.cli.main import main

__all__ = ["main"]
