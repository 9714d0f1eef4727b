"""Fine-tuning on tasks of prompts and answers.

Nothing is imported here, so that `datamodules.sft.prepare` starts without torch or lightning.
"""
