"""Limits behind proxies: those that judge addresses judge the client, once its header has come."""

import socket

import pytest
from waiting import wait_until

import harken
from harken import ProxyHeader
from harken.serving import serving_of

from .kit import ENGINES, LOCAL, PATIENCE, TRUST, Told, dial, read_end, read_line, serving


def header(address, port=1):
    return ProxyHeader((address, port), ("2001:db8::2" if ":" in address else "192.0.2.2", 80)).encode()


@pytest.mark.parametrize("engine", ENGINES)
def test_allow_and_deny_judge_the_client(engine, tmp_path):
    """The proxy's own address counts neither for nor against; a port of 0 in the header opens no way around."""
    told = Told("rejected", "closed")
    with serving(engine, "tcp", tmp_path, allow=["192.0.2.0/24", "2001:db8::/32"], deny=["192.0.2.66"]) as server:
        for address, welcome in (
            ("192.0.2.1", True),
            ("192.0.2.66", False),
            ("198.51.100.1", False),
            ("2001:db8::1", True),
            ("2001:db9::1", False),
            ("127.0.0.1", False),
        ):
            for port in (0, 5):
                with dial(server) as client:
                    client.sendall(header(address, port))
                    if welcome:
                        assert read_line(client).startswith(f"('{address}', {port}")
                    else:
                        assert read_end(client) == b""
        assert {event.peer.address for event in told.wait("rejected", 8)} == {
            "192.0.2.66",
            "198.51.100.1",
            "2001:db9::1",
            "127.0.0.1",
        }
        assert {event.reason for event in told.wait("closed", 12)} >= {"rejected"}
        assert server.stats()["rejected_total"] == 8
    told.unsubscribe()


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine not in ("inline", "fork")])
def test_each_client_has_its_own_number(engine, tmp_path):
    """``max_connections_per_peer`` counts clients behind one proxy apart, IPv6 by its /64, on an IPv4 listener too."""
    with serving(engine, "tcp", tmp_path, max_connections_per_peer=1) as server:
        with dial(server) as one, dial(server) as two, dial(server) as three:
            for client, address in ((one, "192.0.2.1"), (two, "192.0.2.2"), (three, "2001:db8::1")):
                client.sendall(header(address))
                assert read_line(client)
            for address in ("192.0.2.1", "2001:db8::ffff"):
                with dial(server) as beyond:
                    beyond.sendall(header(address))
                    assert read_end(beyond) == b""
            with dial(server) as other_site:
                other_site.sendall(header("2001:db8:0:1::1"))
                assert read_line(other_site)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine not in ("inline", "fork")])
def test_a_change_of_settings_counts_nobody_for_the_proxy(engine, tmp_path):
    """Who is in its preamble counts for its client, once that is known, and gives that place back."""
    with serving(engine, "tcp", tmp_path, max_connections_per_peer=1) as server:
        for number in (1, 2):
            with dial(server) as client:
                wait_until(lambda: server.connections())
                server.configure(idle_timeout=100 + number)
                client.sendall(header("192.0.2.1"))
                assert read_line(client)
            wait_until(lambda: not server.connections())
        assert serving_of(server).bounds.admission._per_peer.clients == 0


def asks(server):
    """What the server has to say to a client; nothing if it was refused."""
    try:
        with dial(server) as client:
            client.sendall(header("192.0.2.1"))
            return client.recv(100)
    except ConnectionError:  # reset, perhaps as early as that
        return b""


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "inline"])
def test_who_is_still_silent_counts_too(engine, tmp_path):
    """``max_connections`` counts connections from the door on, and gives the place back when no header comes."""
    with serving(engine, "tcp", tmp_path, max_connections=1, overload="reset", preamble_timeout=0.3) as server:
        with dial(server) as silent:
            answers = [asks(server)]
            assert answers == [b""]
            while not answers[-1]:  # until the silent one's time is over
                answers.append(asks(server))
            assert read_end(silent) == b""


def test_datagrams_are_judged_by_their_client():
    """``deny`` drops the datagrams of one client behind the proxy, and no others."""

    class Echo(harken.DatagramRequestHandler):
        def handle(self):
            self.wfile.write(self.rfile.read())

    told = Told("rejected")
    server = harken.UDPServer(LOCAL, Echo, proxy="any", proxy_from=TRUST, deny=["192.0.2.66"])
    with harken.background(server), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as proxy:
        proxy.settimeout(PATIENCE)
        proxy.connect(server.server_address)
        proxy.send(header("192.0.2.66") + b"bad")
        proxy.send(header("192.0.2.1") + b"good")
        assert proxy.recv(100) == b"good"
        assert [event.peer.address for event in told.wait("rejected")] == ["192.0.2.66"]
    told.unsubscribe()
