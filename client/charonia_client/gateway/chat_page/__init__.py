"""A small chat page: static files that talk to the gateway that serves them."""

from charonia_client.gateway.chat_page.routes import chat_page_routes

__all__ = ["chat_page_routes"]
