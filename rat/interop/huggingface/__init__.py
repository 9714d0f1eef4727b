"""Models in the conventions of Hugging Face's transformers: the classes, and folders that load without this package.

`configuration`, `cache` and `modeling` import transformers, and travel with an exported model; the rest does not.
"""
