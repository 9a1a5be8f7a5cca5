"""Questions asked of the method: python -m experiments.NAME."""
