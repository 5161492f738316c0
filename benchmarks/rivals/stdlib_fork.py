# SPDX-License-Identifier: MIT
"""socketserver's ForkingMixIn: a child process for each connection."""

import socketserver

from _work import serve

serve(socketserver, "ForkingTCPServer", "ForkingUDPServer")
