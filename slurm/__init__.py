"""The batch script that `ouro submit` fills in for each stage (see ouro_megatron/cluster/script.py)."""
