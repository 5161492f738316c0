# SPDX-License-Identifier: MIT
"""harken without a mix-in: one client at a time."""

from _work import serve

import harken

serve(harken, "TCPServer", "UDPServer")
