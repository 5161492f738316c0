# SPDX-License-Identifier: MIT
"""harken's pool engine with as many threads as the largest scenario has connections, so that none has to wait."""

from _work import serve

import harken

serve(harken, "PoolTCPServer", "PoolUDPServer", pool_size=128)
