"""Shards of tokens, the order they are trained in, and how they are made from text.

Nothing is imported here, so that `datamodules.pretraining` starts without torch or lightning.
"""
