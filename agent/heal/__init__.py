"""Heal replies: bpf/heal.c sets their source, and this folder tells it where."""
