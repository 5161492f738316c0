"""Observers: they subscribe to events and write what operators read. Nothing else of harken imports this room."""
