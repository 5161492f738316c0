"""Tell the time to whoever asks by a datagram, with one changed import.

python examples/udp_time.py, then: echo | nc -u -w1 127.0.0.1 8813
"""

import datetime as dt
import sys

import harken as socketserver


class Time(socketserver.DatagramRequestHandler):
    def handle(self):
        now = dt.datetime.now(dt.UTC)
        self.wfile.write(now.isoformat(timespec="seconds").encode() + b"\n")


if __name__ == "__main__":
    port = int(sys.argv[1]) if sys.argv[1:] else 8813
    with socketserver.UDPServer(("127.0.0.1", port), Time) as server:
        print("serving on", *server.server_address, flush=True)
        server.serve_forever()
