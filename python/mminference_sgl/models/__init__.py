"""Video models that SGLang does not serve, and what lets it serve them.

:mod:`.registration` is the entry point; configurations are in :mod:`.configs`, and every other module is a model or a
part of one. What prompts and media become is in :mod:`mminference_sgl.processors`.
"""
