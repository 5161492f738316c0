# SPDX-License-Identifier: MIT
"""harken's green engine with everything on that watches over handlers and connections."""

from _work import serve

import harken

serve(harken, "GreenTCPServer", stall_after=0.1)
