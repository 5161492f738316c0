"""Connections that the compiled hub takes from door to end: plain ones, and those of a guarded server."""
