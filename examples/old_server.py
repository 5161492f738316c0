"""The program that everybody begins with, written for `socketserver` and left as it is.

harken run --engine pool examples/old_server.py
"""

import socketserver
import sys


class MyServer(socketserver.BaseRequestHandler):
    def handle(self):
        while True:
            data = self.request.recv(1024)
            if not data:
                break
            self.request.sendall(data.upper())


if __name__ == "__main__":
    port = int(sys.argv[1]) if sys.argv[1:] else 8800
    server = socketserver.ThreadingTCPServer(("127.0.0.1", port), MyServer)
    print("serving on", *server.server_address, flush=True)
    server.serve_forever()
