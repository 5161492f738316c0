# SPDX-License-Identifier: MIT
"""harken's green engine with its hub inside another's loop: asyncio's, uvloop's or gevent's."""

from _work import make_handler, parse, serve

options = parse(host=("asyncio", "uvloop", "gevent"))
if options.host == "gevent":
    from gevent import monkey

    monkey.patch_all()  # so that the hub moves into gevent's

import asyncio  # noqa: E402 - what is imported from here on is patched
from typing import Any  # noqa: E402

import harken  # noqa: E402
from harken import green  # noqa: E402

Handler: Any = make_handler(harken, options.work)


class Guest(Handler):
    """Its first connection moves the hub into the loop, once for all."""

    def setup(self) -> None:
        del Guest.setup
        green.wait(asyncio.sleep(0))
        self.setup()


if options.host == "gevent":
    serve(harken, "GreenTCPServer", options=options)
else:
    serve(harken, "GreenTCPServer", options=options, handler=Guest, loop=options.host)
