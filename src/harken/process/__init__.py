"""Processes: what runs servers until a signal says otherwise."""
