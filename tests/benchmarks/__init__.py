"""Measurements: mlodeco beside a hand-written loop and beside other libraries.

Not tests: run them by ``python -m tests.benchmarks``. What is measured and how is in
``docs/benchmarks.md``.
"""
