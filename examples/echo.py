"""Send back whatever comes, on TCP, Unix and UDP addresses alike.

harken serve examples/echo.py:Echo --bind tcp://127.0.0.1:8800 --bind udp://127.0.0.1:8800
"""

import harken


class Echo(harken.BaseRequestHandler):
    def handle(self):
        if isinstance(self.request, tuple):  # a datagram: its bytes, and the socket to answer by
            data, socket = self.request
            socket.sendto(data, self.client_address)
            return
        while data := self.request.recv(65536):
            self.request.sendall(data)
