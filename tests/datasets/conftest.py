"""No data set test may reach for the network."""

import socket

import pytest


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Turns every attempt to connect into a failure of the test."""

    def refuse(*_):
        raise AssertionError("a data set loader tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
