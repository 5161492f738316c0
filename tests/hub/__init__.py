"""Tests of the hub, of both kinds."""
