"""What a process has counted, put together: servers come and go meanwhile."""

import socket

from waiting import wait_until

import harken
from harken.observe.collector import Collector

PATIENCE = 10.0


class Hold(harken.BaseRequestHandler):
    """Reads until the end."""

    def handle(self):
        """Until the end."""
        while self.request.recv(100):
            pass


def test_a_closed_server_is_let_go_when_its_connections_have_ended():
    """Not before; and what it has counted stays."""
    with harken.ThreadingTCPServer(("127.0.0.1", 0), Hold) as server:
        serving, servers = server._harken, [server]
        serving.books.measure()
        collector = Collector(lambda: [each._harken for each in servers])
        where = (serving.address(),)

        def number(name, *more):
            return collector.collect().number(name, (*where, *more))

        with socket.create_connection(server.server_address, PATIENCE) as client:
            server.handle_request()
            client.sendall(b"123")
            collector.leave(serving, servers.clear)
            for _ in range(3):
                collector._bury()
            assert number("harken_connections_open") == 1
        wait_until(lambda: not serving.connections)
        server.server_close()
        for _ in range(2):
            collector._bury()
        serving.books.counts["opened"] += 1  # nobody looks any more
        assert number("harken_connections_opened_total") == 1
        assert number("harken_connections_closed_total", "peer_closed") == 1
        assert number("harken_received_bytes_total") == 3
        assert collector.collect().number("harken_stalls_total") == 0
