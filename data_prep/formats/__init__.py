"""Readers of the file formats that corpora come in. Damage is reported with its place; nothing is lost in silence."""
