# SPDX-License-Identifier: MIT
"""harken's green engine: a green thread for each connection, on the hub in use (HARKEN_HUB chooses)."""

from _work import serve

import harken

serve(harken, "GreenTCPServer", "GreenUDPServer")
