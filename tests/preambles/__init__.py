"""Tests of the room of preambles."""
