"""Live settings that a program changes by a server's ``configure()``, where servers share a worker."""

import asyncio

import pytest
from waiting import PATIENCE

import harken
from harken import testing


class Holds(harken.BaseRequestHandler):
    """Says hello, and stays until its client speaks."""

    def handle(self):
        """Stay."""
        self.request.sendall(b"hi")
        if self.request.recv(100) == b"more":
            self.server.configure(pool_size=3)
            self.request.recv(1)


def test_a_handler_changes_what_the_engine_has():
    """One thread; a handler asks for three, and two more clients are served while it stays."""
    with (
        testing.serve(Holds, "tcp://127.0.0.1:0", "tcp://127.0.0.1:0", engine="pool", pool_size=1) as served,
        served.connect() as first,
        served.connect() as second,
        served.connect() as third,
    ):
        assert first.recv(2) == b"hi"
        first.sendall(b"more")
        assert second.recv(2) == third.recv(2) == b"hi"


def test_all_servers_of_a_worker_follow(tmp_path):
    """What holds for all of them changes for all; a wrong value changes nothing."""
    with testing.serve(Holds, "tcp://127.0.0.1:0", f"unix:{tmp_path}/s", drain_timeout=7.0) as served:
        with pytest.raises(harken.ConfigError, match="drain_timeout"):
            served.server.configure(idle_timeout=5, drain_timeout=-1)
        served.servers[1].configure(idle_timeout=3, max_connections=1)
        assert [server.serving.settings["idle_timeout"] for server in served.servers] == [3, 3]
        assert [server.serving.settings["drain_timeout"] for server in served.servers] == [7.0, 7.0]


def test_a_drain_takes_the_time_that_was_configured():
    """From ``harken.start`` and from a test's server: who is there is cut at once, and not asked to leave."""

    async def main():
        server = await harken.start(Holds, "tcp://127.0.0.1:0", engine="thread", drain_timeout=PATIENCE)
        reader, writer = await asyncio.open_connection(*server.server_address)
        assert await reader.read(2) == b"hi"
        server.configure(drain_timeout=0)
        report = await server.drain()
        writer.close()
        return report.cut

    assert asyncio.run(main()) == 1
    with testing.serve(Holds, drain_timeout=PATIENCE) as served, served.connect() as client:
        assert client.recv(2) == b"hi"
        served.server.configure(drain_timeout=0)
        assert served.server.drain().cut == 1
