"""What goes wrong on a bad day, made to happen: errors of the kernel, floods, exhaustion, kills, signals."""
