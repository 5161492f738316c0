# SPDX-License-Identifier: MIT
"""harken's green engine with handlers that are started at the first byte (`lazy`)."""

from _work import make_handler, parse, serve

import harken

options = parse()
handler = make_handler(harken, options.work)
handler.lazy = True
serve(harken, "GreenTCPServer", options=options, handler=handler)
