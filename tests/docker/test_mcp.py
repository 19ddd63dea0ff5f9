"""The Model Context Protocol's door on the real engine."""

import httpx2
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import ImageContent, TextContent

from tests.live import Live


async def test_a_model_runs_code_keeps_files_and_is_told_of_a_limit(docker_service: Live) -> None:
    async with (
        httpx2.AsyncClient(trust_env=False, timeout=60) as http,
        Client(streamable_http_client(f"{docker_service.url}/mcp", http_client=http), mode="legacy") as client,
    ):

        async def run(code: str) -> tuple[str, bool]:
            result = await client.call_tool("run_code", {"code": code, "timeout_s": 20})
            (block,) = result.content
            assert isinstance(block, TextContent)
            return block.text, result.is_error

        assert await run("open('a', 'w').write('kept'); print('done')") == ("done\n[files] a (4 bytes)", False)
        assert await run("print(open('a').read())") == ("kept", False)
        grow = "import mmap\nm = mmap.mmap(-1, 1 << 30)\nfor at in range(0, 1 << 30, 4096): m[at] = 1"
        assert await run(grow) == ("[outcome: oom, exit code 137]", True)
        assert await run("print(open('a').read())") == ("kept", False)


async def test_cells_keep_variables_and_show_images(docker_service: Live) -> None:
    show = "from IPython.display import Image\nImage(base64.b64decode('iVBORw0KGgo='), format='png')"
    async with (
        httpx2.AsyncClient(trust_env=False, timeout=60) as http,
        Client(streamable_http_client(f"{docker_service.url}/mcp", http_client=http)) as client,
    ):
        first = await client.call_tool("run_cell", {"code": "import base64\nx = 41"})
        assert first.structured_content is not None
        sid = first.structured_content["session_id"]
        second = await client.call_tool("run_cell", {"code": "x + 1", "session_id": sid})
        assert [block.text for block in second.content if isinstance(block, TextContent)] == ["42"]
        (image,) = (await client.call_tool("run_cell", {"code": show, "session_id": sid})).content
        assert isinstance(image, ImageContent)
        assert (image.mime_type, image.data.strip()) == ("image/png", "iVBORw0KGgo=")
        await client.call_tool("end_session", {"session_id": sid})
