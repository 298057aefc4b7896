"""`p2o view`: a page on the loopback address that shows runs while they train and afterwards."""

import hashlib
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from megatron_p2o.terminal import say
from megatron_p2o.view import panels
from megatron_p2o.view.runs import ViewedRun

ASSETS = Path(__file__).parent / "assets"

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""Content types of our own files, by ending; no other file is given out."""

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Names under which the page may be asked for. Another one is a foreign page that had a name point here."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""The charts set the sizes of their own boxes, which is a style of an element; scripts come from our files only."""


def serve_runs(run_dirs: Sequence[Path], port: int) -> None:
    """Serve the page until interrupted.

    Args:
        port: 0 takes a free one.

    Raises:
        ValueError: one of them is no run folder, or the port is in use.
    """
    token = secrets.token_urlsafe(16)
    app = make_app([ViewedRun(directory) for directory in run_dirs], token)
    bound = _listen(port)
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    _Server(config, bound.getsockname()[1], token).run(sockets=[bound])


class _Server(uvicorn.Server):
    """Tells its address once it serves: from then on a signal ends it, even one that a shell lets be ignored."""

    def __init__(self, config: uvicorn.Config, port: int, token: str) -> None:
        super().__init__(config)
        self._port = port
        self._token = token

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        port = self._port
        say(f"p2o view: http://127.0.0.1:{port}/{self._token}/")
        say(f"The address holds a secret. From another machine, first: ssh -L {port}:127.0.0.1:{port} HOST")


def _listen(port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(("127.0.0.1", port))
        bound.listen()
    except OSError as error:
        bound.close()
        raise ValueError(f"port {port} cannot be used ({error.strerror}): choose another with --port, or 0") from error
    return bound


def make_app(runs: Sequence[ViewedRun], token: str) -> Starlette:
    """Return the application; every address begins with the token."""
    of_all_panels = {**panels.OF_ALL, "report": panels.RememberedReport()}

    def run_of(request: Request) -> ViewedRun | None:
        number = request.path_params["number"]
        return runs[number] if number < len(runs) else None

    async def of_all(request: Request) -> Response:
        panel = of_all_panels.get(request.path_params["panel"])
        return await _json(request, lambda: panel(runs)) if panel else _missing()

    async def of_run(request: Request) -> Response:
        run, panel = run_of(request), panels.OF_RUN.get(request.path_params["panel"])
        return await _json(request, lambda: panel(run)) if run is not None and panel else _missing()

    async def problem(request: Request) -> Response:
        run, problem_id = run_of(request), request.query_params.get("id", "")
        numbers = [number for number in request.query_params.get("steps", "").split(",") if number]
        if run is None or not all(number.isdecimal() for number in numbers):
            return _missing()
        return await _json(request, lambda: panels.problem_panel(run, problem_id, list(map(int, numbers))))

    async def reflection(request: Request) -> Response:
        run, asked = run_of(request), request.query_params
        number = asked.get("proposal", "")
        if run is None or not number.isdecimal():
            return _missing()
        return await _json(request, lambda: panels.reflection_panel(run, asked.get("round", ""), int(number)))

    return Starlette(
        routes=[
            Route(f"/{token}/", _asset),
            Route(f"/{token}/assets/{{name:path}}", _asset),
            Route(f"/{token}/api/{{panel:str}}", of_all),
            Route(f"/{token}/api/run/{{number:int}}/problem", problem),
            Route(f"/{token}/api/run/{{number:int}}/reflection", reflection),
            Route(f"/{token}/api/run/{{number:int}}/{{panel:str}}", of_run),
        ],
        middleware=[],
        exception_handlers={404: _not_found},
    )


async def _asset(request: Request) -> Response:
    path = (ASSETS / request.path_params.get("name", "index.html")).resolve()
    kind = KINDS.get(path.suffix)
    if not _is_from_loopback(request) or kind is None or ASSETS.resolve() not in path.parents or not path.is_file():
        return _missing()
    return Response(path.read_bytes(), media_type=kind, headers=HEADERS)


async def _json(request: Request, make: Callable[[], object]) -> Response:
    """Return what `make` gives; nothing but the status when the page has it already."""
    if not _is_from_loopback(request):
        return _missing()
    body = await run_in_threadpool(lambda: panels.encoded(make()))
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={**HEADERS, "ETag": tag})
    return Response(body, media_type="application/json", headers={**HEADERS, "ETag": tag})


def _is_from_loopback(request: Request) -> bool:
    host = request.headers.get("host", "")
    return (host if host.endswith("]") else host.rpartition(":")[0] or host) in LOOPBACK


def _missing() -> Response:
    return PlainTextResponse("There is nothing here.", status_code=404, headers=HEADERS)


async def _not_found(_request: Request, _error: Exception) -> Response:
    return _missing()
