"""One file a claim; `python -m experiments.NAME` from the repository's root."""
