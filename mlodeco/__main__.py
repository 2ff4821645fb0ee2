"""``python -m mlodeco``, which launchers of several processes need."""

from mlodeco.cli import main

main()
