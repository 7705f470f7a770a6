"""An OpenAI-compatible server over MoTEEngine, for `mote serve`.

    guard.py     who may ask: Host, Origin, keys                policy.py   what the operator allows
    protocol.py  a body becomes an Ask, or an error             loop.py     the one thread that owns the engine
    replies.py   events become OpenAI's objects                 streaming.py  and server-sent events
    encoder.py   text to token ids, in a thread                 app.py      the routes
    metrics.py   numbers for Prometheus                         run.py      sockets, signals, draining
    load.py      the load of `mote bench serve`                 page/       the page at /

Starlette and uvicorn are an extra; what needs them imports them in its own file, after require_packages().
"""

from importlib.util import find_spec


def require_packages() -> None:
    """ImportError that says what to install where the server's packages are missing."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ImportError(f"mote serve needs {' and '.join(missing)}: pip install 'mote_ext[serve]'")
