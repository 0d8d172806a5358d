"""Trains looped language models on Megatron-Core."""

from ouro_megatron import lean_imports

lean_imports.install()
