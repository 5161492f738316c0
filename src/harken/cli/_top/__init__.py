"""What ``harken top`` is made of. Imported with textual, when the command runs."""
