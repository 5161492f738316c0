# SPDX-License-Identifier: MIT
"""harken's thread engine with the drop-in's defaults: a new thread for each connection."""

from _work import serve

import harken

serve(harken, "ThreadingTCPServer", "ThreadingUDPServer")
