"""The routes, one module for each part of the API. All of them get what they need from `Gateway`."""
