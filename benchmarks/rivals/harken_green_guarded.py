# SPDX-License-Identifier: MIT
"""harken's green engine with everything on that watches over handlers and connections."""

from _work import serve

import harken

serve(
    harken,
    "GreenTCPServer",
    stall_after=0.1,
    idle_timeout=300,
    read_timeout=60,
    write_timeout=30,
    lifetime=86400,
    max_connections=20000,
    max_connections_per_peer=20000,
    deny=["192.0.2.0/24"],
)
