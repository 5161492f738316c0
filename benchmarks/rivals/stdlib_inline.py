# SPDX-License-Identifier: MIT
"""socketserver without a mix-in: one client at a time."""

import socketserver

from _work import serve

serve(socketserver, "TCPServer", "UDPServer")
