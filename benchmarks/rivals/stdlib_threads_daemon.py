# SPDX-License-Identifier: MIT
"""socketserver's ThreadingMixIn with daemon_threads, which spares it the list of threads."""

import socketserver

from _work import serve

serve(socketserver, "ThreadingTCPServer", "ThreadingUDPServer", daemon=True)
