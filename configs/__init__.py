"""Configs of training runs and ladders; in the wheel this folder is `clip_jax.configs`."""
