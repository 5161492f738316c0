# What type checkers see of the door: the names that __init__.py loads when they are first used.

from typing import Any

from harken import events as events, explain as explain, green as green, testing as testing
from harken.alongside import background as background
from harken.async_handlers import (
    AsyncRequestHandler as AsyncRequestHandler,
    AsyncStreamRequestHandler as AsyncStreamRequestHandler,
)
from harken.drain import DrainReport as DrainReport
from harken.errors import (
    ConfigError as ConfigError,
    ConnectionClosed as ConnectionClosed,
    DeadlineExceeded as DeadlineExceeded,
    FrameError as FrameError,
    HandoffError as HandoffError,
    HarkenError as HarkenError,
    LifecycleError as LifecycleError,
    LimitExceeded as LimitExceeded,
    PeerError as PeerError,
    PreambleError as PreambleError,
)
from harken.handlers import (
    BaseRequestHandler as BaseRequestHandler,
    DatagramRequestHandler as DatagramRequestHandler,
    StreamRequestHandler as StreamRequestHandler,
)
from harken.mixins import (
    AsyncMixIn as AsyncMixIn,
    ForkingMixIn as ForkingMixIn,
    GreenMixIn as GreenMixIn,
    PoolMixIn as PoolMixIn,
    ThreadingMixIn as ThreadingMixIn,
)
from harken.peer import Peer as Peer
from harken.preambles.proxy_header import (
    ProxyHeader as ProxyHeader,
    ProxySSL as ProxySSL,
)
from harken.preambles.tls import TLS as TLS
from harken.process.service import serve as serve
from harken.process.start import start as start
from harken.records import ConnectionInfo as ConnectionInfo
from harken.server import (
    BaseServer as BaseServer,
    TCPServer as TCPServer,
    UDPServer as UDPServer,
    UnixDatagramServer as UnixDatagramServer,
    UnixStreamServer as UnixStreamServer,
)
from harken.servers import (
    AsyncTCPServer as AsyncTCPServer,
    AsyncUDPServer as AsyncUDPServer,
    AsyncUnixStreamServer as AsyncUnixStreamServer,
    ForkingTCPServer as ForkingTCPServer,
    ForkingUDPServer as ForkingUDPServer,
    ForkingUnixDatagramServer as ForkingUnixDatagramServer,
    ForkingUnixStreamServer as ForkingUnixStreamServer,
    GreenTCPServer as GreenTCPServer,
    GreenUDPServer as GreenUDPServer,
    GreenUnixStreamServer as GreenUnixStreamServer,
    PoolTCPServer as PoolTCPServer,
    PoolUDPServer as PoolUDPServer,
    PoolUnixStreamServer as PoolUnixStreamServer,
    ThreadingTCPServer as ThreadingTCPServer,
    ThreadingUDPServer as ThreadingUDPServer,
    ThreadingUnixDatagramServer as ThreadingUnixDatagramServer,
    ThreadingUnixStreamServer as ThreadingUnixStreamServer,
)

__version__: str
_SocketWriter: Any  # programs replace it in the module that they call socketserver
