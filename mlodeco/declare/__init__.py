"""What the decorators record: no torch, nothing built, nothing run."""
