# SPDX-License-Identifier: MIT
"""The parts of benchmarks/run.py: what to run, how to build it, one measured round, and the table."""
