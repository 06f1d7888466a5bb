"""From prompt text and media to token ids, pixels, and the grid that each run of tokens lies in.

SGLang imports every module of this package; each names the models it is for. :mod:`.prompt` is what they share.
"""
