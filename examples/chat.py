"""A room for talking in lines: everybody hears what each one says, and who comes and goes.

harken serve examples/chat.py:Chat, then, in several terminals: nc 127.0.0.1 8800
"""

import contextlib
import threading

import harken


class Chat(harken.StreamRequestHandler):
    room: "dict[str, Chat]" = {}  # noqa: RUF012 - the room is shared: by name, who is in it
    lock = threading.Lock()

    def handle(self):
        self.wfile.write(b"your name? ")
        name = self.rfile.readline(64).decode(errors="replace").strip()
        with self.lock:
            free = name != "" and self.room.setdefault(name, self) is self
        if not free:
            self.wfile.write(b"that name cannot be had\n")
            return
        self.say(f"* {name} is here")
        try:
            for line in self.rfile:
                self.say(f"{name}: {line.decode(errors='replace').strip()}")
        finally:
            with self.lock:
                del self.room[name]
            self.say(f"* {name} has left")

    def say(self, text):
        with self.lock:
            present = list(self.room.values())
        for member in present:
            with contextlib.suppress(OSError):  # one who is leaving
                member.wfile.write(text.encode() + b"\n")
