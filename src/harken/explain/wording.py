"""How the renderers say things that they all say."""

from __future__ import annotations

from harken.explain.model import Call, Explanation, Trace

__all__ = ["heading", "raised_here", "thread_name", "title"]


def heading(explanation: Explanation) -> str:
    """Say in one line what is explained."""
    engine = "process_request of your own" if explanation.engine == "own" else f"engine {explanation.engine}"
    handler = f", handler {explanation.handler}" if len(explanation.families) > 1 else ""
    return f"{explanation.server}: {explanation.transport}, {engine}{handler}"


def title(trace: Trace) -> str:
    """Say what was traced."""
    what = {"udp": "UDP datagram", "unixgram": "Unix datagram", "unix": "Unix connection"}
    return f"One {what.get(trace.transport, 'TCP connection')}"


def thread_name(call: Call) -> str:
    """Return where a call ran; the part of a thread's name that only repeats the hook is left out."""
    return call.thread.removesuffix(" (process_request_thread)")


def raised_here(trace: Trace, number: int) -> bool:
    """Tell whether an error began in this call, and did not only pass through it."""
    call = trace[number]
    if not call.error:
        return False
    for inner in trace[number + 1 :]:
        if inner.depth <= call.depth:
            break
        if inner.error == call.error:
            return False
    return True
