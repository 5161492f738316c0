# SPDX-License-Identifier: MIT
"""harken's thread engine with reuse_threads: idle threads are taken up again."""

from _work import serve

import harken

serve(harken, "ThreadingTCPServer", "ThreadingUDPServer", reuse_threads=True)
