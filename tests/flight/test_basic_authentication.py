"""A password for a token, at a pyarrow server that asks for one: every client alike."""

from __future__ import annotations

import asyncio
import base64

import pytest
from pyarrow import flight

from resolver import GrpcConnector
from resolver.aio import GrpcConnector as AioConnector

pytest.importorskip("grpc")

TOKEN = b"Bearer of-anna"


class Giving(flight.ServerMiddleware):
    def __init__(self, headers):
        self.headers = headers

    def sending_headers(self):
        return self.headers


class Asking(flight.ServerMiddlewareFactory):
    """A token for anna's password, nothing for bob's, and calls for the token only."""

    def start_call(self, info, headers):
        (given,) = headers.get("authorization", [""])
        if given.startswith("Basic "):
            username, _, password = base64.b64decode(given[6:]).decode().partition(":")
            if (username, password) == ("anna", "sésame:ouvre"):
                return Giving({"authorization": TOKEN.decode()})
            if username == "bob":
                return Giving({})
            raise flight.FlightUnauthenticatedError("wrong password")
        if given.encode() != TOKEN:
            raise flight.FlightUnauthenticatedError("no token")
        return Giving({})


class Server(flight.FlightServerBase):
    def list_actions(self, context):
        return [("known", "")]


class Anyone(flight.ServerAuthHandler):
    def authenticate(self, outgoing, incoming):
        pass

    def is_valid(self, token):
        return ""


@pytest.fixture(scope="module")
def url():
    with Server(
        "grpc://127.0.0.1:0", auth_handler=Anyone(), middleware={"asking": Asking()}
    ) as server:
        yield f"http://127.0.0.1:{server.port}"


class Pyarrow:
    def __init__(self, url):
        self.client = flight.connect(url.replace("http", "grpc"))

    def authenticate(self, *given):
        return self.client.authenticate_basic_token(*given)

    def actions(self, header):
        options = flight.FlightCallOptions(headers=[header])
        return [action.type for action in self.client.list_actions(options)]

    def close(self):
        self.client.close()


class Blocking(Pyarrow):
    def __init__(self, url):
        self.client = GrpcConnector().connect(url)

    def actions(self, header):
        return [action.type for action in self.client.list_actions(headers=[header])]


class Aio:
    def __init__(self, url):
        self.runner = asyncio.Runner()
        self.client = self.runner.run(AioConnector().connect(url))

    def authenticate(self, *given):
        return self.runner.run(self.client.authenticate_basic_token(*given))

    def actions(self, header):
        async def actions():
            return [action.type for action in await self.client.list_actions(headers=[header])]

        return self.runner.run(actions())

    def close(self):
        self.runner.run(self.client.close())
        self.runner.close()


@pytest.fixture(params=[Pyarrow, Blocking, Aio], ids=["pyarrow", "grpcio", "aio"])
def client(request, url):
    client = request.param(url)
    yield client
    client.close()


def test_a_password_gives_a_header_that_later_calls_can_send(client):
    header = client.authenticate("anna", "sésame:ouvre")
    assert header == (b"authorization", TOKEN)
    assert client.actions(header) == ["known"]


def test_a_wrong_password_gives_the_servers_words(client):
    with pytest.raises(flight.FlightUnauthenticatedError, match="wrong password"):
        client.authenticate("anna", "open")


@pytest.mark.parametrize("client", [Blocking, Aio], indirect=True)  # pyarrow's header is empty
def test_a_server_that_gives_no_token_is_no_success(client):
    with pytest.raises(flight.FlightUnauthenticatedError, match="without a token") as caught:
        client.authenticate("bob", "secret of bob")
    assert "secret" not in str(caught.value)
