# SPDX-License-Identifier: MIT
"""Twisted: protocols on its epoll reactor."""

from _work import BACKLOG, HOST, parse
from twisted.internet import epollreactor

epollreactor.install()

from twisted.internet import protocol, reactor  # noqa: E402 - the reactor is installed first
from twisted.protocols.basic import LineReceiver  # noqa: E402


class Echo(protocol.Protocol):
    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)


class Lines(LineReceiver):
    delimiter = b"\n"

    def lineReceived(self, line: bytes) -> None:
        self.sendLine(line)


class Datagrams(protocol.DatagramProtocol):
    def datagramReceived(self, datagram: bytes, addr: tuple[str, int]) -> None:
        self.transport.write(datagram, addr)


options = parse()
if options.work == "udp":
    port = reactor.listenUDP(0, Datagrams(), interface=HOST)
else:
    factory = protocol.Factory.forProtocol(Lines if options.work == "lines" else Echo)
    port = reactor.listenTCP(0, factory, backlog=BACKLOG, interface=HOST)
print(port.getHost().port, flush=True)
reactor.run()
