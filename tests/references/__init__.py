"""The models that this package adds, once more: transformers' parts, and glue in plain loops written from the facts.

Nothing here comes from the package. A reference can be told to do one thing wrong (`mutant`), and the tests see that
such a reference no longer agrees.
"""
