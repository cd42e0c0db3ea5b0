"""The pack's HTTP routes.

POST /sude/finish ends a training early and lets the graph go on with what there is; GET /sude/trainings says what there
is to see.
"""

import logging
from urllib.parse import urlsplit

from aiohttp import web

from ..host import live
from ..host.progress import finish_early


def same_origin(headers, host: str) -> bool:
    """Whether a request comes from a page of this server, or from no page at all (a script)."""
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    if site is not None and site not in ("same-origin", "none"):
        return False
    return origin is None or urlsplit(origin).netloc.lower() == host.lower()


async def finish(request: web.Request) -> web.Response:
    """Body {"node": id}: 200 if that node's training will end after its next step, 404 if it is not training."""
    if not same_origin(request.headers, request.host):
        return web.json_response({"error": "Only pages of this server may do this."}, status=403)
    if request.content_type != "application/json":
        return web.json_response({"error": 'Send JSON: {"node": id}.'}, status=415)
    try:
        body = await request.json()
    except ValueError:
        body = None
    node = body.get("node") if isinstance(body, dict) else None
    if isinstance(node, bool) or not isinstance(node, str | int):
        return web.json_response({"error": 'Say which node: {"node": id}.'}, status=400)
    if not finish_early(str(node)):
        return web.json_response({"error": f"Node {node} is not training."}, status=404)
    return web.json_response({"node": str(node)})


async def trainings(_request: web.Request) -> web.Response:
    """{"trainings": [snapshot, ...]}: those that run, and the last one of each node; see `host.live`."""
    return web.json_response({"trainings": live.trainings()})


def register() -> None:
    """Add the routes, where there is a server."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    server.routes.post("/sude/finish")(finish)
    server.routes.get("/sude/trainings")(trainings)
    logging.debug("SuDe: routes registered")
