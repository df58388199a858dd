"""Triton's entry point to a model served by Charonia: a thin adapter around `charonia.triton`."""

from charonia.entrypoints.default_model import ensure_default_model
from charonia.serving.async_engine import AsyncEngine
from charonia.triton.backend import TritonBackend
from charonia.triton.contract import complete_config


class TritonPythonModel:
    """One instance of the model: a frontend, in a process of its own, of the model's one engine."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        """Declare inputs, outputs and the decoupled policy where config.pbtxt leaves them out."""
        return complete_config(auto_complete_model_config)

    def initialize(self, args):
        """Join the model's engine, starting it if need be; returns once it is ready. Raises to fail the load."""
        self._backend = TritonBackend.start(
            args, connect=AsyncEngine.attach, default_model=ensure_default_model
        )

    def execute(self, requests):
        """Take requests and return at once; responses go to their senders."""
        self._backend.execute(requests)

    def is_ready(self):
        """Whether requests would be served now; servers since 26.03 ask for every readiness probe."""
        return self._backend.is_ready

    def finalize(self):
        """Drain and leave the engine, which ends with its last frontend."""
        self._backend.shutdown()
