# SPDX-License-Identifier: MIT
"""harken's fork engine: a child process for each connection."""

from _work import serve

import harken

serve(harken, "ForkingTCPServer", "ForkingUDPServer")
