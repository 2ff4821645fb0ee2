"""Checkpoints: the state of a run, how it is written and found again, and how a run goes on."""
