# SPDX-License-Identifier: MIT
"""socketserver's ThreadingMixIn as everybody writes it: a new thread for each connection."""

import socketserver

from _work import serve

serve(socketserver, "ThreadingTCPServer", "ThreadingUDPServer")
