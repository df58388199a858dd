"""Reading a server's address."""

import pytest
from charonia_client.endpoint import Endpoint


@pytest.mark.parametrize(
    ("url", "protocol", "expected"),
    [
        (None, None, Endpoint("grpc", "localhost:8001")),
        (None, "http", Endpoint("http", "localhost:8000")),
        ("example.org", None, Endpoint("grpc", "example.org:8001")),
        ("example.org:9", "http", Endpoint("http", "example.org:9")),
        ("http://example.org", None, Endpoint("http", "example.org:8000")),
        ("http://example.org:9/", "http", Endpoint("http", "example.org:9")),
        ("https://example.org:443", None, Endpoint("http", "example.org:443", secure=True)),
        ("grpcs://example.org", None, Endpoint("grpc", "example.org:8001", secure=True)),
        ("[::1]:8101", None, Endpoint("grpc", "[::1]:8101")),
    ],
)
def test_parse(url, protocol, expected):
    assert Endpoint.parse(url, protocol) == expected


@pytest.mark.parametrize(
    ("url", "protocol", "message"),
    [
        ("ftp://example.org", None, "must start with"),
        ("http://example.org", "grpc", "contradicts"),
        ("example.org:port", None, "no valid port"),
        ("example.org:99999", None, "no valid port"),
        ("http://example.org/v2", None, "host and a port only"),
        (":8001", None, "host and a port only"),
        ("example.org", "udp", "'grpc' or 'http'"),
    ],
)
def test_parse_refuses(url, protocol, message):
    with pytest.raises(ValueError, match=message):
        Endpoint.parse(url, protocol)


def test_url_parses_back_to_the_same_endpoint():
    for endpoint in (
        Endpoint("grpc", "a:1"),
        Endpoint("grpc", "a:1", secure=True),
        Endpoint("http", "a:1"),
        Endpoint("http", "[::1]:1", secure=True),
    ):
        assert Endpoint.parse(endpoint.url) == endpoint
